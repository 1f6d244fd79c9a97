"""`paceline bench`: measurements that prove what they time, beside a baseline from the same invocation and machine."""

import typer

from launch import bench_engines, bench_learning, bench_long, bench_runs
from launch.bench_options import in_options

app = typer.Typer(help="Measure Paceline against its peers.")


@app.callback()
def bench() -> None:
    """Measure Paceline against its peers."""


# in the order of `--help`, each under its function's name
for command in (
    bench_runs.curve,
    bench_runs.loop,
    bench_engines.decode,
    bench_engines.prefill,
    bench_engines.start,
    bench_engines.cycle,
    bench_engines.gain,
    bench_runs.longtail,
    bench_runs.longtail_picture,
    bench_engines.drift,
    bench_engines.kernels,
    bench_engines.sparse,
    bench_engines.sparse_drift,
    bench_long.selection,
    bench_long.sparse_rollout,
    bench_long.sparse_cycle,
    bench_engines.tensor_parallel,
    bench_learning.drafter_training,
    bench_learning.drafter_losses,
    bench_learning.drafter_checkpoint,
    bench_learning.online,
    bench_runs.idle,
    bench_runs.memory,
    bench_runs.scale,
    bench_runs.reward,
    bench_runs.monitor,
):
    app.command()(in_options(command))


if __name__ == "__main__":
    app()

"""`paceline bench`: measurements that prove what they time, beside a baseline from the same invocation and machine."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from configs.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from launch.bench_peer import PeerChoice

app = typer.Typer(help="Measure Paceline against its peers.")

Geometry = Annotated[str | None, typer.Option(metavar="NAME", help="A known shape, random weights: qwen3-8b, ...")]
Geometries = Annotated[str, typer.Option(metavar="NAMES", help="Known shapes, random weights: smollm2-135m,qwen3-8b")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="A model folder or a shipped name instead.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: the GPU where there is one.")]
Dtype = Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help="auto: bfloat16 on a GPU.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times every figure is measured.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, prompts and noise.")]
Vllm = Annotated[Literal["vllm"] | None, typer.Option(help="Measure this peer in a child process, in turns with us.")]
PeerPython = Annotated[Path, typer.Option(metavar="PATH", help="Python of an environment that has the peer.")]
PeerMemory = Annotated[float, typer.Option(min=0.05, max=0.95, help="Share of the GPU's memory the peer may take.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Where the results go.")]

PYTHON = Path(sys.executable)
ANY_WIDTH = 1000


@app.callback()
def bench() -> None:
    """Measure Paceline against its peers."""


@app.command()
def curve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Writes OUT.json and OUT.png.")],
) -> None:
    """Keep a run's learning curve: every step and evaluation as JSON, and a picture."""
    from launch import curve as learning

    data, picture = (out.with_name(out.name + suffix) for suffix in (".json", ".png"))
    _require_writable("OUT", data)
    _require_writable("OUT", picture)
    result = {"command": f"paceline bench curve {run} {out}"} | learning.curve(run)
    data.write_text(json.dumps(result, indent=1) + "\n")
    learning.draw(result, picture)
    print(f"wrote {data} and {picture}")


@app.command()
def loop(
    peer_python: Annotated[Path, typer.Option(metavar="PATH", help="Python of an environment that has TRL.")],
    recipe: Annotated[Path, typer.Option(metavar="CONFIG", help="Recipe that names model and data.")] = Path("smoke"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    peer: Annotated[Literal["trl"], typer.Option(help="Whom to compare with.")] = "trl",
    spec: Annotated[str, typer.Option(help="Paceline's spec.source, one arm each.")] = "off,suffix",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Times every arm runs; the arms take turns.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each; 0 means all cores.")] = 0,
    peer_micro: Annotated[int, typer.Option(min=0, help="TRL's batch a device; 0: as train.micro_tokens allows.")] = 0,
    out: Json = None,
) -> None:
    """Seconds per GRPO step against TRL's GRPOTrainer: same model, prompts, lengths and optimiser, float32."""
    _require_writable("--json", out)
    from launch import bench_loop

    result = bench_loop.run(
        recipe,
        overrides or [],
        peer=peer,
        peer_python=peer_python,
        sources=spec.split(","),
        steps=steps,
        rounds=rounds,
        threads=threads,
        peer_micro=peer_micro,
    )
    _show(result, bench_loop.table(result), out)


@app.command()
def decode(
    geometry: Geometries = "",
    model: Model = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8,32,128,256",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps a figure is the mean of.")] = 128,
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    peer: Vllm = None,
    peer_python: PeerPython = PYTHON,
    peer_memory: PeerMemory = 0.2,
    out: Json = None,
) -> None:
    """Milliseconds per decode step at temperature 1, by batch size; with --peer vllm its own beside ours."""
    sizes = _numbers("--batches", batches)
    choice = _prepare(out, peer, peer_python, peer_memory)
    if bool(geometry) == (model is not None):
        raise ConfigError("give --geometry NAMES for random weights or --model MODEL, as in --geometry qwen3-8b")
    from launch import bench_decode

    job = bench_decode.Job(tuple(sizes), prompt_len, new_tokens, rounds, seed)
    names = geometry.split(",") if geometry else []
    if len(set(names)) < len(names):
        raise ConfigError(f"--geometry {geometry}: names one twice; give different ones")
    result = bench_decode.run(names, model, job, device=device, dtype=dtype, peer=choice)
    _show(result, bench_decode.table(result), out)


@app.command()
def prefill(
    geometry: Geometry = None,
    model: Model = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "128,512,2048,8192",
    total_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens at once; at least one prompt.")] = 16384,
    rounds: Rounds = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    peer: Vllm = None,
    peer_python: PeerPython = PYTHON,
    peer_memory: PeerMemory = 0.45,
    out: Json = None,
) -> None:
    """Prompt tokens per second by length, against the transformers module with SDPA, and a peer."""
    sizes = _numbers("--lengths", lengths)
    choice = _prepare(out, peer, peer_python, peer_memory)
    from launch import bench_prefill
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    job = bench_prefill.Job(tuple(sizes), total_tokens, rounds, seed)
    result = bench_prefill.run(subject, job, peer=choice)
    _show(result, bench_prefill.table(result), out)


@app.command()
def start(
    geometry: Geometry = None,
    model: Model = None,
    rounds: Annotated[int, typer.Option(min=1, help="Warm starts after the cold one.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    peer: Vllm = None,
    peer_python: PeerPython = PYTHON,
    peer_memory: PeerMemory = 0.45,
    out: Json = None,
) -> None:
    """Seconds from loaded weights to the first token, in fresh processes: compilers' caches empty, then kept."""
    choice = _prepare(out, peer, peer_python, peer_memory)
    from launch import bench_start

    job = bench_start.Job(geometry, model, device, dtype, seed, rounds)
    result = bench_start.run(job, peer=choice)
    _show(result, bench_start.table(result), out)


@app.command()
def cycle(
    geometry: Geometry = None,
    model: Model = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded together; '': time no cycles.")] = "1,2,4,8",
    graph_batch: Annotated[int, typer.Option(min=0, help="Weigh the graphs up to this batch; 0: do not.")] = 256,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Cycles a figure is the mean of.")] = 64,
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """A speculative cycle in plain steps, and the graph memory of several strategies against one's."""
    sizes = _numbers("--batches", batches) if batches else []
    if not sizes and not graph_batch:
        raise ConfigError("--batches '' and --graph-batch 0 leave nothing to measure; give one of them another value")
    _prepare(out)
    from launch import bench_cycle
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    job = bench_cycle.Job(tuple(sizes), graph_batch, prompt_len, new_tokens, rounds, seed)
    result = bench_cycle.run(subject, job)
    if graph_batch:
        _write(result, out)  # what was timed is kept, should the graphs not fit
        result["graphs"] = bench_cycle.graph_memory(subject.model, job)
    _show(result, bench_cycle.table(result), out)


@app.command()
def gain(
    geometry: Geometry = None,
    model: Model = None,
    batches: Annotated[str, typer.Option(help="Rollouts at once.")] = "1,8,32,128,256",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a rollout at most.")] = 512,
    rounds: Rounds = 9,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Rollouts with drafts, the strategy chosen as they run, over rollouts without; also where drafts never match."""
    sizes = _numbers("--batches", batches)
    _prepare(out)
    from launch import bench_gain
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    result = bench_gain.run(subject, bench_gain.Job(tuple(sizes), new_tokens, rounds, seed))
    _show(result, bench_gain.table(result), out)


@app.command()
def longtail(
    recipe: Annotated[Path, typer.Option(metavar="CONFIG", help="Recipe of the workload.")] = Path("longtail"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    arms: Annotated[
        str, typer.Option(help="How rollouts are drafted, the first to compare with.")
    ] = "off,suffix,tlt,ours",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each arm; they take turns, a step each.")] = 20,
    skip: Annotated[int, typer.Option(min=0, help="First steps that enter no figure: captures, compilation.")] = 4,
    drafter_steps: Annotated[
        int, typer.Option(min=0, help="Updates of the drafter that learned arms start from; 0: from random weights.")
    ] = 600,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no round of turns later than that; 0: no limit.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Start from this run's newest checkpoint: no warm start.")
    ] = None,
    drafter: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Learned arms start from this drafter: no training before.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the runs here, DIR/warm and DIR/drafter first.")
    ] = None,
    out: Json = None,
) -> None:
    """Whole steps of GRPO on a long-tailed workload, by how rollouts are drafted: one run each, from one checkpoint."""
    _prepare(out)
    from launch import bench_longtail, longtail_report

    job = bench_longtail.Job(tuple(arms.split(",")), steps, skip, drafter_steps, minutes)
    with nullcontext(runs) if runs else TemporaryDirectory(prefix="paceline-longtail-") as folder:
        result = bench_longtail.run(
            recipe,
            overrides or [],
            job,
            checkpoint=checkpoint,
            drafter=drafter,
            folder=Path(folder),
            keep=lambda so_far: _write(so_far, out),
        )
    if result["drafter"]:
        Console().print(longtail_report.drafter_table(result["drafter"]))
    _show(result, longtail_report.table(result), out)


@app.command("longtail-picture")
def longtail_picture(
    result: Annotated[Path, typer.Argument(metavar="JSON", help="What `paceline bench longtail` wrote.")],
    picture: Annotated[Path, typer.Argument(metavar="PNG", help="Where the picture goes.")],
) -> None:
    """Draw a long-tail result: where a step's seconds go, and how fast rollouts were by step."""
    from launch import longtail_report

    _require_writable("PNG", picture)
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"JSON {result}: cannot be read ({error}); give what --json wrote") from error
    if not isinstance(found, dict) or found.get("what") != longtail_report.WHAT or "arms" not in found:
        raise ConfigError(f"JSON {result} is no long-tail result; give what `paceline bench longtail --json` wrote")
    longtail_report.draw(found, picture)
    print(f"wrote {picture}")


@app.command()
def drift(
    geometry: Geometry = None,
    model: Model = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to answer.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Rollouts with drafts against rollouts without, and both against the training forward: agreement and drift."""
    _prepare(out)
    from launch import bench_drift
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    result = bench_drift.run(subject, bench_drift.Job(prompts, samples, new_tokens, seed))
    _show(result, bench_drift.table(result), out)


@app.command()
def kernels(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="Whose heads and widths.")] = "qwen3-8b",
    batches: Annotated[str, typer.Option(help="Sequences that attend.")] = "1,4,8,16",
    contexts: Annotated[str, typer.Option(help="Keys of each.")] = "8192,32768,131072",
    max_keys: Annotated[int, typer.Option(min=1, help="Leave out batches of more keys.")] = 1 << 19,
    tokens: Annotated[str, typer.Option(help="Rows of products and samplings.")] = "1,8,16,128",
    logprob_rows: Annotated[int, typer.Option(min=1, help="Rows of log-probs.")] = 2048,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Attention, products, sampling and log-probs against torch's, at a geometry's shapes."""
    sizes = [(batch, keys) for keys in _numbers("--contexts", contexts) for batch in _numbers("--batches", batches)]
    rows = _numbers("--tokens", tokens)
    _prepare(out)
    from launch import bench_kernels
    from launch.geometry import placement

    where, kind = placement(device, dtype)
    kept = tuple((batch, keys) for batch, keys in sizes if batch * keys <= max_keys)
    job = bench_kernels.Job(geometry, where, kind, kept, tuple(rows), logprob_rows, seed)
    result = bench_kernels.run(job)
    _show(result, bench_kernels.table(result), out)


@app.command("tensor-parallel")
def tensor_parallel(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="A known shape, random weights.")] = "qwen3-8b",
    world: Annotated[int, typer.Option(min=2, help="GPUs that share the policy.")] = 2,
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8,32",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps a figure is the mean of.")] = 128,
    rounds: Rounds = 3,
    exact_layers: Annotated[int, typer.Option(min=1, help="Layers compared token by token in float32.")] = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """A policy over several GPUs against the same on one: whether rollouts agree, and milliseconds per step."""
    sizes = tuple(_numbers("--batches", batches))
    _prepare(out)
    from launch import bench_tensor_parallel

    job = bench_tensor_parallel.Job(geometry, world, sizes, prompt_len, new_tokens, rounds, exact_layers, seed)
    result = bench_tensor_parallel.run(job, device=device, dtype=dtype)
    _show(result, bench_tensor_parallel.table(result), out)


@app.command("drafter-training")
def drafter_training(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="The policy's shape, random weights.")] = "smollm2-135m",
    samples: Annotated[int, typer.Option(min=2, help="Rollouts of one update.")] = 32,
    batches: Annotated[int, typer.Option(min=1, help="Updates a round.")] = 4,
    median_tokens: Annotated[int, typer.Option(min=16, help="Median of the rollouts' log-normal lengths.")] = 200,
    sigma: Annotated[float, typer.Option(min=0.0, help="Deviation of the lengths' logarithms.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longer rollouts are cut to this.")] = 2048,
    rounds: Rounds = 5,
    device: Device = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Rollouts per second of drafter training: packed, padded, and padded after sorting by length; equal gradients."""
    _prepare(out)
    from configs.schema import DrafterConfig
    from launch import bench_drafter
    from launch.geometry import placement

    where, _ = placement(device, "auto")
    job = bench_drafter.Job(
        geometry, where, samples, batches, median_tokens, sigma, max_tokens, rounds, seed, DrafterConfig()
    )
    result = bench_drafter.run(job)
    _show(result, bench_drafter.table(result), out)


@app.command()
def idle(
    geometry: Geometry = None,
    model: Model = None,
    running: Annotated[int, typer.Option(min=2, help="Sequences a worker runs at a time; it has twice as many.")] = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a rollout.")] = 512,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one of the drafter's optimiser steps.")] = 4096,
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Two workers of which one is idle: how much of its time is used, what that costs the other, what a kill does."""
    _prepare(out)
    from launch.cluster import protect_local_ray

    protect_local_ray()
    from launch import bench_idle

    job = bench_idle.Job(geometry, model, running, prompt_len, new_tokens, batch_tokens, rounds, seed)
    result = bench_idle.run(job, device=device, dtype=dtype)
    _show(result, bench_idle.table(result), out)


@app.command()
def reward(
    workers: Annotated[str, typer.Option(help="Reward workers.")] = "1,2",
    sandboxes: Annotated[str, typer.Option(help="Kinds of reward.sandbox.")] = "bubblewrap,landlock",
    rewards: Annotated[int, typer.Option(min=1, help="Programs scored a round, of each kind of tests.")] = 200,
    rounds: Rounds = 3,
    out: Json = None,
) -> None:
    """Model-written programs scored per second, by sandbox and number of workers, against a Python start a test."""
    counts = _numbers("--workers", workers)
    _prepare(out)
    from launch import bench_reward

    result = bench_reward.run(bench_reward.Job(tuple(counts), tuple(sandboxes.split(",")), rewards, rounds))
    _show(result, bench_reward.table(result), out)


@app.command()
def monitor(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe whose run is watched.")] = Path("smoke"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 10,
    out: Json = None,
) -> None:
    """What recording, the page and a sink cost a run: steps with them, in turns with steps without."""
    _prepare(out)
    from launch import bench_monitor

    with TemporaryDirectory(prefix="paceline-bench-") as folder:
        result = bench_monitor.run(recipe, overrides or [], pairs=pairs, folder=Path(folder))
    _show(result, bench_monitor.table(result), out)


def _numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated list, in order. Raises ConfigError."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{option} {text!r}: give different positive numbers with commas between, as in 1,8,32")
    return numbers


def _prepare(
    out: Path | None, peer: str | None = None, python: Path = PYTHON, memory: float = 0.0
) -> "PeerChoice | None":
    """What comes before the first heavy import; the peer that was asked for. Raises PreflightError, StorageError."""
    from launch.bench_peer import PeerChoice, require_peer
    from launch.logs import check_kernels, disable_progress_bars, quiet_libraries

    _require_writable("--json", out)
    check_kernels()
    quiet_libraries()
    disable_progress_bars()
    if peer is None:
        return None
    require_peer(python, peer)
    return PeerChoice(peer, python, memory)


def _require_writable(option: str, out: Path | None) -> None:
    """Make the folder of a result before it is measured. Raises StorageError where the result could not be written."""
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{option} {out}: its folder cannot be made ({error}); give another") from error
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise StorageError(f"{option} {out}: cannot be written; name a file in a folder of yours")


def _show(result: dict[str, Any], table: Any, out: Path | None) -> None:
    """Print the table, however wide, and write the result: columns that a narrow terminal cuts would be lost."""
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=ANY_WIDTH)).maximum
    Console(width=max(console.width, needed)).print(table)
    _write(result, out)


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()

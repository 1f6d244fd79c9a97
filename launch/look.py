"""Commands that only read a run: `paceline top | logs | samples | bundle`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import ConfigError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def top(run: Run) -> None:
    """Watch a run in the terminal, live or finished; q quits."""
    from launch.monitor.top import top as show

    show(run, Console(highlight=False))


def logs(
    run: Run,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what is added, until the run ends.")
    ] = False,
    attempt: Annotated[int | None, typer.Option(metavar="N", help="Of this attempt; by default of the last.")] = None,
) -> None:
    """Print a run's logs."""
    from launch import logs as reading
    from rl.rundir import read_status, require_run

    require_run(run)
    first, *others = reading.log_files(run, attempt)
    last_attempt = first.parent.name == f"attempt_{reading.attempts(run)[-1]}"
    is_empty = True
    try:
        for text in reading.follow(first, lambda: not (follow and last_attempt and read_status(run)["alive"])):
            sys.stdout.write(text)
            sys.stdout.flush()
            is_empty = False
        for log in others:
            if log.stat().st_size:
                print(f"\n==> {log.name} <==\n{log.read_text(encoding='utf-8', errors='replace')}", end="")
                is_empty = False
        if is_empty:
            print(f"nothing was logged in {first.parent}; `paceline status {run}` says where it is", file=sys.stderr)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:  # whoever was reading has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def samples(
    run: Run,
    step: Annotated[int | None, typer.Option(metavar="N", help="Of this step; by default of the last.")] = None,
    worst: Annotated[bool, typer.Option("--worst", help="Those of the lowest reward.")] = False,
    best: Annotated[bool, typer.Option("--best", help="Those of the highest reward.")] = False,
    longest: Annotated[bool, typer.Option("--longest", help="Those of most tokens.")] = False,
    count: Annotated[int, typer.Option("-n", min=1, max=200, metavar="COUNT", help="How many.")] = 3,
) -> None:
    """Print rollouts of a step, accepted drafts in colour."""
    from launch.monitor.reader import read_config
    from launch.samples import Order, show_samples
    from rl.rundir import require_run

    orders: list[Order] = ["worst"] * worst + ["best"] * best + ["longest"] * longest  # type: ignore[assignment]
    if len(orders) > 1:
        raise ConfigError("give one of --worst, --best and --longest")
    require_run(run)
    model = str(read_config(run).get("model", ""))
    order = orders[0] if orders else "prompt"
    show_samples(run, Console(highlight=False), step=step, order=order, count=count, model=model)


def bundle(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; by default NAME-bundle.tar.gz in this folder.")
    ] = None,
) -> None:
    """Pack configuration, logs, events and metrics for someone who helps; secrets are taken out."""
    from launch.bundle import write_bundle
    from rl.rundir import require_run

    require_run(run)
    path = out or Path(f"{run.resolve().name}-bundle.tar.gz")
    names = write_bundle(run, path)
    print(f"wrote {path}: {len(names)} files, {path.stat().st_size / 1e6:.2f} MB, without samples, data or weights")


def add_commands(app: typer.Typer) -> None:
    """Put them under the `paceline` command."""
    for command in (top, logs, samples, bundle):
        app.command()(command)

"""`paceline monitor`: a run's page and metrics, live or after it has ended."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import ConfigError


def monitor(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run directory.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the page; by default the first free one of 8470 to 8489."),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="ADDR", help="Listen here, not on this machine alone; asks for a token then.")
    ] = "",
    host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name the page is reached by, as through a proxy.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only write prometheus.yml, rules.yml and grafana/ there.")
    ] = None,
    sink: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only write the run's steps to it: tensorboard or wandb."),
    ] = None,
) -> None:
    """Show a run, live or finished, in the browser and to Prometheus; it is only ever read."""
    from launch.monitor.serve import DEFAULT_PORT, bind, open_door, serve

    if write is not None:
        from launch.monitor.generate import write_monitoring
        from rl.rundir import storing

        with storing(write):
            write_monitoring(write, port=port or DEFAULT_PORT)
        print(f"wrote {write}/prometheus.yml, rules.yml and grafana/paceline.json")
        return
    if run is None:
        raise ConfigError("monitor needs a RUN, as in `paceline monitor runs/smoke-20260101-120000`")
    from rl.rundir import require_run

    require_run(run)
    if sink:
        _export(run, sink)
        return
    door = open_door(listen, host or ())
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + 20)
    with bind(door.address, ports) as listener, suppress(KeyboardInterrupt):  # which is how it is meant to end
        print(f"monitor {door.url(listener.getsockname()[1])}", flush=True)
        serve(run, listener, door)


def _export(run: Path, names: list[str]) -> None:
    """Write what the run has to the sinks, once."""
    import threading

    from launch.monitor.sinks import feed, require_sinks

    require_sinks(names)
    over = threading.Event()
    over.set()
    feed(run, names, over)
    print(f"wrote the steps of {run} to {', '.join(names)}")

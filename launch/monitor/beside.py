"""What watches a run from beside it: started with the run, gone with it, and free to crash."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import PacelineError
from configs.schema import MonitorConfig
from launch.monitor.generate import write_monitoring
from launch.monitor.serve import DEFAULT_PORT, bind, open_door

DRAIN_S = 30.0  # the sinks may take to write the last steps


@contextmanager
def watched(path: Path, config: MonitorConfig, *, log: Path) -> Iterator[None]:
    """While inside, the page and the sinks that the configuration asks for run in a process of their own.

    Nothing that befalls it reaches the run: what it says goes to the log, and a warning says why it cannot start.
    """
    try:
        write_monitoring(path / "monitoring", port=config.port or DEFAULT_PORT)
    except OSError as error:
        print(f"warning: no files for Prometheus: {error}", file=sys.stderr)
    process = start(path, config, log=log) if config.port or config.sinks else None
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(DRAIN_S if config.sinks else 3.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(path: Path, config: MonitorConfig, *, log: Path) -> subprocess.Popen[bytes] | None:
    """The process that serves and feeds what the configuration asks for; None where there is none, or it cannot."""
    listener = None
    if config.port:
        try:
            door = open_door("")
            listener = bind(door.address, [config.port])
        except PacelineError as error:
            print(f"warning: no page: monitor.port: {error}", file=sys.stderr)
        else:
            print(f"monitor {door.url(config.port)}", flush=True)
    if listener is None and not config.sinks:
        return None
    command = [sys.executable, "-m", "launch.monitor.serve", str(path), "--parent", str(os.getpid())]
    command += [part for name in config.sinks for part in ("--sink", name)]
    fds = []
    if listener is not None:
        fds = [listener.fileno()]
        command += ["--fd", str(listener.fileno())]
    try:
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C is for the run, which ends this process
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
    except OSError as error:
        print(f"warning: nothing watches the run: {error}", file=sys.stderr)
        return None
    finally:
        if listener is not None:
            listener.close()

"""What watches a run in bench monitor, under a clock, and what stands in its place where nothing does."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from configs.schema import MonitorConfig
from launch.monitor.beside import start
from rl.metrics import Stopwatch
from rl.recorder import Recorder
from rl.trace import Lane
from rollout.types import Rollout, Sampling

# A page: it listens, and fetches and parses what is drawn whenever there is something new; and Prometheus every 15 s.
VIEWER = """
import json, sys, time, urllib.request
base, scraped = sys.argv[1], 0.0
get = lambda path: urllib.request.urlopen(base + path, timeout=30).read()
for line in urllib.request.urlopen(base + "/events"):
    if not line.startswith(b"data: "):
        continue
    message = json.loads(line[6:])
    steps = message["state"]["drawn_steps"]
    for name in {"curve", "lanes"} & set(message["changed"]) if steps else ():
        json.loads(get(f"/api/{name}?step={steps[-1][1]}"))
    if "steps" in message["changed"]:
        json.loads(get("/api/steps"))
    if time.monotonic() - scraped > 15:
        scraped = time.monotonic()
        get("/metrics")
"""


class TimedRecorder(Recorder):
    """A recorder that knows how long it took."""

    seconds = 0.0
    _depth = 0

    def end(self) -> None:
        """As Recorder says, like the next."""
        with self._clock():
            super().end()

    def _take_spans(self) -> None:
        with self._clock():
            super()._take_spans()

    def _keep_point(self, sampling: Sampling, *, total: int, finished: int) -> None:
        with self._clock():
            super()._keep_point(sampling, total=total, finished=finished)

    def _keep_lanes(self, lanes: Sequence[Lane]) -> None:
        with self._clock():
            super()._keep_lanes(lanes)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        begun, self._depth = time.perf_counter(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:  # else it is part of what goes on around it
                self.seconds += time.perf_counter() - begun


class Unrecorded:
    """Stands where a recorder does, and records nothing."""

    seconds = 0.0

    def begin(self, step: int) -> Stopwatch:
        """A clock."""
        return Stopwatch()

    def end(self) -> None:
        """Nothing was kept."""

    def span(self, phase: str) -> AbstractContextManager[None]:
        """Nothing around it."""
        return nullcontext()

    def watched(self, rollouts: AsyncGenerator[Rollout], sampling: Sampling, *, total: int) -> AsyncGenerator[Rollout]:
        """The same."""
        return rollouts


@contextmanager
def watchers(run: Path, logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes beside a run: its hub with its sink, and a page that is open; the hub comes first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hub = start(run, MonitorConfig(port=port, sinks=("tensorboard",)), log=logs / "monitor.log")
    assert hub is not None
    processes = [hub]
    try:
        wait_for(port)
        processes.append(subprocess.Popen([sys.executable, "-c", VIEWER, f"http://127.0.0.1:{port}"]))
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def wait_for(port: int) -> None:
    """Until someone listens there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the hub did not start within 120 s")


def cpu_seconds(pid: int) -> float:
    """Processor time a process has taken. Source: proc(5), utime and stime of /proc/PID/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

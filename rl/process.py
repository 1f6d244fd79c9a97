"""One killable reward process, seen from the driver: started, asked, killed."""

import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import RewardConfig
from rollout.types import Prompt, Rollout

START_S = 120.0  # imports of the reward functions, on a busy machine
TAIL_BYTES = 4096  # of a worker's output, kept for messages
EXIT_S = 10.0  # from closing the socket to the end of the process, which tells why
# the driver's import path, so that the worker finds what the driver finds
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rl.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # a score does not depend on the order of a set
    "OMP_NUM_THREADS": "1",  # threads reserve address space, which is limited
    "OPENBLAS_NUM_THREADS": "1",
}


class RewardError(Exception):
    """Why there is no score. kind: a short name to count by. detail: one line. fatal: the worker cannot go on."""

    def __init__(self, kind: str, detail: str, *, fatal: bool) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.fatal = fatal


class Worker:
    """One reward process with its own session, started and ready when the constructor returns."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises ConfigError when the process does not come up or cannot load the functions."""
        ours, theirs = socket.socketpair()
        self._output, output = os.pipe()
        # our own root before the working folder, which may hold a package called rl as well
        search_path = [entry for entry in sys.path if entry] + [str(Path(__file__).parents[1]), os.getcwd()]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, json.dumps(search_path), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | ENVIRONMENT,
            )
        os.close(output)
        self._memory_mb = config.memory_mb
        self._channel = ours
        self._received = b""
        self._tail = b""
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(ours, selectors.EVENT_READ)
        self._selector.register(self._output, selectors.EVENT_READ)
        try:
            reply = self._exchange({"config": asdict(config)}, timeout_s=START_S)
        except RewardError as failure:
            self.close()
            raise ConfigError(
                f"the reward worker did not start: {failure.detail}; mend the reward's module or raise "
                f"reward.memory_mb={config.memory_mb}"
            ) from failure
        if "error" in reply:
            self.close()
            raise ConfigError(reply["error"])

    @property
    def pid(self) -> int:
        """The process, which leads its own process group."""
        return self._process.pid

    def call(self, function: str, prompt: Prompt, rollout: Rollout, *, timeout_s: float) -> float:
        """One function's value. Raises RewardError."""
        reply = self._exchange({"function": function, "prompt": prompt, "rollout": rollout}, timeout_s=timeout_s)
        if "error" not in reply:
            return float(reply["value"])
        detail = _one_line(reply["error"])
        if reply["kind"] == "MemoryError":
            # what filled the memory may still hold it
            raise RewardError("MemoryError", f"{detail} (reward.memory_mb={self._memory_mb})", fatal=True)
        raise RewardError(reply["kind"], detail, fatal=False)

    def kill(self) -> None:
        """Kill the process and its group, and wait for the process; safe to repeat and from any thread."""
        with self._lock:
            if self._process.returncode is not None:
                return
            # not yet waited for, so the group's number cannot be another's
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Kill the process and give its descriptors back; only once no call is in flight."""
        self.kill()
        if self._selector.get_map() is not None:
            self._selector.close()
            self._channel.close()
            os.close(self._output)

    def _exchange(self, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        data = json.dumps(message, default=_fields).encode()
        try:
            self._channel.settimeout(timeout_s)
            self._channel.sendall(struct.pack(">I", len(data)) + data)
        except TimeoutError:
            raise self._hung(timeout_s) from None
        except OSError:
            raise self._died() from None
        while True:
            # a look after the deadline: this thread, not the worker, may have been the late one
            remaining = deadline - time.monotonic()
            for key, _ in self._selector.select(max(0.0, remaining)):
                self._read(key.fd)
            if (reply := self._frame()) is not None:
                return reply
            if remaining <= 0:
                raise self._hung(timeout_s)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 16)
        except ConnectionResetError:  # it ended without reading what was sent
            data = b""
        if fd == self._output:
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            if not data:
                self._selector.unregister(fd)
        elif data:
            self._received += data
        else:
            raise self._died()

    def _frame(self) -> dict[str, Any] | None:
        if len(self._received) < 4:
            return None
        end = 4 + struct.unpack(">I", self._received[:4])[0]
        if len(self._received) < end:
            return None
        frame, self._received = self._received[4:end], self._received[end:]
        reply: dict[str, Any] = json.loads(frame)
        return reply

    def _hung(self, timeout_s: float) -> RewardError:
        text = f"no answer within {timeout_s:g} s"
        return RewardError(text, text, fatal=True)

    def _died(self) -> RewardError:
        """The process closed its end: how it ended, and its last line of output."""
        with self._lock:
            if self._process.returncode is None:
                ending = os.pidfd_open(self.pid)
                poll = select.poll()
                poll.register(ending, select.POLLIN)
                poll.poll(EXIT_S * 1000)
                os.close(ending)
        self.kill()
        os.set_blocking(self._output, False)
        try:
            while data := os.read(self._output, 1 << 16):
                self._tail = (self._tail + data)[-TAIL_BYTES:]
        except BlockingIOError:
            pass  # a descendant in another session still holds the pipe
        code = self._process.returncode
        kind = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        lines = [line for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        return RewardError(kind, f"{kind}: {_one_line(lines[-1])}" if lines else kind, fatal=True)


def _fields(record: Any) -> dict[str, Any]:
    """A record's fields for json.dumps, not copied deeply as asdict would."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _one_line(text: str) -> str:
    return " ".join(text.split())

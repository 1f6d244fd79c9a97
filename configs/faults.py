"""Faults on demand, to see what becomes of them: PACELINE_FAULT=point[@process]:nth:action[,...].

    PACELINE_FAULT=rollout.cycle@1:20:kill paceline train ...       # worker 1 dies at its 20th cycle
    PACELINE_FAULT=checkpoint.fsync:3:enospc paceline train ...     # the third file of a checkpoint meets a full disk

nth counts the hits of that point in that process. A fault happens once: processes that a recovery starts have none.
"3+" means from the third hit on, and in those processes too. @process is a worker's number, or "driver".
"""

import errno
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError

VARIABLE = "PACELINE_FAULT"
DRIVER = "driver"
EXIT = 86  # of the action: no code that a run ends with

POINTS: Mapping[str, str] = {
    "data.load": "the driver is about to read its prompts",
    "worker.build": "a worker is about to load its policy",
    "rollout.cycle": "an engine is about to run a cycle of its rollouts",
    "train.backward": "a rank has its loss and is about to go backward; nan spoils the loss",
    "transfer.bucket": "a bucket of weights is about to leave for, or has just reached, an engine",
    "graph.capture": "an engine is about to capture a CUDA graph",
    "drafter.step": "the drafter is about to take a training step; nan spoils its loss",
    "drafter.publish": "a better head is about to be served",
    "reward.call": "a reward process is about to score a rollout",
    "metrics.append": "the driver is about to add a line to metrics/*.jsonl",
    "samples.write": "the driver is about to write a step's rollouts",
    "checkpoint.stage": "a checkpoint's folder is about to be made, under another name",
    "checkpoint.file": "a file of a checkpoint is about to be written",
    "checkpoint.manifest": "a checkpoint's sizes and hashes are about to be written",
    "checkpoint.fsync": "a file or folder of a checkpoint is about to be put on the disk",
    "checkpoint.rename": "a checkpoint that is whole is about to get its name",
    "checkpoint.clean": "an old checkpoint, or what an interrupted one left, is about to be removed",
}

ACTIONS: Mapping[str, str] = {
    "kill": "the process kills itself (SIGKILL)",
    "term": "the process is asked to end (SIGTERM)",
    "stop": "the process stops and shows no sign of life (SIGSTOP)",
    "node": "the process kills its parent, of a Ray worker its node's raylet, and itself",
    "raise": "a RuntimeError is raised",
    "enospc": "an OSError is raised: no space left on the device",
    "oom": "torch's OutOfMemoryError is raised, where torch is not loaded a MemoryError",
    "hang": "the thread waits for ever",
    "exit": f"the process ends at once with code {EXIT}",
    "nan": "the caller makes its numbers NaN",
}

SPOILED = ("train.backward", "drafter.step")  # points whose callers make their numbers NaN


class FaultError(RuntimeError):
    """What the action "raise" raises."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of PACELINE_FAULT. process "" means any; again: from the nth hit on, and after recoveries."""

    point: str
    process: str
    nth: int
    again: bool
    action: str

    def is_due(self, point: str, process: str, count: int) -> bool:
        """Whether it happens at this process's count-th hit of a point."""
        here = self.point == point and self.process in ("", process)
        return here and (count == self.nth or (self.again and count > self.nth))


class _Armed:
    """The faults of this process, and how often each point was hit since they were armed."""

    def __init__(self, faults: list[Fault], process: str) -> None:
        self.faults = faults
        self.process = process
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()


_armed: _Armed | None = None  # of the process, as its environment is


def parse(text: str) -> list[Fault]:
    """The faults that a value of PACELINE_FAULT names. Raises ConfigError."""
    return [_parse_one(entry.strip()) for entry in text.split(",") if entry.strip()]


def arm(text: str | None = None, *, process: str = DRIVER, recovery: int = 0) -> None:
    """From now on these faults happen in this process; None: those of the environment. Raises ConfigError.

    process: what @process calls this one. recovery: how many recoveries came before this process was started.
    """
    global _armed
    faults = parse(os.environ.get(VARIABLE, "") if text is None else text)
    if recovery:
        faults = [fault for fault in faults if fault.again]
    _armed = _Armed(faults, process) if faults else None


def require_processes(num_workers: int) -> None:
    """Raise ConfigError where a fault is meant for a worker that a run of so many has not: it would never happen."""
    for fault in [] if _armed is None else _armed.faults:
        if fault.process.isdecimal() and int(fault.process) >= num_workers:
            there = f"workers 0 to {num_workers - 1}" if num_workers else "no workers"
            raise ConfigError(f"{VARIABLE}: @{fault.process} is nobody here; this run has {there}, and {DRIVER}")


def counts() -> Mapping[str, int]:
    """How often each point was hit in this process since faults were armed."""
    return {} if _armed is None else dict(_armed.counts)


def hit(point: str) -> Literal["nan"] | None:
    """A point of the code is reached; a fault that is due there happens now, of which "nan" is the caller's to do."""
    if _armed is None:
        return None
    assert point in POINTS, point
    with _armed.lock:
        _armed.counts[point] += 1
        count = _armed.counts[point]
    for fault in _armed.faults:
        if fault.is_due(point, _armed.process, count):
            return _happen(fault.action, f"{point}, hit {count}, in {_armed.process}")
    return None


def _happen(action: str, where: str) -> Literal["nan"] | None:
    print(f"{VARIABLE}: {action} at {where}", file=sys.stderr, flush=True)
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "node":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise FaultError(f"injected at {where}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        case "oom":
            # by name: this package imports no torch
            kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
            raise kind(f"injected at {where}")
        case "hang":
            threading.Event().wait()
        case "exit":
            os._exit(EXIT)
        case "nan":
            return "nan"
    return None


def _parse_one(entry: str) -> Fault:
    place, *rest = entry.split(":")
    point, at, process = place.partition("@")
    if len(rest) != 2 or (at and not process):
        raise ConfigError(f"{VARIABLE}: {entry!r} is not point[@process]:nth:action, as in rollout.cycle@1:20:kill")
    nth, action = rest
    if point not in POINTS:
        raise ConfigError(f"{VARIABLE}: no point is called {point!r}; there are {', '.join(POINTS)}")
    if action not in ACTIONS:
        raise ConfigError(f"{VARIABLE}: no action is called {action!r}; there are {', '.join(ACTIONS)}")
    if action == "nan" and point not in SPOILED:
        raise ConfigError(f"{VARIABLE}: nothing at {point} could be made nan; {' and '.join(SPOILED)} can")
    if process and process != DRIVER and not process.isdecimal():
        raise ConfigError(f"{VARIABLE}: @{process} is neither a worker's number nor {DRIVER}")
    number = nth.removesuffix("+")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"{VARIABLE}: nth={nth!r} is not a number from 1 up, with or without a + after it")
    return Fault(point, process, int(number), nth.endswith("+"), action)

"""How a run came to its end: one report of the first cause, wherever that was, and of what to do next.

RUN/logs/attempt_N/crash.json   first cause (error, process, host, call, time, stack), step and phase, who was
                                waited for, what followed, exit code, next commands
                   crash.log    the same for reading, with every stack
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import StorageError
from configs.redact import redacted
from launch.noted import Trace, followed, trace, trace_of, waited_for
from rl.rundir import RunDir, now, storing

if TYPE_CHECKING:
    from rl.metrics import Progress  # it imports torch, for which a usage error does not wait

REPORT, LOG = "crash.json", "crash.log"
STARTING = "start"  # the phase before any other


class Phases:
    """A Progress that remembers the phase a run is in, and tells another one everything."""

    def __init__(self, shown: "Progress") -> None:
        self.shown = shown
        self.name = STARTING

    def phase(self, name: str) -> None:
        """As Progress says."""
        self.name = name
        self.shown.phase(name)

    def rollouts(self, done: int, total: int) -> None:
        """As Progress says."""
        self.shown.rollouts(done, total)

    def step(self, record: dict[str, float | int]) -> None:
        """As Progress says."""
        self.shown.step(record)

    def message(self, text: str) -> None:
        """As Progress says."""
        self.shown.message(text)

    def close(self) -> None:
        """As Progress says."""
        self.shown.close()


def write_report(
    run: RunDir,
    error: BaseException,
    *,
    code: int | None,
    reason: str,
    phase: str,
    step: int | None,
    following: str = "",
) -> Path:
    """Write the report of an attempt that ended, and return its path. Raises StorageError.

    following: what happens by itself, as after a recovery; "" where a person has to do it.
    """
    first = trace_of(error) or trace(error, "driver", phase)
    report = {
        "time": now(),
        "attempt": run.attempt,
        "code": code,
        "reason": reason,
        "first": asdict(first),
        "step": step,
        "phase": phase,
        "waited_for": waited_for(error),
        "followed": [asdict(other) for other in followed(error)],
        "following": following,
        "next": next_commands(run.path),
    }
    return write(run.logs, report)


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """The two files of a report, and the path of the first. Raises StorageError."""
    path, report = folder / REPORT, redacted(report)
    with storing(path):
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / LOG).write_text("\n".join(lines(report)) + "\n", encoding="utf-8")
    return path


def next_commands(run: Path) -> list[str]:
    """What to do after a run has ended before its time: go on, and ask others."""
    return [f"paceline resume {run}", f"paceline bundle {run}"]


def read(run: Path, attempt: int) -> dict[str, Any] | None:
    """An attempt's report, None where there is none or it was torn."""
    try:
        report: dict[str, Any] = json.loads((run / "logs" / f"attempt_{attempt}" / REPORT).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return report


def post_mortem(run: RunDir, before: Mapping[str, Any]) -> None:
    """Write the report that an attempt could not write itself. before: STATUS.json as it left it.

    A process that is killed, with its machine or alone, has no time to say why.
    """
    if "exit_code" in before or before["attempt"] >= run.attempt or read(run.path, before["attempt"]) is not None:
        return
    found = Trace(
        error="the process ended without a word: killed, out of memory, or with its machine",
        process="driver",
        host=before["host"],
        pid=before["pid"],
        call="train",
        time=before["updated"],
        stack="",
    )
    report = {
        "time": now(),
        "attempt": before["attempt"],
        "code": None,
        "reason": found.error,
        "first": asdict(found),
        "step": before.get("step"),
        "phase": None,
        "waited_for": None,
        "followed": [],
        "following": f"attempt {run.attempt} went on",
        "next": next_commands(run.path),
    }
    try:
        write(run.path / "logs" / f"attempt_{before['attempt']}", report)
    except StorageError:
        return  # what the present attempt is for goes before


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A report for reading."""
    first = report["first"]
    yield f"first cause: {first['error']}"
    yield f"where:       {where(report)}"
    if report["waited_for"]:
        yield f"waited for:  {report['waited_for']}"
    yield f"exit code:   {report['code']} ({report['reason']})"
    yield f"next:        {report['following'] or '; '.join(report['next'])}"
    yield from ("", first["stack"])
    for other in report["followed"]:
        yield f"then {other['process']} (process {other['pid']} on {other['host']}): {other['error']}"
        yield from (other["stack"], "")


def where(report: Mapping[str, Any]) -> str:
    """The place of the first cause, in one line."""
    first = report["first"]
    step = "before the first step" if report["step"] is None else f"after step {report['step']}"
    place = f"{first['process']} (process {first['pid']} on {first['host']}), {first['call'] or 'gone'}"
    return f"{place}; {step}" + (f", phase {report['phase']}" if report["phase"] else "")

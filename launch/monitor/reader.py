"""A run as its files tell it: the same reading of one that is going on and of one that has ended."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from configs.errors import PacelineError
from launch.monitor.tail import Line, Record, StepIndex, Tail
from rl.rundir import read_status, require_run

MOST_LINES = 5000  # of a file, in one look: a long run is taken in piece by piece
ALIVE_EVERY_S = 2.0  # to learn whether a run is alive its lock is touched, which a resume must not meet too often

# what every line of a file has, in every version
NUMBERS = {
    "steps": ("step", "total_steps", "seconds", "tokens", "num_rollouts", "truncated_fraction", "draft_tokens",
              "accept_length", "reward_mean"),
    "curve": ("step", "time", "finished", "total", "tokens"),
    "lanes": ("step", "worker", "begin", "end"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class News:
    """What a look at a run's files found. lines: by file, in order, and whether they come instead of all before.

    more: whether there is more than one look takes in.
    """

    lines: dict[str, tuple[bool, list[Line]]]
    config: Record | None
    status: Record | None
    updated: float | None
    more: bool


class RunReader:
    """What is known of a run directory; poll takes in what was added since.

    Whoever must not wait for a disk has another thread look, and takes in what that found.

    steps, evals, warmstart, events: the records of their files, in order. status: STATUS.json and "alive". config:
    config/resolved.yaml. latest: the last line of the curve. updated: when the run last wrote, Unix time.
    Lines of the curve and of the lanes stay in their files, and are read by step.
    """

    def __init__(self, path: Path) -> None:
        """Raises PreflightError where there is no run directory."""
        require_run(path)
        self.path = path
        self.steps: list[Record] = []
        self.evals: list[Record] = []
        self.warmstart: list[Record] = []
        self.events: list[Record] = []
        self.status: Record = {}
        self.config: Record = {}
        self.latest: Record = {}
        self.activity_seconds: Counter[str] = Counter()
        self.updated = 0.0
        metrics = path / "metrics"
        self._curve = StepIndex(metrics / "curve.jsonl")
        self._lanes = StepIndex(metrics / "lanes.jsonl")
        self._tails: dict[str, tuple[Tail, Callable[[Line], None], Callable[[], None]]] = {
            "steps": (Tail(metrics / "steps.jsonl"), *_into(self.steps)),
            "evals": (Tail(metrics / "eval.jsonl"), *_into(self.evals)),
            "warmstart": (Tail(metrics / "warmstart.jsonl"), *_into(self.warmstart)),
            "events": (Tail(path / "events.jsonl"), *_into(self.events)),
            "curve": (Tail(self._curve.path), self._add_curve, self._forget_curve),
            "lanes": (Tail(self._lanes.path), self._add_lane, self._forget_lanes),
        }
        self._files: dict[str, tuple[int, int]] = {}
        self._asked_alive = 0.0

    def poll(self) -> tuple[set[str], bool]:
        """Take in all that was added; returns as take does."""
        changed: set[str] = set()
        cut, more = False, True
        while more:
            news = self.look()
            those, was_cut = self.take(news)
            changed, cut, more = changed | those, cut or was_cut, news.more
        return changed, cut

    def look(self) -> News:
        """Read what was added, MOST_LINES of a file at most, and change nothing that is known."""
        found, more = {}, False
        for name, (tail, _, _) in self._tails.items():
            restarted, lines = tail.look()
            read = list(islice(lines, MOST_LINES))
            more = more or len(read) == MOST_LINES
            # a line of something else is passed over, as a torn one is
            numbers = NUMBERS.get(name, ())
            kept = [line for line in read if all(isinstance(line.record.get(key), int | float) for key in numbers)]
            if restarted or kept:
                found[name] = restarted, kept
        config = read_config(self.path) if self._is_new(self.path / "config" / "resolved.yaml") else None
        now, status = time.monotonic(), None
        if self._is_new(self.path / "STATUS.json") or now - self._asked_alive > ALIVE_EVERY_S:
            self._asked_alive = now
            status = self._read_status()
            status = None if status == self.status else status
        is_new = bool(found) or config is not None or status is not None
        return News(found, config, status, self._last_written() if is_new else None, more)

    def take(self, news: News) -> tuple[set[str], bool]:
        """Know what a look found. Returns: which of steps, evals, warmstart, events, curve, lanes, status and config
        changed; whether any was cut, so that what was read of it before holds no more."""
        changed, cut = set(news.lines), False
        for name, (restarted, lines) in news.lines.items():
            _, add, forget = self._tails[name]
            if restarted:
                forget()
                cut = True
            for line in lines:
                add(line)
        if news.config is not None:
            self.config = news.config
            changed.add("config")
        if news.status is not None:
            self.status = news.status
            changed.add("status")
        if news.updated is not None:
            self.updated = news.updated
        return changed, cut

    def curve(self, step: int) -> list[Record]:
        """The lines of metrics/curve.jsonl while this step's rollouts were sampled."""
        return [record for record in self._curve.read(step) if not record.get("eval")]

    def lanes(self, step: int) -> list[Record]:
        """The spans of metrics/lanes.jsonl in this step."""
        return self._lanes.read(step)

    def record(self, step: int) -> Record | None:
        """The step's record; None before it is finished."""
        # steps are written in order, each once: the place is known unless a file was mended by hand
        if 0 < step <= len(self.steps) and self.steps[step - 1].get("step") == step:
            return self.steps[step - 1]
        return next((record for record in self.steps if record.get("step") == step), None)

    def samples(self, step: int) -> Path | None:
        """The step's samples/step_N.parquet, if it is there."""
        path = self.path / "samples" / f"step_{step:d}.parquet"
        return path if path.is_file() else None

    @property
    def drawn_steps(self) -> list[int]:
        """Steps with a curve or lanes, in order; the last may be under way."""
        return sorted(step for step in self._curve.ranges.keys() | self._lanes.ranges.keys() if step > 0)

    def _add_curve(self, line: Line) -> None:
        self.latest = line.record
        if not line.record.get("eval"):
            self._curve.add(line.record["step"], line)

    def _forget_curve(self) -> None:
        self._curve.ranges.clear()
        self.latest = {}

    def _add_lane(self, line: Line) -> None:
        record = line.record
        self._lanes.add(record["step"], line)
        if record["worker"] >= 0:
            self.activity_seconds[record["kind"]] += record["end"] - record["begin"]

    def _forget_lanes(self) -> None:
        self._lanes.ranges.clear()
        self.activity_seconds.clear()

    def _is_new(self, path: Path) -> bool:
        """Whether the file was replaced since it was last asked about."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        mark = (stat.st_ino, stat.st_mtime_ns)
        if self._files.get(path.name) == mark:
            return False
        self._files[path.name] = mark
        return True

    def _read_status(self) -> Record:
        try:
            return read_status(self.path)
        except PacelineError:  # the run directory is being written, moved or removed: what was known stands
            return self.status

    def _last_written(self) -> float:
        files: Iterable[Path] = (self.path / "STATUS.json", *(tail.path for tail, *_ in self._tails.values()))
        times = []
        for path in files:
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
        return max(times, default=0.0)


def _into(records: list[Record]) -> tuple[Callable[[Line], None], Callable[[], None]]:
    return (lambda line: records.append(line.record)), records.clear


def read_config(run: Path) -> Record:
    """A run's configuration, of whatever version; empty where it is none."""
    try:
        value: Any = yaml.safe_load((run / "config" / "resolved.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError:  # mended by hand just now; it names the run, and nothing depends on it
        value = None
    return value if isinstance(value, dict) else {}

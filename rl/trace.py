"""A step as a Chrome trace: every worker a process, what it did by kind on tracks, the curve as counters.

Open it in ui.perfetto.dev. Format: the trace event format's JSON objects (docs.google.com/document/d/
1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), times in microseconds since the step began.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT_TRACES = 50  # of a run, the latest
TRACKS = ("decode", "prefill", "train", "drafter", "sync", "warmstart", "idle", "reward", "checkpoint", "eval")


@dataclass(frozen=True, slots=True)
class Lane:
    """A span of time in a step: which worker, -1 for the driver, did what, in seconds of time.time()."""

    step: int
    worker: int
    kind: str
    begin: float
    end: float

    def record(self) -> dict[str, Any]:
        """The line of metrics/lanes.jsonl."""
        return {
            "step": self.step,
            "worker": self.worker,
            "kind": self.kind,
            "begin": round(self.begin, 6),
            "end": round(self.end, 6),
        }


def step_trace(lanes: Sequence[Lane], curve: Sequence[Mapping[str, Any]], begun: float) -> bytes:
    """The file, compressed. curve: the lines of metrics/curve.jsonl in the step."""
    events = [*_names(lanes), *_spans(lanes, begun), *_counters(curve, begun)]
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    return gzip.compress(text.encode(), compresslevel=5, mtime=0)


def _process(worker: int) -> int:
    # process 0 is the kernel's in Perfetto
    return worker + 2


def _names(lanes: Sequence[Lane]) -> Iterator[dict[str, Any]]:
    for worker in sorted({lane.worker for lane in lanes}):
        name = "driver" if worker < 0 else f"worker {worker}"
        process = {"ph": "M", "pid": _process(worker)}
        yield process | {"name": "process_name", "args": {"name": name}}
        yield process | {"name": "process_sort_index", "args": {"sort_index": worker}}
    for worker, kind in sorted({(lane.worker, lane.kind) for lane in lanes}):
        thread = {"ph": "M", "pid": _process(worker), "tid": TRACKS.index(kind) + 1}
        yield thread | {"name": "thread_name", "args": {"name": kind}}
        yield thread | {"name": "thread_sort_index", "args": {"sort_index": TRACKS.index(kind)}}


def _spans(lanes: Sequence[Lane], begun: float) -> Iterator[dict[str, Any]]:
    for lane in lanes:
        yield {
            "name": lane.kind,
            "cat": "lane",
            "ph": "X",
            "pid": _process(lane.worker),
            "tid": TRACKS.index(lane.kind) + 1,
            "ts": round((lane.begin - begun) * 1e6),
            "dur": round((lane.end - lane.begin) * 1e6),
            "args": {"step": lane.step},
        }


def _counters(curve: Sequence[Mapping[str, Any]], begun: float) -> Iterator[dict[str, Any]]:
    """Sequences running and waiting on every worker, rollouts finished and tokens of all; where a strategy changed."""
    using: dict[int, str] = {}
    for point in curve:
        at = {"ts": round((point["time"] - begun) * 1e6)}
        yield at | {"name": "finished", "ph": "C", "pid": _process(-1), "args": {"rollouts": point["finished"]}}
        yield at | {"name": "tokens", "ph": "C", "pid": _process(-1), "args": {"tokens": point["tokens"]}}
        for each in point["workers"]:
            worker = each["worker"]
            own = at | {"pid": _process(worker)}
            counts = {"running": each["running"], "waiting": each["waiting"]}
            yield own | {"name": "sequences", "ph": "C", "args": counts}
            if each["running"] and using.get(worker) != each["strategy"]:
                using[worker] = each["strategy"]
                yield own | {"name": each["strategy"], "cat": "strategy", "ph": "i", "tid": 1, "s": "p"}

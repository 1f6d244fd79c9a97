"""A run's records in the shapes that the page draws: columns of numbers, no more of them than there are pixels."""

from collections import Counter
from itertools import pairwise
from typing import Any

from launch.monitor.catalogue import ACTIVITIES
from launch.monitor.exposition import phases
from launch.monitor.reader import RunReader
from launch.monitor.tail import Record

MAX_POINTS = 2000


def step_columns(reader: RunReader, *, after: int) -> dict[str, Any]:
    """Every number of the steps after a step, by name: lists of one length, null where a step has none.

    evals: step, stage and mean reward of every evaluation. phases: seconds by phase, what no phase covers as "other".
    """
    records = [record for record in reader.steps if record["step"] > after]
    names = dict.fromkeys(name for record in records for name, value in record.items() if _is_number(value))
    spent = [phases(record) for record in records]
    return {
        "columns": {name: [_number(record.get(name)) for record in records] for name in names},
        "phases": {
            name: [seconds.get(name, 0.0) for seconds in spent] for name in dict.fromkeys(n for s in spent for n in s)
        },
        "evals": [
            {"step": record["step"], "stage": record.get("stage"), "reward_mean": record.get("reward_mean")}
            for record in reader.evals
        ],
    }


def curve_columns(records: list[Record]) -> dict[str, Any]:
    """The rollouts of a step as they ran: time, finished, tokens, running and waiting, and each worker's strategy.

    Times are seconds since "begin". strategies: [worker, begin, end, strategy] of every stretch; thinning keeps them.
    """
    if not records:
        return {"begin": None, "total": 0, "time": [], "finished": [], "tokens": [], "running": [], "waiting": [],
                "strategies": []}  # fmt: skip
    begin = records[0]["time"]
    return {
        "begin": begin,
        "total": records[-1]["total"],
        "strategies": _strategies(records, begin),
        **_points(_thinned(records), begin),
    }


def _points(records: list[Record], begin: float) -> dict[str, list[float]]:
    return {
        "time": [round(record["time"] - begin, 3) for record in records],
        "finished": [record["finished"] for record in records],
        "tokens": [record["tokens"] for record in records],
        "running": [sum(worker["running"] for worker in record["workers"]) for record in records],
        "waiting": [sum(worker["waiting"] for worker in record["workers"]) for record in records],
    }


def _strategies(records: list[Record], begin: float) -> list[list[Any]]:
    """What each worker drafted with while it had sequences to run, as stretches without a change."""
    found: list[list[Any]] = []
    for place in range(max(len(record["workers"]) for record in records)):
        known = [(r["time"] - begin, r["workers"][place]) for r in records if place < len(r["workers"])]
        last: list[Any] = []
        for (start, doing), (end, _) in pairwise(known):
            strategy = doing["strategy"]
            if not doing["running"]:
                last = []
            elif last and last[3] == strategy:
                last[2] = round(end, 3)
            else:
                # lines of earlier versions hold no number
                last = [doing.get("worker", place), round(start, 3), round(end, 3), strategy]
                found.append(last)
    return found


def lane_spans(records: list[Record]) -> dict[str, Any]:
    """What every worker did in a step. spans: [lane, kind, begin, end], kind an index of kinds, seconds since "begin".

    workers: the lanes' workers, the driver's (-1) last. seconds: by kind, over all lanes but the driver's.
    """
    workers = sorted({record["worker"] for record in records}, key=lambda worker: (worker < 0, worker))
    begin = min((record["begin"] for record in records), default=None)
    seconds: Counter[str] = Counter()
    spans = []
    for record in records:
        if record["kind"] not in ACTIVITIES:
            continue
        start, end = record["begin"] - begin, record["end"] - begin
        spans.append(
            [workers.index(record["worker"]), ACTIVITIES.index(record["kind"]), round(start, 3), round(end, 3)]
        )
        if record["worker"] >= 0:
            seconds[record["kind"]] += end - start
    return {"begin": begin, "workers": workers, "kinds": ACTIVITIES, "spans": spans, "seconds": seconds}


def _thinned(records: list[Record]) -> list[Record]:
    """At most MAX_POINTS of them, evenly, the last included."""
    stride = -(-len(records) // MAX_POINTS)
    return records if stride == 1 else [*records[:-1:stride], records[-1]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return value if _is_number(value) else None

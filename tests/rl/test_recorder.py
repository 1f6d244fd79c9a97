"""What a run records while it goes on, and that this never holds it up."""

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from configs.schema import ComputeConfig, Config, RunConfig
from rl import recorder as module
from rl.recorder import DRIVER, Recorder
from rl.rundir import RunDir
from rl.trace import KEPT_TRACES
from rollout.types import Activity, Rollout, Sampling, Span, SpecStats

SAMPLING = Sampling(num_samples=1, max_new_tokens=4, stop_token_ids=(), seed=0, step=0)


class FakeEngine:
    """An engine of which one says what it does."""

    def __init__(self, *workers: Activity) -> None:
        self.workers = list(workers)

    def activity(self) -> list[Activity]:
        return self.workers


def make(run: RunDir, engine: FakeEngine, **compute: Any) -> Recorder:
    config = Config(compute=ComputeConfig(**compute))
    return Recorder(run, engine, config)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets time.time() to so many seconds."""
    now = [100.0]
    monkeypatch.setattr("rl.recorder.time.time", lambda: now[0])

    def show(seconds: float) -> None:
        now[0] = seconds

    return show


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(Config(run=RunConfig(dir=str(tmp_path / "run"))), "")


def lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    path = run.path / "metrics" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lanes(run: RunDir) -> list[tuple[int, str, float, float]]:
    return [(line["worker"], line["kind"], line["begin"], line["end"]) for line in lines(run, "lanes")]


async def rollouts(*waits: float) -> AsyncGenerator[Rollout]:
    """A rollout after each wait."""
    for number, wait in enumerate(waits):
        await asyncio.sleep(wait)
        yield Rollout("p", number, [1], [0.0], [(0, 1)], "stop", SpecStats(1, 0, 0))


async def drain(stream: AsyncGenerator[Rollout]) -> int:
    return len([rollout async for rollout in stream])


def test_the_curve_has_a_line_now_and_then_and_one_at_the_end(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CURVE_S", 0.01)
    working = Activity(step=0, running=3, waiting=1, tokens=40, strategy="suffix d4 k1 v4", cycles={"suffix": 9})
    stale = Activity(step=7, running=2, tokens=99)
    recorder = make(run, FakeEngine(working, stale))
    recorder.begin(1)

    async def slow_second() -> AsyncGenerator[Rollout]:
        async for rollout in rollouts(0.0, 0.0, 0.0):
            yield rollout
            while not any(point["finished"] for point in lines(run, "curve")):
                await asyncio.sleep(0.01)

    assert asyncio.run(drain(recorder.watched(slow_second(), SAMPLING, total=3))) == 3
    curve = lines(run, "curve")
    finished = [point["finished"] for point in curve]
    assert finished[0] == 0, "as the step begins"
    assert 1 in finished, "while the second is waited for"
    assert finished == sorted(finished) and finished[-1] == 3
    assert curve[0]["tokens"] == 40, "what a worker did in another step is none of this one's"
    assert curve[0]["workers"][0] == {
        "worker": 0,
        "running": 3,
        "waiting": 1,
        "strategy": "suffix d4 k1 v4",
        "cycles": {"suffix": 9},
        "preempted": 0,
        "tokens": 40,
    }
    assert all(point["step"] == 1 and point["total"] == 3 and "eval" not in point for point in curve)


def test_an_evaluation_is_marked(run: RunDir) -> None:
    recorder = make(run, FakeEngine(Activity()))
    asyncio.run(drain(recorder.watched(rollouts(0.0), replace(SAMPLING, step=-1), total=1)))
    assert lines(run, "curve")[0]["eval"] is True and lines(run, "curve")[0]["step"] == 0


def test_whoever_stops_listening_closes_the_stream(run: RunDir) -> None:
    recorder = make(run, FakeEngine(Activity()))
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Rollout]:
        try:
            async for rollout in rollouts(*[0.0] * 99):
                yield rollout
        finally:
            closed.set()

    async def listen() -> int:
        stream = recorder.watched(endless(), SAMPLING, total=99)
        await anext(stream)
        await stream.aclose()
        assert closed.is_set()
        return len(asyncio.all_tasks())

    assert asyncio.run(listen()) == 1, "nothing goes on watching"


def test_phases_become_spans_and_gaps_idle_time(run: RunDir, clock: Callable[[float], None]) -> None:
    engine = FakeEngine(Activity(), Activity())
    recorder = make(run, engine)
    watch = recorder.begin(1)
    engine.workers = [
        Activity(step=0, spans=(Span("prefill", 100.0, 101.0), Span("decode", 101.0, 104.0))),
        Activity(step=0, spans=(Span("decode", 100.0, 102.0), Span("drafter", 102.5, 104.0))),
    ]
    clock(104.0)
    with watch.phase("reward"):
        clock(105.0)
    with watch.phase("train"):
        clock(107.0)
    with watch.phase("eval"), recorder.span("eval"):  # what is inside another is part of it
        clock(108.0)
    recorder.end()
    told = lanes(run)
    assert [lane for lane in told if lane[0] == DRIVER] == [
        (DRIVER, "reward", 104.0, 105.0),
        (DRIVER, "eval", 107.0, 108.0),
    ]
    assert sorted(lane[1:] for lane in told if lane[0] == 0) == [
        ("decode", 101.0, 104.0),
        ("idle", 104.0, 105.0),
        ("idle", 107.0, 108.0),
        ("prefill", 100.0, 101.0),
        ("train", 105.0, 107.0),
    ]
    assert (1, "idle", 102.0, 102.5) in told and (1, "drafter", 102.5, 104.0) in told
    for worker in (0, 1, DRIVER):
        ends = sorted((begin, end) for number, _, begin, end in told if number == worker)
        assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False)), "they overlap"
    # what was told is not told again, and what is heard late belongs to the step in which it is heard
    recorder.begin(2)
    engine.workers[0] = replace(engine.workers[0], spans=(*engine.workers[0].spans, Span("decode", 108.0, 109.0)))
    clock(109.0)
    recorder.end()
    assert [line for line in lines(run, "lanes") if line["step"] == 2 and line["kind"] != "idle"] == [
        {"step": 2, "worker": 0, "kind": "decode", "begin": 108.0, "end": 109.0}
    ]


def test_workers_that_only_train_have_lanes_of_their_own(run: RunDir, clock: Callable[[float], None]) -> None:
    recorder = make(run, FakeEngine(Activity()), placement="separate", workers=2)
    watch = recorder.begin(1)
    asyncio.run(drain(recorder.watched(rollouts(0.0), SAMPLING, total=1)))
    assert [worker["worker"] for worker in lines(run, "curve")[0]["workers"]] == [2], "after those that train"
    for phase, end in (("drafter", 101.0), ("train", 102.0), ("sync", 103.0)):
        with watch.phase(phase):
            clock(end)
    told = lanes(run)
    assert told == [
        (2, "drafter", 100.0, 101.0),
        (0, "train", 101.0, 102.0),
        (1, "train", 101.0, 102.0),
        (0, "sync", 102.0, 103.0),
        (1, "sync", 102.0, 103.0),
        (2, "sync", 102.0, 103.0),
    ]
    recorder.end()
    assert {(worker, begin, end) for worker, kind, begin, end in lanes(run) if kind == "idle"} == {
        (0, 100.0, 101.0),
        (1, 100.0, 101.0),
        (2, 101.0, 102.0),
    }


def test_a_trace_holds_spans_and_counters_and_only_the_latest_are_kept(
    run: RunDir, clock: Callable[[float], None]
) -> None:
    strategies = iter(["off", "off", "suffix d4 k1 v4"])
    engine = FakeEngine(Activity())
    recorder = make(run, engine)
    watch = recorder.begin(1)

    async def sample() -> None:
        for strategy in strategies:
            engine.workers = [Activity(step=0, running=2, strategy=strategy, spans=(Span("decode", 100.0, 102.0),))]
            await drain(recorder.watched(rollouts(0.0), SAMPLING, total=1))

    asyncio.run(sample())
    clock(102.0)
    with watch.phase("train"):
        clock(103.5)
    recorder.end()
    with gzip.open(run.path / "trace" / "step_1.json.gz") as file:
        events = json.load(file)["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["decode"]["ts"] == 0 and spans["decode"]["dur"] == 2_000_000
    assert spans["train"]["ts"] == 2_000_000 and spans["train"]["dur"] == 1_500_000
    assert [event["name"] for event in events if event["ph"] == "i"] == ["off", "suffix d4 k1 v4"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"worker 0"}
    assert [event["args"]["running"] for event in events if event["name"] == "sequences"] == [2] * 6
    for step in range(2, KEPT_TRACES + 3):
        recorder.begin(step)
        recorder.end()
    kept = {int(path.name.split("_")[1].partition(".")[0]) for path in (run.path / "trace").iterdir()}
    assert kept == set(range(3, KEPT_TRACES + 3))


def test_a_resumed_run_records_each_step_once(run: RunDir) -> None:
    recorder = make(run, FakeEngine(Activity()))
    for step in (1, 2, 3):
        watch = recorder.begin(step)
        asyncio.run(drain(recorder.watched(rollouts(0.0), replace(SAMPLING, step=step - 1), total=1)))
        with watch.phase("train"):
            pass
        recorder.end()
    run.truncate_after(2)
    assert {line["step"] for name in ("curve", "lanes") for line in lines(run, name)} == {1, 2}
    assert sorted(path.name for path in (run.path / "trace").iterdir()) == ["step_1.json.gz", "step_2.json.gz"]


def test_what_cannot_be_written_is_missed_and_said_once(
    run: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = make(run, FakeEngine(Activity()))

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "open", full)
        patch.setattr(Path, "write_bytes", full)
        for step in (1, 2):
            watch = recorder.begin(step)
            asyncio.run(drain(recorder.watched(rollouts(0.0), SAMPLING, total=1)))
            with watch.phase("train"):
                pass
            recorder.end()
    assert [record.getMessage() for record in caplog.records] == [
        "curve, lanes and traces of this run are incomplete: [Errno 28] No space left on device"
    ]


def test_the_curve_of_a_step_of_half_a_second_has_points_and_that_of_a_long_one_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, looked = [0.0], [0.0]

    async def passes(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 3600.0:
            raise asyncio.CancelledError

    monkeypatch.setattr("rl.recorder.time.monotonic", lambda: now[0])
    monkeypatch.setattr("rl.recorder.asyncio.sleep", passes)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(module._again_and_again(lambda: looked.append(now[0])))
    waits = [after - before for before, after in pairwise(looked)]
    assert len([at for at in looked if at <= 0.5]) >= 8
    assert max(waits[: looked.index(next(at for at in looked if at > 50))]) <= 0.26, "four a second for a minute"
    assert max(waits) <= 1.01 and len(looked) < 4000

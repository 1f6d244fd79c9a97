"""The report of a run that failed: the first cause, wherever it was, and what to do next."""

import asyncio
import json
import pickle
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from configs.errors import DataError, RecoveryError
from configs.load import parse
from launch import noted
from launch.crash import Phases, post_mortem, read, write_report
from launch.fleet import WorkerLostError, silent
from launch.recovery import with_recoveries
from launch.status import describe
from rl.rundir import RunDir, read_status


class Silent:
    """A Progress that shows nothing."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def phase(self, name: str) -> None: ...

    def rollouts(self, done: int, total: int) -> None: ...

    def step(self, record: dict[str, float | int]) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None: ...


@noted.noting
class Worker:
    """Fails in every way a worker's method can."""

    def step(self) -> None:
        raise DataError("the batch is empty")

    async def learn(self) -> None:
        raise RuntimeError("a bug")

    async def generate(self) -> AsyncGenerator[int]:
        yield 1
        raise RuntimeError("a bug in a stream")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with RunDir.create(parse(f"run: {{dir: {tmp_path / 'run'}}}\ndata: {{name: x}}"), "") as created:
        yield created


def failure(number: int = 1) -> Exception:
    """What worker 1 raises, as it reaches the driver."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError) as caught:
        patch.setenv("RANK", str(number))
        Worker().step()
    error: Exception = pickle.loads(pickle.dumps(caught.value))
    return error


def test_an_error_says_where_it_was_raised_after_it_has_crossed_processes() -> None:
    found = noted.trace_of(failure())
    assert found is not None
    assert (found.process, found.call, found.error) == ("worker 1", "step", "DataError: the batch is empty")
    assert "raise DataError" in found.stack


def test_coroutines_and_streams_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")

    async def both() -> None:
        with pytest.raises(RuntimeError) as learning:
            await Worker().learn()
        with pytest.raises(RuntimeError) as streaming:
            assert [item async for item in Worker().generate()] == [1]
        for caught, call in ((learning, "learn"), (streaming, "generate")):
            found = noted.trace_of(caught.value)
            assert found is not None and found.call == call

    asyncio.run(both())


def test_the_first_cause_is_the_earliest_and_a_loss_goes_before_what_others_say_of_it() -> None:
    later, sooner = failure(1), failure(0)
    by_time = noted.earliest({0: later, 1: sooner}, lambda error: False)
    assert by_time is later  # it was made first
    assert [other.process for other in noted.followed(by_time)] == ["worker 0"]
    gone = WorkerLostError("worker 2 died")
    assert noted.earliest({0: later, 2: gone}, lambda error: isinstance(error, WorkerLostError)) is gone


def test_the_report_tells_the_worker_the_step_and_who_was_waited_for(run: RunDir) -> None:
    error = silent([1], "step", 60.0)
    error.__cause__ = failure(0)
    write_report(run, error, code=7, reason="spent", phase="train", step=3)
    report = read(run.path, 1)
    assert report is not None
    assert report["first"]["process"] == "worker 0" and report["waited_for"] == "worker 1 for step"
    assert (report["step"], report["phase"], report["code"]) == (3, "train", 7)
    assert report["next"] == [f"paceline resume {run.path}", f"paceline bundle {run.path}"]
    assert "raise DataError" in (run.logs / "crash.log").read_text()


def test_status_shows_the_first_cause(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(run, failure(), code=8, reason="the batch is empty", phase="train", step=3)
    run.write_exit(8, "the batch is empty")
    cells = [str(cell) for column in describe(read_status(run.path), run.path).columns for cell in column.cells]
    assert "DataError: the batch is empty" in cells
    assert any(cell.startswith("worker 1 (process") and "after step 3" in cell for cell in cells)


def test_an_attempt_that_was_killed_is_reported_by_the_next(tmp_path: Path, run: RunDir) -> None:
    run.write_status(state="running", step=2)
    before = read_status(run.path)
    run.begin_attempt()
    post_mortem(run, before)
    report = read(run.path, 1)
    assert report is not None and report["code"] is None and report["step"] == 2
    assert "without a word" in report["first"]["error"]
    run.write_exit(0, "done")
    after = read_status(run.path)
    run.begin_attempt()
    post_mortem(run, after)
    assert read(run.path, 2) is None


@pytest.fixture
def no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of an attempt would take the place of pytest's handlers."""
    monkeypatch.setattr("launch.recovery.log_run", lambda path, *, show: None)


@pytest.mark.usefixtures("no_logs")
def test_lost_workers_are_started_again_as_often_as_the_budget_says(run: RunDir) -> None:
    progress = Silent()
    recoveries: list[int] = []

    def attempt(recovery: int) -> None:
        recoveries.append(recovery)
        if recovery < 2:
            raise WorkerLostError(f"worker 1 died ({recovery}); resume the run")

    with_recoveries(attempt, run=run, budget=2, phases=Phases(progress))
    assert recoveries == [0, 1, 2] and run.attempt == 3
    assert [read(run.path, number) is not None for number in (1, 2, 3)] == [True, True, False]
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["cause"] for event in events if event["event"] == "recovery"] == [
        "worker 1 died (0)",
        "worker 1 died (1)",
    ]
    assert len(progress.messages) == 2


@pytest.mark.usefixtures("no_logs")
def test_past_the_budget_the_run_ends_and_other_errors_pass(run: RunDir) -> None:
    def lose(recovery: int) -> None:
        raise WorkerLostError("worker 1 died; resume the run")

    def fail(recovery: int) -> None:
        raise DataError("no rows")

    with pytest.raises(RecoveryError, match="2 times and run.max_recoveries=1"):
        with_recoveries(lose, run=run, budget=1, phases=Phases(Silent()))
    with pytest.raises(DataError):
        with_recoveries(fail, run=run, budget=1, phases=Phases(Silent()))


def test_an_error_raised_from_itself_is_told_once() -> None:
    error = RuntimeError("in a circle")
    error.__cause__ = error
    assert noted.trace_of(error) is None and noted.waited_for(error) is None

"""Several workers' learning and errors as one, without a cluster."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from drafter.gate_learner import GateJudgement, GateStanding
from drafter.report import DrafterReport, LearnStats, Replica
from launch import learners
from launch.adapters import on_all
from launch.fleet import Fleet, WorkerLostError
from launch.gate_learners import RayGateLessons
from launch.learners import RayLearner, merged
from rl.gate_lessons import Learned

REPORT = DrafterReport(
    num_steps=2,
    loss=1.0,
    train_accept_length=2.0,
    accept_length=2.5,
    served_accept_length=2.4,
    version=3,
    checksum="same",
    outcome="published",
    buffer_tokens=100,
    seconds=4.0,
    off="",
)


def test_reports_add_up_and_losses_weigh_by_steps() -> None:
    idle = replace(REPORT, num_steps=0, loss=math.nan, train_accept_length=math.nan)
    busy = replace(REPORT, num_steps=6, loss=2.0, train_accept_length=4.0)
    report = merged([idle, REPORT, busy])
    assert (report.num_steps, report.buffer_tokens, report.seconds) == (8, 300, 12.0)
    assert report.loss == pytest.approx(1.75) and report.train_accept_length == pytest.approx(3.5)
    assert (report.version, report.outcome, report.accept_length) == (3, "published", 2.5)


def test_nothing_learned_is_no_loss() -> None:
    report = merged([replace(REPORT, num_steps=0, loss=math.nan)] * 2)
    assert report.num_steps == 0 and math.isnan(report.loss)


def test_learning_is_off_only_where_it_is_off_everywhere() -> None:
    off = replace(REPORT, off="three failures")
    assert merged([off, REPORT]).off == ""
    assert merged([off, off]).off == "three failures"


def test_what_takes_all_workers_says_at_once_that_one_is_lost() -> None:
    fleet = Fleet([], slots=1, learns=False)
    fleet.lose(1, WorkerLostError("it died"))
    with pytest.raises(WorkerLostError, match="it died"):
        on_all([], fleet, "step", limit_s=1)


class Ref:
    """A reference to what a worker answers; None: it never does."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Handle:
    """A worker's handle: given answers by method, silence to everything else."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.called: list[str] = []

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


class Method:
    """One of its methods."""

    def __init__(self, handle: Handle, name: str) -> None:
        self.handle, self.name = handle, name

    def options(self, *, num_returns: int) -> "Method":
        return self

    def remote(self, *args: Any) -> Any:
        self.handle.called.append(self.name)
        answer = self.handle.answers.get(self.name)
        if callable(answer):
            answer = answer(*args)
        return (Ref(answer), Ref({})) if self.name == "delta" else Ref(answer)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray of Ref, in which every wait for silence is over at once."""

    def wait(refs: Sequence[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.answer is not None], [ref for ref in refs if ref.answer is None]

    def get(refs: Any) -> Any:
        return [ref.answer for ref in refs] if isinstance(refs, list) else refs.answer

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(learners, "DISMISS_S", 0.02)


def learner(*handles: Handle) -> RayLearner:
    fleet = Fleet([None for _ in handles], slots=1, learns=True)  # type: ignore[misc]
    return RayLearner(handles, fleet)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("silent", ["delta", "apply_deltas", "judge", "conclude"])
def test_workers_settle_without_one_that_hangs(silent: str) -> None:
    answers = {"delta": True, "apply_deltas": True, "judge": "good", "conclude": REPORT}
    well, hung = Handle(**answers), Handle(**(answers | {silent: None}))
    both = learner(well, hung)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "pooled", lambda judgements: judgements[0])
        assert both.settle(0) == REPORT
    assert list(both.fleet.lost) == [1]
    assert str(both.fleet.lost[1]).startswith(f"worker 1 has not answered {silent} for 600 s")
    assert hung.called[-1] == silent


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_hangs_is_not_waited_for_past_the_budget() -> None:
    learned = LearnStats(num_steps=3, seconds=0.5, step_s=0.1)
    both = learner(Handle(learn=learned, call_away=True), Handle())
    assert both.learn(budget_s=0.01, until=lambda: False) == learned
    assert "worker 1 has not answered call_away" in str(both.fleet.lost[1])


@pytest.mark.usefixtures("cluster")
def test_what_takes_all_workers_names_those_that_hang() -> None:
    workers = [Handle(), Handle(step=1), Handle()]
    fleet = Fleet([None for _ in workers], slots=1, learns=False)  # type: ignore[misc]
    with pytest.raises(WorkerLostError, match="workers 0, 2 have not answered step for 7 s"):
        on_all(workers, fleet, "step", limit_s=7)


REPLICA = Replica(3, {}, {}, {})


def serving(checksum: str, *, becomes: str | None = None, version: int = 3) -> Handle:
    """A worker that serves this head, and another one once it is given a replica."""
    report = replace(REPORT, version=version, checksum=checksum)
    return Handle(
        delta=False,
        judge="judged",
        conclude=report,
        replica=REPLICA,
        become=lambda copied, replica: (3, becomes or checksum),
        give_up=lambda copied, reason: (0, ""),
        save_drafter=0.001,
    )


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_serves_another_head_is_given_the_one_of_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "pooled", lambda judgements: judgements[0])
    odd = serving("odd", becomes="same", version=2)
    both = learner(odd, serving("same"), serving("same"))
    assert both.settle(0) == replace(REPORT, num_steps=6, buffer_tokens=300, seconds=12.0)
    assert odd.called[-1] == "become"
    assert "replica" in both.workers[1].called and "replica" not in both.workers[0].called + both.workers[2].called
    assert not any("give_up" in worker.called for worker in both.workers)


@pytest.mark.usefixtures("cluster")
def test_workers_that_cannot_serve_one_head_draft_with_none_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "pooled", lambda judgements: judgements[0])
    both = learner(serving("one"), serving("other"))
    report = both.settle(0)
    assert (report.version, report.checksum) == (0, "")
    assert "worker 0: v3 one, worker 1: v3 other" in report.off and "after they were given worker 0's" in report.off
    assert all(worker.called[-1] == "give_up" for worker in both.workers)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_still_learns_is_the_one_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "pooled", lambda judgements: judgements[0])
    off = serving("same")
    off.answers["conclude"] = replace(REPORT, off="3 failures")
    both = learner(off, serving("same"))
    assert both.settle(0).off == ""
    both.save(tmp_path)
    assert both.workers[1].called[-1] == "save_drafter" and "save_drafter" not in off.called


def gate_worker(**answers: Any) -> Handle:
    """A worker that learned twice, and serves the gates of version 1 then."""
    judgement = GateJudgement(GateStanding(0.6, 1.0), GateStanding(0.5, 1.0), 100)
    taught = {"learn_gates": Learned(5, (1.0, 0.5)), "delta": True, "apply_deltas": True, "judge_gates": judgement}
    return Handle(**(taught | {"conclude_gates": (1, "same"), "replica": REPLICA} | answers))


def gate_lessons(*handles: Handle) -> RayGateLessons:
    return RayGateLessons(handles, Fleet([None for _ in handles], slots=1, learns=False))  # type: ignore[misc]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("silent", ["learn_gates", "delta", "apply_deltas", "judge_gates", "conclude_gates"])
def test_gates_are_taught_without_a_worker_that_hangs(silent: str) -> None:
    well, hung = gate_worker(), gate_worker(**{silent: None})
    both = gate_lessons(well, hung)
    record = both.take()
    assert list(both.fleet.lost) == [1] and f"has not answered {silent} for 600 s" in str(both.fleet.lost[1])
    assert hung.called[-1] == silent
    share = 1 if silent == "learn_gates" else 2
    assert (record["gate_samples"], record["gate_updates"]) == (5 * share, 2 * share)
    assert (record["gate_version"], record["gate_loss"], record["gate_outcome"]) == (1, 0.75, "published")


@pytest.mark.usefixtures("cluster")
def test_a_worker_with_other_gates_is_given_those_of_most_or_all_stop_learning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = gate_worker(conclude_gates=(1, "odd"), become=lambda copied, replica: (1, "same"))
    usual = [gate_worker(become=lambda copied, replica: (1, "same")) for _ in range(2)]
    assert gate_lessons(odd, *usual).take()["gate_version"] == 1
    assert odd.called[-1] == "become" and "replica" in usual[0].called
    answers = {"give_up": lambda copied, reason: (1, "own")}
    differ = [
        gate_worker(conclude_gates=(1, name), become=lambda copied, replica, name=name: (1, name), **answers)
        for name in ("one", "other")
    ]
    gate_lessons(*differ).take()
    assert all(worker.called[-1] == "give_up" for worker in differ)
    assert "gates learn no more, and each worker drafts by its own: workers serve different gates" in caplog.text


@pytest.mark.usefixtures("cluster")
def test_gates_are_saved_by_a_worker_that_is_left(tmp_path: Path) -> None:
    workers = [gate_worker(), gate_worker(save_gates=True)]
    both = gate_lessons(*workers)
    both.fleet.lose(0, WorkerLostError("it died"))
    both.save(tmp_path, base_model="tiny")
    assert workers[1].called == ["save_gates"] and workers[0].called == []
    both.fleet.lose(1, WorkerLostError("it died too"))
    with pytest.raises(WorkerLostError, match="no worker is left that samples; the first to be lost: it died"):
        both.save(tmp_path, base_model="tiny")

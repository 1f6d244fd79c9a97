"""When the drafter learns: never for longer than it may, and never so that others wait."""

import asyncio
import json
import threading
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest
import torch

from configs.schema import DrafterConfig
from drafter.report import DrafterReport, LearnStats
from rl.lessons import MAX_SAVED, PREEMPT_S, Lessons, drafter_record
from rl.types import Group
from rollout.types import Prompt, Rollout, SpecStats

REPORT = DrafterReport(
    num_steps=0,
    loss=nan,
    train_accept_length=nan,
    accept_length=nan,
    served_accept_length=nan,
    version=0,
    checksum="",
    outcome="kept",
    buffer_tokens=64,
    seconds=0.0,
    off="",
)


class FakeLearner:
    """Takes steps of a given length within the budget it is given, without spending the time."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.known_s = 0.0  # as a real one, it cannot tell before its first step
        self.counts: list[torch.Tensor] = []
        self.budgets: list[float] = []
        self.versions: list[int] = []
        self.taught = threading.Event()

    def begin(self, counts: torch.Tensor) -> None:
        self.counts.append(counts)

    def learn(self, *, budget_s: float, until: Callable[[], bool]) -> LearnStats:
        self.budgets.append(budget_s)
        self.taught.set()
        if budget_s == inf:
            while not until():
                pass
            return LearnStats(1, 0.0, self.step_s)
        if budget_s <= self.known_s:
            return LearnStats(0, 0.0, self.known_s)
        self.known_s = self.step_s
        return LearnStats(max(1, int(budget_s / self.step_s)), 0.0, self.step_s)

    def settle(self, version: int) -> DrafterReport:
        self.versions.append(version)
        return REPORT

    def save(self, folder: Path) -> float:
        return 0.001

    def saved(self) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass


def lessons(learner: FakeLearner) -> Lessons:
    config = DrafterConfig(budget=0.1)
    return Lessons(learner, config, vocab_size=8)


def group(*responses: list[int]) -> Group:
    prompt = Prompt(id="p", token_ids=[1], answer="")
    rollouts = [
        Rollout("p", index, tokens, [0.0] * len(tokens), [(0, len(tokens))], "stop", SpecStats(1, 0, 0))
        for index, tokens in enumerate(responses)
    ]
    return Group(prompt=prompt, rollouts=rollouts, rewards=[0.0] * len(rollouts), advantages=[0.0] * len(rollouts))


def test_the_vocabulary_is_chosen_once_from_the_tokens_of_the_first_rollouts() -> None:
    learner = FakeLearner(0.01)
    taught = lessons(learner)
    taught.take([group([1, 1, 7], [7]), group([2])], version=0)
    taught.take([group([3])], version=0)
    assert [counts.tolist() for counts in learner.counts] == [[0, 2, 1, 0, 0, 0, 0, 2]]


def test_learning_is_paid_for_by_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.lessons.perf_counter", lambda: 0.0)  # the fake learner spends no time
    learner = FakeLearner(0.01)
    taught = lessons(learner)
    for version in range(3):
        taught.take([group([1])], version=version)
        taught.earn(2.0)
    assert learner.versions == [0, 1, 2], "each is judged by features of the policy that sampled its rollouts"
    first, *later = learner.budgets
    assert first == 0
    assert later == pytest.approx([0.2, 0.4]), "a tenth of each step's time, and what was not used"


def test_unused_time_is_not_saved_up_forever_but_one_long_step_is_paid_for_at_last() -> None:
    idle = lessons(FakeLearner(0.01))
    for _ in range(100):
        idle.earn(1.0)
    assert idle._allowance_s == pytest.approx(MAX_SAVED * 0.1)
    slow = FakeLearner(3.0)
    taught = lessons(slow)
    taught.earn(1.0)
    taught.take([group([1])], version=0)
    for _ in range(100):
        taught.earn(1.0)
    assert taught._allowance_s == pytest.approx(MAX_SAVED * 0.1 + 3.0)


def test_it_learns_while_rewards_are_awaited_and_stops_when_they_are_there() -> None:
    learner = FakeLearner(0.01)
    taught = lessons(learner)

    async def run() -> None:
        reward: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        taught.earn(1.0)
        taught.take([group([1])], version=0)
        learner.taught.clear()
        waiting = asyncio.create_task(taught.while_awaited([reward]))
        assert await asyncio.to_thread(learner.taught.wait, 300)
        assert not waiting.done()
        reward.set_exception(ValueError("a reward that fails"))
        await waiting
        assert reward.exception() is not None

    asyncio.run(run())
    assert learner.budgets[-1] == inf


def test_steps_too_long_to_be_called_away_from_never_run_while_rewards_are_awaited() -> None:
    learner = FakeLearner(2 * PREEMPT_S)
    taught = lessons(learner)

    async def run() -> None:
        reward: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        await taught.while_awaited([reward])  # before its first step nobody knows how long one takes
        taught.earn(10.0)
        taught.take([group([1])], version=0)
        await taught.while_awaited([reward])

    asyncio.run(asyncio.wait_for(run(), 300))
    assert inf not in learner.budgets


def test_a_resumed_run_goes_on_with_what_was_saved_up_and_does_not_tell_again_why_it_is_off() -> None:
    learner = FakeLearner(0.01)
    before, after = lessons(learner), lessons(learner)
    before.earn(2.0)
    before.off = "3 failures in a row"
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.off == before.off
    after.take([group([1])], version=0)
    assert learner.budgets == [pytest.approx(0.2)]


def test_a_record_holds_what_was_measured_and_why_the_drafter_is_off() -> None:
    assert drafter_record(REPORT) == {"drafter_version": 0, "drafter_steps": 0, "drafter_buffer_tokens": 64}
    fields = {name: getattr(REPORT, name) for name in REPORT.__slots__}
    report = DrafterReport(**fields | {"loss": 2.0, "off": "3 failures"})
    assert drafter_record(report)["drafter_off"] == "3 failures" and drafter_record(report)["drafter_loss"] == 2.0

"""When the drafter learns on hardware that it shares: while rewards are awaited, and for a budgeted share of the time.

It learns between the rollouts and the policy's update: until then the features are the present policy's, with the
output weights that made them.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from math import inf, isnan
from time import perf_counter
from typing import Any

import torch

from configs.schema import DrafterConfig
from drafter.report import DrafterReport
from rl.types import Group, Learner

PREEMPT_S = 0.05  # whoever waits for the hardware waits no longer: slower steps of learning are for the budget alone
MAX_SAVED = 4.0  # steps' budgets that may be saved up, beyond what one step of learning takes


class Lessons:
    """A run's lessons for its drafter."""

    def __init__(self, learner: Learner, config: DrafterConfig, *, vocab_size: int) -> None:
        self.learner = learner
        self.off = ""  # why it learns no more, as last reported
        self._config = config
        self._vocab_size = vocab_size
        self._begun = False
        self._allowance_s = 0.0
        self._step_s = inf  # what a step of learning takes; inf: none was taken yet

    async def while_awaited(self, scores: Sequence[asyncio.Future[Any]]) -> None:
        """Learn until all scores are there or failed, if a step is short enough to be called away from."""
        pending = [score for score in scores if not score.done()]
        if not pending or self._step_s > PREEMPT_S:
            return
        over = threading.Event()
        learning = asyncio.create_task(asyncio.to_thread(self.learner.learn, budget_s=inf, until=over.is_set))
        try:
            await asyncio.wait(pending)
        finally:
            over.set()
            await learning

    def take(self, groups: Sequence[Group], *, version: int) -> dict[str, Any]:
        """A step's lesson, once its rollouts are there and before the policy learns from them; its figures.

        version: of the policy that sampled them.
        """
        begun = perf_counter()
        if not self._begun:
            self.learner.begin(token_counts(groups, self._vocab_size))
            self._begun = True
        stats = self.learner.learn(budget_s=self._allowance_s, until=lambda: False)
        if stats.num_steps:
            self._step_s = stats.step_s
        report = self.learner.settle(version)
        self.off = report.off
        self._allowance_s -= perf_counter() - begun
        return drafter_record(report)

    def earn(self, seconds: float) -> None:
        """A step took so long, lessons included: what the next lesson may take."""
        earned = self._config.budget * seconds
        limit = MAX_SAVED * earned + (0.0 if self._step_s == inf else self._step_s)
        self._allowance_s = min(self._allowance_s + earned, limit)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from beside the learner's own state; JSON-able."""
        return {"off": self.off, "allowance_s": self._allowance_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.off, self._allowance_s = state["off"], state["allowance_s"]


def token_counts(groups: Sequence[Group], vocab_size: int) -> torch.Tensor:
    """How often each token was sampled, [V] int64."""
    token_ids = [token for group in groups for rollout in group.rollouts for token in rollout.token_ids]
    return torch.bincount(torch.tensor(token_ids, dtype=torch.int64), minlength=vocab_size)


def drafter_record(report: DrafterReport) -> dict[str, Any]:
    """The drafter's part of a step's record; what was not measured is left out."""
    record: dict[str, Any] = {
        "drafter_version": report.version,
        "drafter_steps": report.num_steps,
        "drafter_buffer_tokens": report.buffer_tokens,
        "drafter_loss": report.loss,
        "drafter_train_accept_length": report.train_accept_length,
        "drafter_accept_length": report.accept_length,
        "drafter_served_accept_length": report.served_accept_length,
    }
    record = {name: value for name, value in record.items() if not isnan(value)}
    return record | ({"drafter_off": report.off} if report.off else {})

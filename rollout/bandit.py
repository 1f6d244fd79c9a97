"""BEG-MAB, TLT's bucketed epsilon-greedy bandit: a group of strategies a batch range, and the best recent median."""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

from drafter.types import OFF, Strategy

if TYPE_CHECKING:
    from rollout.strategy import CycleReport

THRESHOLDS = (1, 8, 32)  # batch sizes from which the widest, the middle and the narrowest group are candidates
EPSILON = 0.1
WINDOW = 20


class BegMabChooser:
    """Bucketed epsilon-greedy over strategies grouped by how many tokens they verify.

    The group that verifies most serves batches from thresholds[0], the next one those from thresholds[1], and so on.
    A strategy's reward is (accepted / batch + 1) x batch / seconds; with probability epsilon a candidate is drawn at
    random, else the one with the largest median of its last window rewards is taken. What was never tried goes first.
    Off, where it is among the arms, is a candidate for every batch.
    Source: TLT (arXiv 2511.16665), its algorithm of the adaptive rollout engine.
    """

    def __init__(
        self,
        arms: Sequence[Strategy],
        *,
        seed: int,
        thresholds: Sequence[int] = THRESHOLDS,
        epsilon: float = EPSILON,
        window: int = WINDOW,
    ) -> None:
        widths = sorted({arm.num_verify for arm in arms if arm != OFF}, reverse=True)
        assert thresholds[0] <= 1 and all(low < high for low, high in pairwise(thresholds)), "thresholds rise from 1"
        assert 1 <= len(widths) <= len(thresholds), "each group needs a threshold"
        self._buckets = [
            (threshold, tuple(arm for arm in dict.fromkeys(arms) if arm.num_verify in (OFF.num_verify, width)))
            for threshold, width in zip(thresholds, widths, strict=False)
        ]
        self._arms = tuple(dict.fromkeys((OFF, *arms)))
        self.max_num_verify = max(arm.num_verify for arm in self._arms)
        self._rewards: dict[Strategy, deque[float]] = {arm: deque(maxlen=window) for arm in self._arms}
        self._chosen = dict.fromkeys(self._arms, 0)
        self._epsilon = epsilon
        self._random = Random(seed)

    def choose(self, *, batch: int, context: float) -> Strategy:
        """A candidate at random, or the one whose recent rewards have the largest median."""
        candidates = self._candidates(batch)
        if self._random.random() < self._epsilon:
            chosen = self._random.choice(candidates)
        else:
            chosen = max(candidates, key=self._value)
        self._chosen[chosen] += 1
        return chosen

    def observe(self, report: "CycleReport") -> None:
        """Remember the reward, tokens a second: not of a cycle that captured graphs, which is over once."""
        if report.capture_s:
            return
        accept_length = sum(report.accepted_by_depth) / report.batch + 1
        self._rewards[report.strategy].append(accept_length * report.batch / report.seconds)

    def policy_changed(self) -> None:
        """The window forgets by itself."""

    def drafter_changed(self, source: str) -> None:
        """Try the source's strategies as if for the first time."""
        for arm, rewards in self._rewards.items():
            if arm.source == source:
                rewards.clear()

    def summary(self) -> dict[str, Any]:
        """Shares of cycles, and the median rewards in tokens a second."""
        cycles = sum(self._chosen.values())
        arms = [
            {
                "source": arm.source,
                "depth": arm.depth,
                "num_verify": arm.num_verify,
                "share": self._chosen[arm] / max(1, cycles),
                "reward": median(self._rewards[arm]) if self._rewards[arm] else None,
            }
            for arm in self._arms
        ]
        return {"choice": "beg_mab", "cycles": cycles, "arms": arms}

    def _candidates(self, batch: int) -> tuple[Strategy, ...]:
        return [group for threshold, group in self._buckets if batch >= threshold][-1]

    def _value(self, arm: Strategy) -> float:
        rewards = self._rewards[arm]
        return median(rewards) if rewards else float("inf")

"""Which draft, and how long: what a chooser is asked and told, the arms it has, and the choosers by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from configs.schema import SpecConfig
from drafter.types import OFF, Strategy
from rollout.bandit import BegMabChooser
from rollout.goodput import GoodputChooser


@dataclass(frozen=True, slots=True)
class CycleReport:
    """What a cycle cost and brought.

    batch: running sequences; bucket: rows forwarded, padding included; context: mean tokens cached a sequence.
    committed: tokens, over the batch. proposed_by_depth and accepted_by_depth: drafted tokens d + 1 levels below the
    pending token, summed over the batch. rows_with_draft: sequences that had any.
    """

    strategy: Strategy
    batch: int
    bucket: int
    context: float
    seconds: float
    committed: int
    proposed_by_depth: Sequence[int]
    accepted_by_depth: Sequence[int]
    rows_with_draft: int


class Chooser(Protocol):
    """Chooses a strategy a cycle. What it chooses follows from what it was told, and cannot change a sample.

    max_num_verify: of all it may choose.
    """

    max_num_verify: int

    def choose(self, *, batch: int, context: float) -> Strategy:
        """The next cycle's strategy, for so many running sequences with so many tokens cached on average."""

    def observe(self, report: CycleReport) -> None:
        """A cycle is over, perhaps a cycle or two ago. Not every cycle is reported: prompts and captures distort."""

    def policy_changed(self) -> None:
        """The weights moved: what was accepted of their samples tells less of what will be."""

    def summary(self) -> dict[str, Any]:
        """What it knows and did, for logs and metrics: JSON-able."""


class FixedChooser:
    """Always the same strategy."""

    def __init__(self, strategy: Strategy) -> None:
        self.max_num_verify = strategy.num_verify
        self._strategy = strategy
        self._cycles = 0

    def choose(self, *, batch: int, context: float) -> Strategy:
        self._cycles += 1
        return self._strategy

    def observe(self, report: CycleReport) -> None:
        """Nothing can be learned."""

    def policy_changed(self) -> None:
        """Nothing was learned."""

    def summary(self) -> dict[str, Any]:
        """The strategy, and how often it was used."""
        strategy = self._strategy
        arm = {"source": strategy.source, "depth": strategy.depth, "num_verify": strategy.num_verify, "share": 1.0}
        return {"choice": "fixed", "cycles": self._cycles, "arms": [arm]}


def configured(spec: SpecConfig) -> Strategy:
    """The strategy that uses all the config allows. A chain has one node a level: it verifies at most depth."""
    if spec.source == "off":
        return OFF
    assert spec.source == "suffix", "no engine drafts from anything else yet"
    num_verify = min(spec.num_verify, spec.depth) if spec.top_k == 1 else spec.num_verify
    return Strategy(source=spec.source, depth=min(spec.depth, num_verify), top_k=spec.top_k, num_verify=num_verify)


def arms(spec: SpecConfig) -> tuple[Strategy, ...]:
    """What a chooser may choose from: off, the configured strategy, and at most two shorter ones, shortest first.

    A shorter one verifies the largest 2^k - 1 drafted tokens that are at most half of the next one's, so that a row
    forwards 2^k with the pending one; it is no deeper than that many tokens. spec.num_verify 15 gives 0, 3, 7, 15;
    6 gives 0, 1, 3, 6. Four at most: each costs a set of CUDA graphs.
    """
    found = [configured(spec)]
    if found[0] == OFF:
        return (OFF,)
    while len(found) < 3 and found[0].num_verify > 1:
        widest = found[0]
        num_verify = (1 << (widest.num_verify // 2 + 1).bit_length() - 1) - 1
        shorter = Strategy(widest.source, min(widest.depth, num_verify), widest.top_k, num_verify)
        found.insert(0, shorter)
    return (OFF, *found)


def make_chooser(spec: SpecConfig, *, device: str, seed: int) -> Chooser:
    """The chooser that spec.choice names.

    "auto" measures on a GPU. On a CPU it is fixed, so that equal inputs give equal batches and a resumed run the last
    bit of an uninterrupted one's. seed: of beg_mab's exploration.
    """
    choice = spec.choice
    if choice == "auto":
        choice = "goodput" if device.startswith("cuda") else "fixed"
    if spec.source == "off" or choice == "fixed":
        return FixedChooser(configured(spec))
    if choice == "beg_mab":
        return BegMabChooser(arms(spec), seed=seed)
    return GoodputChooser(arms(spec))

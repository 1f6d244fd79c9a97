"""Which draft, and how long: what a chooser is asked and told, the arms it has, and the choosers by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from configs.layers import runs
from configs.schema import SparseConfig, SpecConfig
from drafter.selfdraft import INNER_DEPTH, INNER_KEPT
from drafter.types import OFF, Strategy
from rollout.bandit import BegMabChooser
from rollout.costs import POLICY_ITSELF, SelfDrafting
from rollout.goodput import GoodputChooser
from rollout.lossy import window
from rollout.selectors import choice_of, share_of_cache

NOT_SPARSE = SparseConfig()
BITS_8 = 0.5  # bytes of a copy in eight bits, over those of bf16
SOURCES: tuple[Literal["suffix", "eagle"], ...] = ("suffix", "eagle")  # of spec.source=auto


@dataclass(frozen=True, slots=True)
class CycleReport:
    """What a cycle cost and brought.

    batch: running sequences; bucket: rows forwarded, padding included; context: mean tokens cached a sequence.
    committed: tokens, over the batch. proposed_by_depth and accepted_by_depth: drafted tokens d + 1 levels below the
    pending token, summed over the batch. rows_with_draft: sequences that had any. capture_s: of seconds, those in which
    its graphs were captured, and what they launch compiled; such a cycle's time tells nothing else.
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
    capture_s: float = 0.0


class Chooser(Protocol):
    """Chooses a strategy a cycle. What it chooses follows from what it was told, and cannot change a sample.

    max_num_verify: of all it may choose.
    """

    max_num_verify: int

    def choose(self, *, batch: int, context: float) -> Strategy:
        """The next cycle's strategy, for so many running sequences with so many tokens cached on average."""

    def observe(self, report: CycleReport) -> None:
        """A cycle is over, perhaps a cycle or two ago. Not every cycle is reported: prompts distort."""

    def policy_changed(self) -> None:
        """The weights moved: what was accepted of their samples tells less of what will be."""

    def drafter_changed(self, source: str) -> None:
        """A source drafts with other weights: what was accepted of its drafts tells nothing of what will be."""

    def summary(self) -> dict[str, Any]:
        """What it knows and did, for logs and metrics: JSON-able."""


class FixedChooser:
    """Always the same strategy; of several, each for its share of the cycles."""

    def __init__(self, *strategies: Strategy) -> None:
        assert strategies
        self.max_num_verify = max(strategy.num_verify for strategy in strategies)
        self._chosen = dict.fromkeys(strategies, 0)

    def choose(self, *, batch: int, context: float) -> Strategy:
        # by what has been said, not by a count of cycles: a resumed run begins with no count, and must choose alike
        turn = round(batch * context) % len(self._chosen)
        strategy = list(self._chosen)[turn]
        self._chosen[strategy] += 1
        return strategy

    def observe(self, report: CycleReport) -> None:
        """Nothing can be learned."""

    def policy_changed(self) -> None:
        """Nothing was learned."""

    def drafter_changed(self, source: str) -> None:
        """Nothing was learned."""

    def summary(self) -> dict[str, Any]:
        """The strategies, and how often each was used."""
        cycles = sum(self._chosen.values())
        arms = [
            {"source": arm.source, "depth": arm.depth, "num_verify": arm.num_verify, "share": count / max(1, cycles)}
            for arm, count in self._chosen.items()
        ]
        return {"choice": "fixed", "cycles": cycles, "arms": arms}


class BelowChooser:
    """Another chooser's choice while fewer sequences run than a limit, and none drafted from there on.

    Source: TLT (arXiv 2511.16665), whose engine speculates for the long tail alone.
    """

    def __init__(self, inner: Chooser, *, below: int) -> None:
        self.max_num_verify = inner.max_num_verify
        self._inner = inner
        self._below = below
        self._cycles_above = 0

    def choose(self, *, batch: int, context: float) -> Strategy:
        """Off at the limit and above."""
        if batch < self._below:
            return self._inner.choose(batch=batch, context=context)
        self._cycles_above += 1
        return OFF

    def observe(self, report: CycleReport) -> None:
        """What cycles cost and brought, plain ones too."""
        self._inner.observe(report)

    def policy_changed(self) -> None:
        """The weights moved."""
        self._inner.policy_changed()

    def drafter_changed(self, source: str) -> None:
        """A source drafts with other weights."""
        self._inner.drafter_changed(source)

    def summary(self) -> dict[str, Any]:
        """What the other chooser did below the limit, and the cycles it was not asked in."""
        return {**self._inner.summary(), "below": self._below, "cycles_above": self._cycles_above}


def configured(spec: SpecConfig, sparse: SparseConfig = NOT_SPARSE) -> tuple[Strategy, ...]:
    """The strategy of each source that uses all the config allows; off alone where there is none.

    A chain has one node a level: it verifies at most depth. The policy under sparse attention drafts chains; where
    they are to stand (sparse.mode=rectified), of one length.
    """
    strategies: list[Strategy] = []
    if spec.source != "off":
        sources = SOURCES if spec.source == "auto" else (spec.source,)
        num_verify = min(spec.num_verify, spec.depth) if spec.top_k == 1 else spec.num_verify
        depth = min(spec.depth, num_verify)
        strategies += [Strategy(source, depth, spec.top_k, num_verify) for source in sources]
    if sparse.mode == "draft":
        strategies.append(Strategy("sparse", sparse.depth, 1, sparse.depth))
    elif sparse.mode == "rectified":
        strategies.append(window(sparse.every))
    return tuple(strategies) or (OFF,)


def arms(spec: SpecConfig, sparse: SparseConfig = NOT_SPARSE) -> tuple[Strategy, ...]:
    """What a chooser may choose from: off, and by source the configured strategy after two shorter ones at most.

    A shorter one verifies the largest 2^k - 1 drafted tokens that are at most half of the next one's, so that a row
    forwards 2^k with the pending one; it is no deeper than that many tokens. spec.num_verify 15 gives 0, 3, 7, 15;
    6 gives 0, 1, 3, 6. Four widths at most: each costs a set of CUDA graphs, which sources share.
    """
    found = configured(spec, sparse)
    return (OFF,) if found == (OFF,) else (OFF, *(arm for strategy in found for arm in _shorter(strategy)))


def _shorter(strategy: Strategy) -> list[Strategy]:
    """The strategy after those that halve it, shortest first."""
    found = [strategy]
    while len(found) < 3 and found[0].num_verify > 1:
        widest = found[0]
        num_verify = (1 << (widest.num_verify // 2 + 1).bit_length() - 1) - 1
        found.insert(0, replace(widest, depth=min(widest.depth, num_verify), num_verify=num_verify))
    return found


def self_drafting(sparse: SparseConfig, num_layers: int) -> SelfDrafting:
    """What a round of drafting of a policy of so many layers is expected to take, before any has been timed."""
    budgets: list[int] = []
    for layers, each in runs(sparse, num_layers):
        budgets += [choice_of(each).budget_blocks * each.block_tokens] * len(layers)
    has_inner = sparse.inner != "off"
    return SelfDrafting(
        tokens=1 + INNER_DEPTH if has_inner else 1,
        kept=INNER_KEPT if has_inner else 1,
        weights=1.0 if sparse.weights == "policy" else BITS_8,
        cached=round(sum(budgets) / max(1, len(budgets))),
        cached_share=sparse.budget_share,
        described=share_of_cache(sparse, num_layers, itemsize=2),  # of 16 bits, as BITS_8
        dense=1 - len(budgets) / num_layers,
    )


def make_chooser(
    spec: SpecConfig, *, device: str, seed: int, sparse: SparseConfig = NOT_SPARSE, num_layers: int = 1
) -> Chooser:
    """The chooser that spec.choice names, below spec.below sequences.

    "auto" measures on a GPU. On a CPU it is fixed, so that equal inputs give equal batches and a resumed run the last
    bit of an uninterrupted one's. seed: of beg_mab's exploration. num_layers: of the policy, in which sparse holds.
    """
    if configured(spec, sparse) == (OFF,):
        return FixedChooser(OFF)
    if sparse.mode == "rectified":  # how long a window is decides what is sampled
        return FixedChooser(*configured(spec, sparse))
    choice = spec.choice
    if choice == "auto":
        choice = "goodput" if device.startswith("cuda") else "fixed"
    chooser: Chooser
    if choice == "fixed":
        chooser = FixedChooser(*configured(spec, sparse))
    elif choice == "beg_mab":
        # with a limit it is TLT's policy: below it something is always drafted
        chooser = BegMabChooser(arms(spec, sparse)[1 if spec.below else 0 :], seed=seed)
    else:
        itself = self_drafting(sparse, num_layers) if sparse.mode == "draft" else POLICY_ITSELF
        chooser = GoodputChooser(arms(spec, sparse), self_drafting=itself)
    return BelowChooser(chooser, below=spec.below) if spec.below else chooser

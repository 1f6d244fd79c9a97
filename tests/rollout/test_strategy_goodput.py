"""The goodput chooser against simulated engines whose costs and acceptance are known."""

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean

import pytest

from drafter.types import OFF, Strategy
from rollout.goodput import GoodputChooser
from rollout.graphs import bucket
from rollout.strategy import CycleReport

ARMS = (OFF, *(Strategy("suffix", depth=min(8, width), top_k=3, num_verify=width) for width in (3, 7, 15)))
BOTH = (*ARMS, *(replace(arm, source="eagle") for arm in ARMS[1:]))
BATCHES = (1, 2, 8, 32, 128, 256)
CYCLES = 2000
SEEDS = range(5)
LEARNING = 100  # cycles granted before the best arm must lead


@dataclass
class World:
    """A device that forwards rows and a drafter that is right with a certain probability at each depth.

    floor, per_token and per_cached are milliseconds; drafting costs draft_ms. acceptance: of each drafted token whose
    parent was accepted; coverage: of rows. Reports come delay cycles late; noise is the timings' relative deviation.
    """

    acceptance: float = 0.0
    coverage: float = 1.0
    floor: float = 2.0
    per_token: float = 0.015
    per_cached: float = 2e-6
    draft_ms: float = 0.05
    noise: float = 0.1
    delay: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def seconds(self, arm: Strategy, batch: int, context: float) -> float:
        rows = bucket(batch)
        forward = max(self.floor, rows * (1 + arm.num_verify) * self.per_token + self.floor / 4)
        return 1e-3 * (forward + rows * context * self.per_cached + (self.draft_ms if arm != OFF else 0.0))

    def tokens(self, arm: Strategy) -> float:
        """Expected tokens a row."""
        return 1 + self.coverage * gain(self.acceptance, arm.depth)

    def rates(self, batch: int, context: float, arms: Sequence[Strategy] = ARMS) -> dict[Strategy, float]:
        """Expected tokens a second of each arm."""
        return {arm: batch * self.tokens(arm) / self.seconds(arm, batch, context) for arm in arms}

    def run(self, arm: Strategy, batch: int, context: float) -> CycleReport:
        drafted = self._binomial(batch, self.coverage) if arm != OFF else 0
        accepted: list[int] = []
        alive = drafted
        for _ in range(max(arm.depth, 1)):
            alive = self._binomial(alive, self.acceptance)
            accepted.append(alive)
        off = arm == OFF
        return CycleReport(
            strategy=arm,
            batch=batch,
            bucket=bucket(batch),
            context=context,
            seconds=self.seconds(arm, batch, context) * max(0.3, self._random.gauss(1, self.noise)),
            committed=batch + (0 if off else sum(accepted)),
            proposed_by_depth=[0 if off else drafted] * arm.depth,
            accepted_by_depth=[] if off else accepted,
            rows_with_draft=0 if off else drafted,
        )

    def _binomial(self, count: int, share: float) -> int:
        if count > 40:  # nearly normal, and much faster drawn so
            drawn = round(self._random.gauss(count * share, (count * share * (1 - share)) ** 0.5))
            return min(count, max(0, drawn))
        return sum(self._random.random() < share for _ in range(count))


@cache
def gain(acceptance: float, depth: int) -> float:
    """Drafted tokens that a row with a draft is expected to accept."""
    return sum(acceptance**level for level in range(1, depth + 1))


@dataclass
class Outcome:
    """time: expected seconds spent, over those that plain decoding takes for the tokens expected of it.

    regret: the same over the best arm's, less 1. near_best: whether no arm was better by more than a tenth.
    """

    chosen: list[Strategy] = field(default_factory=list)
    near_best: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    off_seconds: float = 0.0
    best_seconds: float = 0.0

    @property
    def time(self) -> float:
        return self.seconds / self.off_seconds

    @property
    def regret(self) -> float:
        return self.seconds / self.best_seconds - 1


@dataclass
class TwoSources:
    """A device on which two drafters may be asked: each a world that differs in its drafts alone."""

    suffix: World
    eagle: World
    delay: int = 2

    def of(self, arm: Strategy) -> World:
        return self.eagle if arm.source == "eagle" else self.suffix

    def seconds(self, arm: Strategy, batch: int, context: float) -> float:
        return self.of(arm).seconds(arm, batch, context)

    def tokens(self, arm: Strategy) -> float:
        return self.of(arm).tokens(arm)

    def rates(self, batch: int, context: float) -> dict[Strategy, float]:
        return self.suffix.rates(batch, context) | self.eagle.rates(batch, context, BOTH[len(ARMS) :])

    def run(self, arm: Strategy, batch: int, context: float) -> CycleReport:
        return self.of(arm).run(arm, batch, context)


def play(
    chooser: GoodputChooser,
    world: World | TwoSources,
    loads: Iterator[tuple[int, float]],
    event: Callable[[int], None] = lambda cycle: None,
) -> Outcome:
    """Cycles of these (batch, context), reported late; event runs before each."""
    outcome = Outcome()
    late: deque[CycleReport] = deque()
    for cycle, (batch, context) in enumerate(loads):
        event(cycle)
        arm = chooser.choose(batch=batch, context=context)
        late.append(world.run(arm, batch, context))
        if len(late) > world.delay:
            chooser.observe(late.popleft())
        rates, tokens = world.rates(batch, context), world.tokens(arm)
        best_rate = max(rates.values())
        outcome.chosen.append(arm)
        outcome.near_best.append(rates[arm] >= 0.9 * best_rate)
        outcome.seconds += world.seconds(arm, batch, context)
        outcome.off_seconds += tokens * world.seconds(OFF, batch, context)
        outcome.best_seconds += tokens * batch / best_rate
    return outcome


def steady(batch: int, cycles: int = CYCLES) -> Iterator[tuple[int, float]]:
    return ((batch, 200.0 + cycle) for cycle in range(cycles))


@cache
def steadily(batch: int, *, acceptance: float, noise: float = 0.1, seed: int = 1) -> Outcome:
    """Cycles of one batch size in one world."""
    return play(GoodputChooser(ARMS), World(acceptance=acceptance, noise=noise, seed=seed), steady(batch))


def shrinking(cycles: int = CYCLES) -> Iterator[tuple[int, float]]:
    """The long tail: 256 sequences, of which fewer and fewer are left."""
    return ((max(1, round(256 * (1 - cycle / cycles) ** 3)), 100.0 + cycle) for cycle in range(cycles))


@pytest.mark.parametrize("coverage", [0.0, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_drafts_that_never_match_cost_at_most_one_percent(batch: int, coverage: float) -> None:
    outcome = play(GoodputChooser(ARMS), World(coverage=coverage), steady(batch))
    assert outcome.time <= 1.01


@pytest.mark.parametrize("draft_ms", [0.05, 1.0])
def test_drafts_that_never_match_cost_little_while_the_batch_shrinks(draft_ms: float) -> None:
    outcome = play(GoodputChooser(ARMS), World(draft_ms=draft_ms), shrinking())
    assert outcome.time <= 1.01


@pytest.mark.parametrize("acceptance", [0.02, 0.1, 0.3, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("batch", [*BATCHES, None])
def test_never_loses_to_plain_decoding(batch: int | None, acceptance: float) -> None:
    if batch is None:
        outcome = play(GoodputChooser(ARMS), World(acceptance=acceptance), shrinking())
    else:
        outcome = steadily(batch, acceptance=acceptance)
    assert outcome.time <= 1.01


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_best_arm_runs_nearly_always_where_it_is_clearly_better(batch: int, acceptance: float, noise: float) -> None:
    settled: list[bool] = []
    by_chance = noise > 0 or 0 < acceptance < 1  # or else every seed plays the same
    for seed in SEEDS if by_chance else SEEDS[:1]:
        settled += steadily(batch, acceptance=acceptance, noise=noise, seed=seed).near_best[LEARNING:]
    assert sum(settled) >= 0.95 * len(settled)


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_noisy_timings_cost_few_percent_of_the_best(batch: int, acceptance: float) -> None:
    outcomes = [steadily(batch, acceptance=acceptance, noise=0.1, seed=seed) for seed in SEEDS]
    assert mean(outcome.regret for outcome in outcomes) <= 0.025


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_shrinking_batch_runs_near_the_best_arm_of_every_size(acceptance: float) -> None:
    outcome = play(GoodputChooser(ARMS), World(acceptance=acceptance), shrinking())
    assert outcome.regret <= 0.04
    assert outcome.chosen[0] == OFF
    assert outcome.chosen[-1] != OFF


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.8), (0.8, 0.0), (0.1, 0.7)])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_adapts_within_a_hundred_cycles_of_a_policy_change(batch: int, before: float, after: float) -> None:
    settled: list[bool] = []
    for seed in SEEDS:
        world, chooser = World(acceptance=before, noise=0.03, seed=seed), GoodputChooser(ARMS)

        def change(cycle: int, world: World = world, chooser: GoodputChooser = chooser) -> None:
            if cycle == CYCLES // 2:
                world.acceptance = after
                chooser.policy_changed()

        outcome = play(chooser, world, steady(batch, CYCLES // 2 + 400), change)
        settled += outcome.near_best[CYCLES // 2 + LEARNING :]
    assert sum(settled) >= 0.9 * len(settled)


def test_follows_acceptance_that_drifts_unannounced() -> None:
    world, chooser = World(acceptance=0.0, noise=0.03), GoodputChooser(ARMS)

    def drift(cycle: int) -> None:
        world.acceptance = min(0.8, cycle / CYCLES)

    outcome = play(chooser, world, steady(8, 2 * CYCLES), drift)
    late = outcome.near_best[3 * CYCLES // 2 :]
    assert sum(late) >= 0.95 * len(late)


@pytest.mark.parametrize(("suffix", "eagle"), [(0.0, 0.7), (0.3, 0.8), (0.7, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("batch", [1, 8, 32, 256])
def test_the_better_of_two_sources_leads_and_neither_loses_to_plain_decoding(
    batch: int, suffix: float, eagle: float
) -> None:
    settled: list[bool] = []
    for seed in SEEDS:
        world = TwoSources(
            World(acceptance=suffix, coverage=0.6, noise=0.03, seed=seed),
            World(acceptance=eagle, draft_ms=0.4, noise=0.03, seed=seed + 100),
        )
        outcome = play(GoodputChooser(BOTH), world, steady(batch))
        assert outcome.time <= 1.01
        settled += outcome.near_best[LEARNING:]
    assert sum(settled) >= 0.9 * len(settled)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_a_head_that_is_published_takes_the_lead_within_a_hundred_cycles(batch: int) -> None:
    settled: list[bool] = []
    for seed in SEEDS:
        eagle = World(acceptance=0.0, coverage=0.0, draft_ms=0.2, noise=0.03, seed=seed + 100)
        world = TwoSources(World(acceptance=0.4, coverage=0.5, noise=0.03, seed=seed), eagle)
        chooser = GoodputChooser(BOTH)

        def publish(cycle: int, eagle: World = eagle, chooser: GoodputChooser = chooser) -> None:
            if cycle == CYCLES // 2:
                eagle.acceptance, eagle.coverage = 0.8, 1.0
                chooser.drafter_changed("eagle")

        outcome = play(chooser, world, steady(batch, CYCLES // 2 + 400), publish)
        settled += outcome.near_best[CYCLES // 2 + LEARNING :]
    assert sum(settled) >= 0.9 * len(settled)


def test_one_absurd_time_changes_nothing() -> None:
    world, chooser = World(acceptance=0.8, noise=0.0, delay=0), GoodputChooser(ARMS)
    play(chooser, world, steady(4))
    rates = world.rates(4, 0)
    chooser.observe(replace(world.run(max(rates, key=rates.__getitem__), 4, CYCLES), seconds=30.0))
    outcome = play(chooser, world, steady(4, 50))
    assert sum(outcome.near_best) >= 45


def test_equal_reports_give_equal_choices() -> None:
    runs = [play(GoodputChooser(ARMS), World(acceptance=0.5, seed=7), shrinking()) for _ in range(2)]
    assert runs[0].chosen == runs[1].chosen


def test_summary_is_json_and_tells_shares_times_and_acceptance() -> None:
    chooser = GoodputChooser(ARMS)
    outcome = play(chooser, World(acceptance=0.7, noise=0.02), steady(2))
    summary = json.loads(json.dumps(chooser.summary()))
    assert [arm["share"] for arm in summary["arms"]] == [outcome.chosen.count(arm) / CYCLES for arm in ARMS]
    assert summary["arms"][0]["seconds"]["2"] == pytest.approx(World().seconds(OFF, 2, CYCLES), rel=0.05)
    assert summary["sources"]["suffix"]["acceptance"][0] == pytest.approx(0.7, abs=0.1)
    assert summary["sources"]["suffix"]["coverage"] == pytest.approx(1.0)

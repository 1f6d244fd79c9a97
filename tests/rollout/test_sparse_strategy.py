"""When the policy drafts for itself: beside which sources, and only where the cache is large beside the weights."""

import random
from dataclasses import replace

import pytest

from configs.schema import LayersConfig, SparseConfig, SpecConfig
from drafter.types import OFF, Strategy
from rollout.costs import CostTable, SelfDrafting
from rollout.graphs import bucket
from rollout.strategy import CycleReport, FixedChooser, arms, configured, make_chooser, self_drafting

DRAFT = SparseConfig(mode="draft", selector="streaming", depth=8, budget_tokens=1024)
WEIGHTS_S, TOKEN_S, CACHED_S = 3e-3, 2.3e-5, 2.3e-8  # of a cycle: the weights once, a token forwarded, one attended to


def seconds(arm: Strategy, rows: int, context: float, config: SparseConfig = DRAFT) -> float:
    """A memory-bound cycle: each forward reads the weights, and of the cache what it attends to."""
    dense = WEIGHTS_S + rows * ((1 + arm.num_verify) * TOKEN_S + context * CACHED_S)
    if arm.source != "sparse":
        return dense
    read = min(context, max(config.budget_tokens, config.budget_share * context))
    read += context / 16 if config.selector == "quest" else 0.0
    weights_s = WEIGHTS_S if config.weights == "policy" else WEIGHTS_S / 2
    rounds, tokens = (arm.num_verify, 1) if config.inner == "off" else (-(-arm.num_verify // 2), 4)
    return dense + rounds * (weights_s + rows * (tokens * TOKEN_S + read * CACHED_S))


def played(
    *,
    rows: int,
    context: float,
    acceptance: float,
    cycles: int = 1500,
    config: SparseConfig = DRAFT,
    capture_s: float = 0.0,
) -> tuple[float, float]:
    """Of the last two thirds of cycles: the share drafted sparsely, and tokens a second over plain decoding's.

    capture_s: that an arm's first cycle takes besides.
    """
    chooser = make_chooser(SpecConfig(source="off"), device="cuda", seed=0, sparse=config)
    chance = random.Random(1)
    captured: set[Strategy] = set()
    sparse, spent, tokens = 0, 0.0, 0.0
    for cycle in range(cycles):
        arm = chooser.choose(batch=rows, context=context)
        accepted, alive = [], rows if arm != OFF else 0
        for _ in range(arm.depth):
            alive = sum(chance.random() < acceptance for _ in range(alive))
            accepted.append(alive)
        if cycle >= cycles // 3:
            sparse += arm.source == "sparse"
            spent += seconds(arm, rows, context, config)
            tokens += rows * sum(acceptance**depth for depth in range(arm.depth + 1))
        captures_s = 0.0 if arm in captured else capture_s
        captured.add(arm)
        chooser.observe(
            CycleReport(
                strategy=arm,
                batch=rows,
                bucket=bucket(rows),
                context=context,
                seconds=seconds(arm, rows, context, config) * chance.gauss(1, 0.05) + captures_s,
                committed=rows + sum(accepted),
                proposed_by_depth=[rows] * arm.depth,
                accepted_by_depth=accepted,
                rows_with_draft=rows if arm != OFF else 0,
                capture_s=captures_s,
            )
        )
    return sparse / (cycles - cycles // 3), tokens / spent * seconds(OFF, rows, context) / rows


def test_it_drafts_where_the_cache_outweighs_the_weights() -> None:
    # at 64k tokens the cache of 16 rows takes eight times what the weights do
    share, speedup = played(rows=16, context=64_000, acceptance=0.9)
    assert share > 0.9 and speedup > 2.0


def test_it_stays_off_where_the_cache_is_small() -> None:
    share, speedup = played(rows=16, context=2_000, acceptance=0.9)
    assert share < 0.05 and speedup > 0.98


@pytest.mark.parametrize("context", [500.0, 1_000.0, 2_000.0])
def test_what_it_tries_there_is_known_to_be_dear(context: float) -> None:
    # unpriced, the first cycles are 5 to 10 % slower than plain ones
    _, speedup = played(rows=16, context=context, acceptance=0.9, cycles=30, capture_s=0.5)
    assert speedup > 0.965


def test_its_drafts_are_priced_before_they_are_tried() -> None:
    tokens, shorter = [1, 9, 9], [0, 0, 0]
    table = CostTable(tokens, shorter, rounds=[0, 0, 8], drafting=SelfDrafting(cached=1024))
    for context in (1_000.0, 100_000.0):
        for cycle in range(4):
            table.observe(0, 16, context, seconds(OFF, 16, context), cycle)
    short, long = (table.seconds(16, context) for context in (1_000.0, 100_000.0))
    assert short[2] > 5 * short[1], "eight forwards that each read the weights"
    assert long[2] < 3 * long[1], "eight forwards that leave most of the cache unread"


CONFIGS = (
    DRAFT,
    replace(DRAFT, inner="suffix"),
    replace(DRAFT, weights="int8"),
    replace(DRAFT, budget_share=0.1),
    replace(DRAFT, selector="quest"),
    replace(DRAFT, selector="quest", inner="suffix", weights="fp8", budget_share=0.1, depth=16),
)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("context", [1_000.0, 64_000.0])
def test_the_first_price_of_its_drafts_follows_the_config(config: SparseConfig, context: float) -> None:
    arm, itself = configured(SpecConfig(source="off"), config)[0], self_drafting(config, 1)
    rounds = [0, itself.rounds(arm.num_verify)]
    table = CostTable([1, 1 + arm.num_verify], [0, 0], rounds=rounds, drafting=itself)
    table.observe(0, 16, context, seconds(OFF, 16, context), 0)
    assert table.seconds(16, context)[1] == pytest.approx(seconds(arm, 16, context, config), rel=0.1)


def test_the_first_price_counts_what_each_layer_reads() -> None:
    dense, little = LayersConfig("dense"), LayersConfig(budget_tokens=256)
    found = self_drafting(replace(DRAFT, dense_layers=1, layers={"2-3": little}), 4)
    assert (found.cached, found.dense, found.described) == ((1024 + 2 * 256) // 3, 0.25, 0.0)
    found = self_drafting(replace(DRAFT, layers={"0": dense, "1": LayersConfig("quest")}), 4)
    assert (found.cached, found.dense, found.described) == (1024, 0.25, 1 / 64)
    read = 64_000 * (1 / 4 + 1 / 64) + 1024 * 3 / 4
    expected = SelfDrafting(cached=round(read)).shape(16, 64_000.0)
    assert found.shape(16, 64_000.0) == pytest.approx(expected)
    everything = self_drafting(replace(DRAFT, dense_layers=4), 4)
    assert everything.shape(1, 5_000.0) == SelfDrafting(cached=5_000).shape(1, 5_000.0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("capture_s", [0.0, 0.5])
def test_its_price_does_not_keep_drafts_that_pay_from_their_first_try(config: SparseConfig, capture_s: float) -> None:
    # one row, whose cache is half the weights where they are eight bits and an inner drafter helps, and twice else
    cheap = config.inner != "off" and config.weights != "policy"
    context = 64_000.0 if cheap else 256_000.0
    arm = configured(SpecConfig(source="off"), config)[0]
    gain = sum(0.95**depth for depth in range(arm.depth + 1)) * seconds(OFF, 1, context)
    assert gain > 1.3 * seconds(arm, 1, context, config), "it would not pay: the test shows nothing"
    share, speedup = played(rows=1, context=context, acceptance=0.95, config=config, capture_s=capture_s)
    assert share > 0.8 and speedup > 1.2


def test_a_source_that_drafts_otherwise_is_not_priced_by_it() -> None:
    table = CostTable([1, 9, 9], [0, 0, 0], rounds=[0, 0, 8], drafting=SelfDrafting(cached=1024))
    table.observe(0, 16, 1_000.0, seconds(OFF, 16, 1_000.0), 0)
    before = table.seconds(16, 1_000.0)[1]
    for cycle in range(8):
        table.observe(2, 16, 1_000.0, seconds(Strategy("sparse", 8, 1, 8), 16, 1_000.0), cycle)
    assert table.seconds(16, 1_000.0)[1] == pytest.approx(before, rel=0.25)


def test_arms_are_off_the_sources_and_the_policy_itself() -> None:
    found = arms(SpecConfig(source="auto", depth=6, num_verify=6), DRAFT)
    assert found[0] == OFF
    assert dict.fromkeys(arm.source for arm in found[1:]) == dict.fromkeys(["suffix", "eagle", "sparse"])
    widest = [arm for arm in found if arm.source == "sparse"][-1]
    assert widest == Strategy("sparse", 8, 1, 8)
    assert all(arm.top_k == 1 and arm.depth == arm.num_verify for arm in found if arm.source == "sparse")
    assert configured(SpecConfig(source="off"), DRAFT) == (widest,)
    assert arms(SpecConfig(source="off"), SparseConfig()) == configured(SpecConfig(source="off")) == (OFF,)


def test_a_cpu_drafts_as_it_is_told() -> None:
    chooser = make_chooser(SpecConfig(source="off"), device="cpu", seed=0, sparse=DRAFT)
    assert isinstance(chooser, FixedChooser)
    assert chooser.choose(batch=3, context=100.0) == Strategy("sparse", 8, 1, 8)

"""Drafting with the policy under sparse attention: whatever blocks are picked, samples are the dense ones."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import RolloutConfig, SparseConfig
from drafter.combined import CombinedDrafter
from drafter.gate import GateConfig, Gates
from drafter.ngram import NgramDrafter
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, ResidentDrafter, Strategy
from kernels.attention import PagedSequences
from kernels.select import BlockLists, choose_blocks
from rollout.engine import NativeEngine
from rollout.gate_selector import GateSelector
from rollout.selectors import DescribedSelector, choice_of, make_sparse
from rollout.sparse import Part, SparseAttention
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]

SPARSE = SparseConfig(mode="draft", select_block=4, budget_tokens=24, window=4, depth=5)
STRATEGY = Strategy("sparse", 5, 1, 5)
SAMPLING = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=3, step=5, temperature=0.7)
SELECTORS = get_args(get_type_hints(SparseConfig)["selector"])


class WorstSelector(DescribedSelector):
    """Picks the blocks that matter least."""

    def __init__(self) -> None:
        super().__init__("minmax", choice_of(SPARSE), select_block=4)

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        scores = -self.scores(layer, query, seqs).nan_to_num()
        return choose_blocks(scores, seqs, self.choice, select_block=self.select_block)


@pytest.fixture(scope="module")
def long_prompts() -> list[Prompt]:
    """One shorter than the budget, and three of many times it, two of which begin alike."""
    choices = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [choices.randrange(3, 259) for _ in range(count)]

    common = tokens(70)
    texts = [tokens(5), common + tokens(9), common + tokens(23), tokens(120)]
    return [Prompt(id=f"p{number}", token_ids=text, answer="") for number, text in enumerate(texts)]


@pytest.fixture
def make(policy: PreTrainedModel, tmp_path: Path) -> Callable[..., NativeEngine]:
    """An engine that drafts with its own policy, by the name of a selector; keyword arguments are RolloutConfig's."""

    def engine(
        selector: str = "quest",
        drafter: ResidentDrafter | None = None,
        *strategies: Strategy,
        sparse: SparseConfig = SPARSE,
        reader: Any = None,
        **options: Any,
    ) -> NativeEngine:
        return NativeEngine(
            policy,
            drafter=drafter or SelfDrafter(),
            chooser=FixedChooser(*(strategies or (STRATEGY,))),
            rollout=RolloutConfig(**({"block_size": 16, "max_running": 6} | options)),
            sparse=attention(policy, selector, sparse, tmp_path),
            reader=reader,
        )

    return engine


@pytest.fixture(scope="module")
def dense(policy: PreTrainedModel, collect: Collect, long_prompts: list[Prompt]) -> Callable[..., dict[Key, Rollout]]:
    """What is sampled without drafts; found once."""

    @cache
    def rollouts(sampling: Sampling = SAMPLING) -> dict[Key, Rollout]:
        options = RolloutConfig(block_size=16, max_running=6)
        engine = NativeEngine(policy, drafter=None, chooser=FixedChooser(OFF), rollout=options)
        return collect(engine, long_prompts, sampling)

    return rollouts


def attention(policy: PreTrainedModel, selector: str, config: SparseConfig, folder: Path) -> SparseAttention:
    """The tiny policy's sparse attention under a selector that is configured, or one of random gates, or the worst."""
    if selector == "worst":
        return SparseAttention([Part(range(2), WorstSelector())])
    if selector in ("gate", "gate-fp8"):
        gates = Gates(GateConfig.of(policy.config, select_block=config.block_tokens), seed=1)
        dtype = torch.float8_e4m3fn if selector == "gate-fp8" else None
        by_gates = GateSelector(gates.requires_grad_(False), choice_of(config), layers=range(2), dtype=dtype)
        return SparseAttention([Part(range(2), by_gates)])
    heads = folder / "full_attention_heads.tsv"
    heads.write_text("0.9\t0.1\n0.2\t0.3\n")
    return make_sparse(replace(config, selector=selector, gate=str(heads)), policy)  # type: ignore[arg-type]


def accepted(rollouts: dict[Key, Rollout]) -> tuple[int, int]:
    """Drafted tokens accepted, and proposed."""
    specs = [rollout.spec for rollout in rollouts.values()]
    return sum(spec.accepted for spec in specs), sum(spec.proposed for spec in specs)


@pytest.mark.parametrize("selector", [*SELECTORS, "gate-fp8", "worst"])
def test_no_selector_changes_what_is_sampled(
    selector: str,
    make: Callable[..., NativeEngine],
    dense: Callable[..., dict[Key, Rollout]],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    rollouts = collect(make(selector), long_prompts, SAMPLING)
    assert_same(rollouts, dense())
    hits, proposed = accepted(rollouts)
    assert 0 < hits < proposed, "blocks that mattered were left out"


@pytest.mark.parametrize(
    ("selector", "limit"),
    [
        ("gate", {"threshold": 0.2}),
        ("verified", {"threshold": 0.2}),
        ("mean", {"budget_tokens": 24, "budget_share": 0.4}),
    ],
    ids=str,
)
def test_blocks_below_a_threshold_or_past_a_share_are_left_out_and_change_nothing(
    selector: str,
    limit: dict[str, float],
    make: Callable[..., NativeEngine],
    dense: Callable[..., dict[Key, Rollout]],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    wide = replace(SPARSE, **({"budget_tokens": 4096} | limit))  # type: ignore[arg-type]
    rollouts = collect(make(selector, sparse=wide), long_prompts, SAMPLING)
    assert_same(rollouts, dense())
    hits, proposed = accepted(rollouts)
    assert 0 < hits < proposed


def test_a_budget_for_everything_drafts_what_is_sampled(
    make: Callable[..., NativeEngine], collect: Collect, long_prompts: list[Prompt]
) -> None:
    engine = make(sparse=replace(SPARSE, budget_tokens=4096))
    hits, proposed = accepted(collect(engine, long_prompts, SAMPLING))
    assert hits == proposed > 0


def test_layers_that_stay_dense_are_dense(
    make: Callable[..., NativeEngine], collect: Collect, long_prompts: list[Prompt]
) -> None:
    hits, proposed = accepted(collect(make(sparse=replace(SPARSE, dense_layers=2)), long_prompts, SAMPLING))
    assert hits == proposed > 0


@pytest.mark.parametrize("selector", ["quest", "worst"])
def test_three_tiers_change_nothing_either(
    selector: str,
    make: Callable[..., NativeEngine],
    dense: Callable[..., dict[Key, Rollout]],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    suffix = NgramDrafter(min_match=1)
    drafter = CombinedDrafter({"suffix": suffix, "sparse": SelfDrafter(suffix, source="suffix")})
    strategies = (STRATEGY, Strategy("suffix", 3, 2, 5), OFF)
    for chosen in ((STRATEGY,), strategies):
        rollouts = collect(make(selector, drafter, *chosen), long_prompts, SAMPLING)
        assert_same(rollouts, dense())
        assert accepted(rollouts)[1] > 0


def test_a_learned_head_drafts_for_the_policy_that_drafts(
    make: Callable[..., NativeEngine],
    dense: Callable[..., dict[Key, Rollout]],
    collect: Collect,
    policy: PreTrainedModel,
    long_prompts: list[Prompt],
    learned_drafting: Callable[..., tuple[CombinedDrafter, Any]],
    assert_same: AssertSame,
) -> None:
    combined, rings = learned_drafting(policy)
    eagle = combined._drafters["eagle"]
    drafter = CombinedDrafter({"eagle": eagle, "sparse": SelfDrafter(eagle, source="eagle", reader=rings)})
    for strategies in ((STRATEGY,), (STRATEGY, Strategy("eagle", 3, 2, 5))):
        rollouts = collect(make("quest", drafter, *strategies, reader=rings), long_prompts, SAMPLING)
        assert_same(rollouts, dense())


@pytest.mark.parametrize(
    "transform",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"stop_token_ids": tuple(range(2, 60))},
        {"max_new_tokens": 1},
        {"max_new_tokens": 7, "stop_token_ids": ()},
    ],
    ids=str,
)
def test_no_sampling_is_changed(
    transform: dict[str, Any],
    make: Callable[..., NativeEngine],
    dense: Callable[..., dict[Key, Rollout]],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    sampling = replace(SAMPLING, **transform)
    assert_same(collect(make(), long_prompts, sampling), dense(sampling))


@pytest.mark.parametrize(
    "options",
    [
        {"kv_tokens": 192},
        {"kv_tokens": 256, "max_running": 3, "prefill_tokens": 17},
        {"max_running": 1},
        {"block_size": 64},
        {"block_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("selector", ["quest", "verified"])
def test_no_preemption_chunk_or_block_changes_what_is_sampled(
    selector: str,
    options: dict[str, int],
    make: Callable[..., NativeEngine],
    dense: Callable[..., dict[Key, Rollout]],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    engine = make(selector, None, STRATEGY, OFF, **options)
    assert_same(collect(engine, long_prompts, SAMPLING), dense())
    assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks
    if options.get("kv_tokens") == 192:
        assert engine.activity()[0].preempted > 0

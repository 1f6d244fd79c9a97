"""Selectors and budgets by layer: each reads in its own layers what the config says, and none changes a sample."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from configs.layers import by_layer
from configs.schema import LayersConfig, RolloutConfig, SelectorName, SparseConfig
from drafter.combined import CombinedDrafter
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from drafter.ngram import NgramDrafter
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, Drafter, ResidentDrafter, Strategy
from kernels.attention import PagedSequences
from kernels.select import BlockLists, bound_scores, choose_blocks, mean_scores, newest_blocks
from rollout import sparse as sparse_module
from rollout.engine import NativeEngine
from rollout.model import ATTENTION
from rollout.selectors import choice_of, make_sparse, share_of_cache
from rollout.sparse import Part, SparseAttention
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling
from rollout.verified import VerifiedSelector, weight_bytes

Key = tuple[str, int]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]

SPARSE = SparseConfig(mode="draft", select_block=4, budget_tokens=24, window=4, depth=5)
STRATEGY = Strategy("sparse", 5, 1, 5)
SAMPLING = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=3, step=5, temperature=0.7)
OPTIONS = RolloutConfig(block_size=16, max_running=6)
LAYERS = LayersConfig
MIXES: dict[str, dict[str, LayersConfig]] = {
    "budgets": {"0-1": LAYERS(budget_tokens=80), "2": LAYERS("mean", 48)},
    "dense between": {"0": LAYERS("dense"), "2": LAYERS("dense")},
    "by keys": {"0": LAYERS("resa"), "1-2": LAYERS("mean", 32), "3-": LAYERS("streaming")},
    "watched": {"0": LAYERS("verified"), "1": LAYERS("dense"), "2-": LAYERS("verified", 40)},
    "watched and others": {"1": LAYERS("verified"), "3": LAYERS("streaming", 12)},
    "gates": {"0": LAYERS("verified"), "1": LAYERS("gate", 16), "3-": LAYERS("gate")},
    "heads": {"1-2": LAYERS("duo"), "3": LAYERS("mean")},
}


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    """A policy of four layers in float32, of random weights."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.25,  # of attention that differs by token
        tie_word_embeddings=False,
    )
    config._attn_implementation = ATTENTION
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def files(tmp_path: Path) -> Callable[[PreTrainedModel, SparseConfig], str]:
    """What sparse.gate names for a config: gates of random weights, or heads."""

    def make(policy: PreTrainedModel, config: SparseConfig) -> str:
        names = {config.selector, *(each.selector for each in config.layers.values())}
        layers = policy.config.num_hidden_layers
        if "duo" in names:
            heads = tmp_path / "full_attention_heads.tsv"
            heads.write_text("0.9\t0.1\n0.2\t0.7\n0.2\t0.3\n0.8\t0.9\n"[: 8 * layers])
            return str(heads)
        if "gate" not in names:
            return ""
        (folder := tmp_path / "gates").mkdir(exist_ok=True)
        gates = Gates(GateConfig.of(policy.config, select_block=4), seed=1)
        write_gates(folder, gates, model_config=policy.config, base_model="deep", dtype=torch.float32)
        return str(folder)

    return make


@pytest.fixture
def make(files: Callable[[PreTrainedModel, SparseConfig], str]) -> Callable[..., NativeEngine]:
    """An engine that drafts for itself as a config has it; keyword arguments are RolloutConfig's."""

    def engine(
        policy: PreTrainedModel,
        config: SparseConfig,
        drafter: ResidentDrafter | Drafter | None = None,
        **options: Any,
    ) -> NativeEngine:
        drafts = config.mode == "draft"
        return NativeEngine(
            policy,
            drafter=drafter or SelfDrafter() if drafts else None,
            chooser=FixedChooser(STRATEGY if drafts else OFF),
            rollout=replace(OPTIONS, **options),
            sparse=make_sparse(replace(config, gate=files(policy, config)), policy),
        )

    return engine


def densely(policy: PreTrainedModel, **options: Any) -> NativeEngine:
    return NativeEngine(policy, drafter=None, chooser=FixedChooser(OFF), rollout=replace(OPTIONS, **options))


@pytest.fixture(scope="module")
def dense(deep: PreTrainedModel, collect: Collect, long_prompts: list[Prompt]) -> dict[Key, Rollout]:
    """What is sampled without drafts."""
    return collect(densely(deep), long_prompts, SAMPLING)


@pytest.mark.parametrize("options", [{}, {"kv_tokens": 192}], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_no_choice_by_layer_changes_what_is_sampled(
    mix: str,
    options: dict[str, int],
    deep: PreTrainedModel,
    make: Callable[..., NativeEngine],
    dense: dict[Key, Rollout],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    rollouts = collect(make(deep, replace(SPARSE, layers=MIXES[mix]), **options), long_prompts, SAMPLING)
    assert_same(rollouts, dense)
    hits = sum(rollout.spec.accepted for rollout in rollouts.values())
    assert 0 < hits < sum(rollout.spec.proposed for rollout in rollouts.values()), "blocks that mattered were left out"


def test_selectors_of_blocks_of_different_sizes_stand_side_by_side(
    deep: PreTrainedModel,
    make: Callable[..., NativeEngine],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    mix = {"1": LAYERS("mean", 256), "2": LAYERS("verified", 80), "3": LAYERS("dense")}
    config = replace(SPARSE, select_block=0, budget_tokens=64, window=16, layers=mix)
    engine = make(deep, config, block_size=64)
    assert engine.sparse is not None
    assert [part.selector.select_block for part in engine.sparse.parts] == [16, 64, 16]
    prompts = [Prompt(each.id, each.token_ids * 3, "") for each in long_prompts]
    assert_same(collect(engine, prompts, SAMPLING), collect(densely(deep), prompts, SAMPLING))


def test_three_tiers_by_layer_change_nothing_either(
    deep: PreTrainedModel,
    make: Callable[..., NativeEngine],
    dense: dict[Key, Rollout],
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    suffix = NgramDrafter(min_match=1)
    drafter = CombinedDrafter({"suffix": suffix, "sparse": SelfDrafter(suffix, source="suffix")})
    engine = make(deep, replace(SPARSE, layers=MIXES["gates"]), drafter)
    assert_same(collect(engine, long_prompts, SAMPLING), dense)


@pytest.mark.parametrize("selector", get_args(SelectorName))
def test_a_selector_that_is_cut_into_ranges_drafts_what_it_would_whole(
    selector: SelectorName,
    deep: PreTrainedModel,
    make: Callable[..., NativeEngine],
    collect: Collect,
    long_prompts: list[Prompt],
) -> None:
    whole = replace(SPARSE, selector=selector, budget_tokens=64 if selector in ("quest", "resa") else 24)
    # a token more, as many blocks: other settings for the same
    cut = replace(whole, layers={name: LAYERS(budget_tokens=whole.budget_tokens + 1) for name in ("1", "3-")})
    engines = [make(deep, config) for config in (whole, cut)]
    ours, theirs = (collect(engine, long_prompts, SAMPLING) for engine in engines)
    for key, rollout in ours.items():
        assert rollout.token_ids == theirs[key].token_ids
        assert rollout.spec == theirs[key].spec, "the very same drafts, not only the same samples"
    (one,), parts = (engine.sparse.parts for engine in engines if engine.sparse)
    assert [part.layers for part in parts] == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    for name in ("descriptors", "weights"):  # what is known of the cache, where anything is
        if hasattr(one.selector, name):
            assert torch.equal(getattr(one.selector, name), torch.cat([getattr(p.selector, name) for p in parts]))


@dataclass
class Reading:
    """A layer's lists in one forward, and what they were picked from. place: of the layer's keys in memory."""

    place: int
    query: torch.Tensor
    key_cache: torch.Tensor
    seqs: PagedSequences
    lists: BlockLists

    def wanted(self, config: SparseConfig) -> BlockLists:
        """What a setting picks of the keys that are cached."""
        choice, block = choice_of(config), config.block_tokens
        blocks = self.key_cache.unflatten(1, (-1, block))
        if config.selector == "streaming":
            return newest_blocks(torch.zeros(1), self.seqs, choice, num_kv_heads=2, select_block=block)
        if config.selector == "mean":
            scores = mean_scores(self.query, blocks.mean(dim=2), self.seqs)
        else:
            minmax = torch.cat([blocks.amin(dim=2), blocks.amax(dim=2)], dim=3)
            scores = bound_scores(self.query, minmax, self.seqs)
        return choose_blocks(scores, self.seqs, choice, select_block=block)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Reading]:
    """Every sparse attention, in the order of their calls."""
    found: list[Reading] = []
    attend = sparse_module.sparse_attention

    def noted(
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        seqs: PagedSequences,
        lists: BlockLists,
        *,
        scale: float,
    ) -> torch.Tensor:
        if int(seqs.context_lens.max()):  # or else nobody's row
            found.append(Reading(key_cache.data_ptr(), query.clone(), key_cache.clone(), seqs, lists))
        return attend(query, key_cache, value_cache, seqs, lists, scale=scale)

    monkeypatch.setattr(sparse_module, "sparse_attention", noted)
    return found


@pytest.mark.parametrize(
    "layers",
    [
        {"0": LAYERS("dense"), "1": LAYERS("streaming", 32), "3-": LAYERS("mean", 40)},
        {"0-1": LAYERS(budget_tokens=68), "2": LAYERS("mean", 12), "3": LAYERS("dense")},
    ],
    ids=str,
)
def test_plain_sampling_reads_in_each_layer_what_the_config_says(
    layers: dict[str, LayersConfig],
    deep: PreTrainedModel,
    make: Callable[..., NativeEngine],
    collect: Collect,
    long_prompts: list[Prompt],
    readings: list[Reading],
) -> None:
    config = replace(SPARSE, mode="plain", budget_tokens=64, layers=layers)  # of which the bound reads no fewer
    engine = make(deep, config, max_running=1)
    collect(engine, long_prompts[:1], replace(SAMPLING, num_samples=1, max_new_tokens=10, under="sparse"))
    assert engine._workspace.cache is not None
    at = {engine._workspace.cache.layer(layer)[0].data_ptr(): layer for layer in range(4)}
    settings = by_layer(config, 4)
    sparse = [layer for layer, setting in enumerate(settings) if setting is not None]
    found = [at[each.place] for each in readings]
    assert found == sparse * (len(found) // len(sparse)) and len(found) >= 9 * len(sparse)
    for layer, reading in zip(found, readings, strict=True):
        setting = settings[layer]
        assert setting is not None
        wanted, got = reading.wanted(setting.sparse), reading.lists
        assert torch.equal(got.counts, wanted.counts)
        assert (got.counts == setting.sparse.budget_tokens // 4).all(), "the context is longer than any budget"
        for head, count in enumerate(got.counts[0].tolist()):
            assert got.blocks[0, head, :count].tolist() == wanted.blocks[0, head, :count].tolist(), (layer, head)


@dataclass
class Beside:
    """Attention of one layer, which is told its number."""

    layer: int
    told: list[int]

    def takes(self, layer: int) -> bool:
        return layer == self.layer

    def attend(self, layer: int, query: torch.Tensor, *others: Any, scale: float) -> torch.Tensor:
        self.told.append(layer)
        return query


def test_what_gates_learn_from_and_what_selectors_watch_go_side_by_side(
    deep: PreTrainedModel, make: Callable[..., NativeEngine], collect: Collect, long_prompts: list[Prompt]
) -> None:
    engine = make(deep, replace(SPARSE, layers={"1": LAYERS("verified"), "2": LAYERS("verified", 32)}))
    collect(engine, long_prompts[:1], replace(SAMPLING, max_new_tokens=3))
    assert engine.sparse is not None and engine._workspace.residency is not None
    rows, told = engine._workspace.residency.rows, []
    beside = engine.sparse.watch(rows, 1, beside=Beside(3, told))
    alone = engine.sparse.watch(rows, 1)
    assert alone is not None and [alone.takes(layer) for layer in range(4)] == [False, True, True, False]
    assert beside is not None and [beside.takes(layer) for layer in range(4)] == [False, True, True, True]
    nothing: Any = None
    beside.attend(3, torch.empty(0), nothing, nothing, nothing, nothing, scale=1.0)
    assert told == [3]


def test_gates_learn_of_the_layers_that_go_by_them_and_of_the_least_of_their_budgets(
    deep: PreTrainedModel, files: Callable[[PreTrainedModel, SparseConfig], str]
) -> None:
    config = replace(SPARSE, learn=True, layers=MIXES["gates"])
    sampler = make_sparse(replace(config, gate=files(deep, config)), deep).sampler
    assert sampler is not None
    assert (sampler._layers, sampler.budget_blocks) == ([1, 3], 4)


@pytest.mark.parametrize(("mix", "descriptors"), [*((mix, "policy") for mix in MIXES), ("gates", "fp8")])
def test_what_is_kept_beside_the_cache_is_what_the_plan_counts(
    mix: str,
    descriptors: Literal["policy", "fp8"],
    deep: PreTrainedModel,
    make: Callable[..., NativeEngine],
    collect: Collect,
    long_prompts: list[Prompt],
) -> None:
    config = replace(SPARSE, layers=MIXES[mix], descriptors=descriptors)
    engine = make(deep, config)
    collect(engine, long_prompts[:1], replace(SAMPLING, max_new_tokens=1))
    assert engine.sparse is not None and engine._workspace.cache is not None
    kept = sum(getattr(part.selector, "descriptors", torch.empty(0)).nbytes for part in engine.sparse.parts)
    share = share_of_cache(config, 4, itemsize=4)
    assert kept == share * engine._workspace.cache.storage.nbytes
    assert engine.sparse.share_of_cache(4) == pytest.approx(share)
    watching = [part for part in engine.sparse.parts if isinstance(part.selector, VerifiedSelector)]
    for part in watching:
        assert isinstance(part.selector, VerifiedSelector)
        num_blocks = part.selector.weights.shape[3]
        rows = OPTIONS.max_running
        expected = weight_bytes(deep.config, num_layers=len(part.layers), num_rows=rows, num_blocks=num_blocks)
        assert part.selector.weights.nbytes == expected


def test_a_layer_belongs_to_one_part_or_attends_densely(deep: PreTrainedModel) -> None:
    sparse = make_sparse(replace(SPARSE, layers={"0": LAYERS("dense"), "2-": LAYERS("streaming")}), deep)
    assert [part.layers for part in sparse.parts] == [range(1, 2), range(2, 4)]
    assert [sparse.part_of(layer) for layer in range(4)] == [None, sparse.parts[0], sparse.parts[1], sparse.parts[1]]
    assert SparseAttention([]).part_of(0) is None
    storage = torch.arange(8.0).view(4, 2)
    assert Part(range(1, 3), sparse.parts[0].selector).of(storage).tolist() == [[2, 3], [4, 5]]

"""Sparse attention beside the cache: what is known of committed keys and no others, and who is refused."""

import gc
import weakref
from collections import abc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from configs.errors import ConfigError, PreflightError
from configs.schema import LayersConfig, RolloutConfig, SparseConfig
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.model import ATTENTION, PagedCache, load_policy
from rollout.selectors import DescribedSelector, choice_of, make_sparse, share_of_cache
from rollout.sparse import Part, SparseAttention
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling
from rollout.verified import VerifiedSelector, weight_bytes
from rollout.workspace import room_for

Key = tuple[str, int]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]

SPARSE = SparseConfig(mode="draft", select_block=4, budget_tokens=24, window=4, depth=5)
STRATEGY = Strategy("sparse", 5, 1, 5)
SAMPLING = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=3, step=5, temperature=0.7)
OPTIONS = RolloutConfig(block_size=16, max_running=6)


def drafting(policy: PreTrainedModel, selector: Literal["quest", "mean", "streaming", "verified"]) -> NativeEngine:
    """An engine that drafts with its own policy."""
    sparse = make_sparse(replace(SPARSE, selector=selector), policy)
    return NativeEngine(policy, drafter=SelfDrafter(), chooser=FixedChooser(STRATEGY), rollout=OPTIONS, sparse=sparse)


def test_weights_that_change_and_caches_that_go_leave_nothing_behind(
    tiny_model_dir: Path, collect: Collect, long_prompts: list[Prompt], assert_same: AssertSame
) -> None:
    model = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    engine = drafting(model, "quest")
    assert engine.sparse is not None
    (part,) = engine.sparse.parts
    selector = part.selector
    for version in range(2):
        plain = NativeEngine(model, drafter=None, chooser=FixedChooser(OFF), rollout=OPTIONS)
        assert_same(collect(engine, long_prompts, SAMPLING), collect(plain, long_prompts, SAMPLING))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        engine.update(version + 1)
        engine.release()
        assert isinstance(selector, DescribedSelector) and not selector.descriptors.numel()


def test_a_released_cache_is_held_by_nobody(
    policy: PreTrainedModel, collect: Collect, long_prompts: list[Prompt]
) -> None:
    engine = drafting(policy, "quest")
    collect(engine, long_prompts[:1], replace(SAMPLING, max_new_tokens=3))
    assert engine._workspace.cache is not None
    cache = weakref.ref(engine._workspace.cache)
    engine.release()
    gc.collect()
    assert cache() is None


def test_rows_that_grow_leave_no_prefix_that_the_selector_knows_nothing_of(
    policy: PreTrainedModel,
    collect: Collect,
    long_prompts: list[Prompt],
    assert_same: AssertSame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rollout.workspace.LENGTH_STEP", 16)
    options = replace(OPTIONS, kv_tokens=2048)  # a cache that stays

    def sampling_sparsely() -> NativeEngine:
        sparse = make_sparse(replace(SPARSE, mode="plain"), policy)
        return NativeEngine(policy, drafter=None, chooser=FixedChooser(OFF), rollout=options, sparse=sparse)

    longer = replace(SAMPLING, max_new_tokens=60, under="sparse")
    engine = sampling_sparsely()
    collect(engine, long_prompts, replace(longer, max_new_tokens=8))
    cache, rows = engine._workspace.cache, engine._workspace.residency
    rollouts = collect(engine, long_prompts, longer)
    assert engine._workspace.cache is cache and engine._workspace.residency is not rows
    assert_same(rollouts, collect(sampling_sparsely(), long_prompts, longer))


def test_a_policy_that_decodes_through_its_own_module_is_refused(long_prompts: list[Prompt], collect: Collect) -> None:
    config = GPTNeoXConfig(
        vocab_size=259, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config._attn_implementation = ATTENTION
    model = GPTNeoXForCausalLM(config).eval()
    engine = NativeEngine(
        model,
        drafter=SelfDrafter(),
        chooser=FixedChooser(STRATEGY),
        rollout=RolloutConfig(block_size=16),
        sparse=make_sparse(SPARSE, model),
    )
    with pytest.raises(PreflightError, match=r"GPTNeoXForCausalLM .* set sparse\.mode=off"):
        collect(engine, long_prompts, SAMPLING)


def test_what_does_not_fit_the_policy_is_said(policy: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparse\.layers\.1-2: the policy's layers are 0 to 1"):
        make_sparse(replace(SPARSE, layers={"1-2": LayersConfig(selector="dense")}), policy)
    heads = tmp_path / "heads.tsv"
    heads.write_text("0.5\t0.5\n")
    with pytest.raises(PreflightError, match=r"heads\.tsv is not of 2 layers of 2 key heads; name"):
        make_sparse(replace(SPARSE, selector="duo", gate=str(heads)), policy)
    heads.write_text("0.5\t0.5\n0.5\tnan\n")
    with pytest.raises(PreflightError, match=r"heads\.tsv holds values that are not finite; name"):
        make_sparse(replace(SPARSE, selector="duo", gate=str(heads)), policy)
    heads.write_text("many\n")
    with pytest.raises(PreflightError, match=r"heads\.tsv is no full_attention_heads\.tsv .*; name"):
        make_sparse(replace(SPARSE, selector="duo", gate=str(heads)), policy)


@pytest.mark.parametrize("name", ["quest", "resa"])
def test_the_bound_reads_a_share_and_never_less_than_16_blocks(name: Literal["quest", "resa"]) -> None:
    choice = choice_of(SparseConfig(selector=name, budget_tokens=128, budget_share=0.1))
    assert (choice.budget_blocks, choice.share) == (16, 0.1)
    assert choice_of(SparseConfig(selector=name, budget_tokens=512)).budget_blocks == 32
    assert choice_of(SparseConfig(selector="streaming", budget_tokens=128)).budget_blocks == 8


@pytest.mark.parametrize("selector", ["quest", "mean", "streaming"])
def test_what_a_selector_keeps_is_counted_with_the_cache(
    selector: Literal["quest", "mean", "streaming"],
    policy: PreTrainedModel,
    collect: Collect,
    long_prompts: list[Prompt],
) -> None:
    config = replace(SPARSE, selector=selector)
    engine = drafting(policy, selector)
    collect(engine, long_prompts[:1], replace(SAMPLING, max_new_tokens=1))
    assert engine.sparse is not None and engine._workspace.cache is not None
    (part,) = engine.sparse.parts
    kept = getattr(part.selector, "descriptors", torch.empty(0)).nbytes
    assert kept == share_of_cache(config, 2, itemsize=4) * engine._workspace.cache.storage.nbytes
    assert engine.sparse.share_of_cache(2) == share_of_cache(config, 2, itemsize=4)


def test_what_is_kept_of_rows_is_what_the_plan_counts(
    policy: PreTrainedModel, collect: Collect, long_prompts: list[Prompt]
) -> None:
    engine = drafting(policy, "verified")
    collect(engine, long_prompts[:1], replace(SAMPLING, max_new_tokens=1))
    assert engine.sparse is not None
    (part,) = engine.sparse.parts
    assert isinstance(part.selector, VerifiedSelector)
    room = room_for(len(long_prompts[0].token_ids) + 1, OPTIONS, max_nodes=STRATEGY.num_verify)
    num_blocks = room.table_width * OPTIONS.block_size // SPARSE.select_block
    kept = weight_bytes(policy.config, num_layers=2, num_rows=OPTIONS.max_running, num_blocks=num_blocks)
    assert part.selector.weights.nbytes == kept > 0


class KeptByText(VerifiedSelector):
    """Keeps weights for every text there is, whoever writes it: room that rows do without."""

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        super().attach(storage, num_texts=num_texts, num_rows=num_texts, table_width=table_width)

    def begin(self, texts: abc.Sequence[int], *, beside: abc.Sequence[int]) -> None:
        self.weights[:, list(texts)] = 0.0

    def kept(self, text: torch.Tensor) -> torch.Tensor:
        return text.long()


@pytest.mark.parametrize("options", [{}, {"kv_tokens": 192}, {"max_running": 2}], ids=str)
def test_rows_keep_what_every_text_would_as_long_as_it_is_written(
    options: dict[str, int], policy: PreTrainedModel, collect: Collect, long_prompts: list[Prompt]
) -> None:
    rollout = replace(OPTIONS, **options)
    choice = choice_of(replace(SPARSE, selector="verified"))
    found = []
    for kind in (VerifiedSelector, KeptByText):
        selector = kind(choice, select_block=4)
        sparse = SparseAttention([Part(range(2), selector)])
        chooser = FixedChooser(STRATEGY)
        engine = NativeEngine(policy, drafter=SelfDrafter(), chooser=chooser, rollout=rollout, sparse=sparse)
        found.append([collect(engine, long_prompts, replace(SAMPLING, num_samples=4, step=step)) for step in range(2)])
        assert bool(engine.activity()[0].preempted) == ("kv_tokens" in options)
        residency = engine._workspace.residency
        assert residency is not None
        num_kept = len(residency.texts.lengths) if kind is KeptByText else rollout.max_running
        assert selector.weights.shape[1] == num_kept + 1
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for key, given in ours.items():
            assert given.token_ids == theirs[key].token_ids
            assert given.spec == theirs[key].spec, "the very same drafts, not only the same samples"


def test_a_text_that_is_written_no_more_leaves_its_place_to_one_that_knows_nothing(policy: PreTrainedModel) -> None:
    selector = VerifiedSelector(choice_of(SPARSE), select_block=4)
    cache = PagedCache(policy.config, num_blocks=4, block_size=16, device="cpu", dtype=policy.dtype)
    selector.attach(cache.storage, num_texts=9, num_rows=3, table_width=2)
    selector.begin([5, 2, 7], beside=[])

    def slots(*texts: int) -> list[int]:
        return selector.kept(torch.tensor(texts, dtype=torch.int32)).tolist()

    assert sorted(slots(5, 2, 7)) == [0, 1, 2] and slots(8) == [3], "nobody's"
    for value, slot in enumerate(slots(5, 2, 7, 8), start=1):
        selector.weights[:, slot] = value
    before = slots(2, 7)
    selector.begin([0], beside=[7, 2])
    assert slots(2, 7) == before and slots(0) == slots(5)
    assert [float(selector.weights[1, slot].mean()) for slot in slots(0, 2, 7, 8)] == [0, 2, 3, 4]
    selector.begin([2, 4], beside=[0])  # a text that another sequence writes now
    assert sorted(slots(0, 2, 4)) == [0, 1, 2] and not selector.weights[:, :3].any()

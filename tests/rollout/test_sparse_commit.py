"""What a selector knows of a cache follows from what was committed: rejected drafts leave nothing behind."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import RolloutConfig, SparseConfig
from drafter.combined import CombinedDrafter
from drafter.gate import GateConfig, Gates
from drafter.ngram import NgramDrafter
from drafter.selfdraft import SelfDrafter
from drafter.types import Drafts, ResidentDrafter, Rows, Strategy, Texts
from kernels.select import BlockLists
from rollout.decoder import make_decoder
from rollout.engine import NativeEngine
from rollout.gate_selector import GateSelector
from rollout.model import PagedCache
from rollout.runner import pack
from rollout.scheduler import Work
from rollout.selectors import DescribedSelector, choice_of, make_sparse
from rollout.sequence import Sequence
from rollout.sparse import Part, SparseAttention
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Collect = Callable[..., dict[tuple[str, int], Rollout]]
Described = DescribedSelector | GateSelector

SPARSE = SparseConfig(mode="draft", select_block=4, budget_tokens=24, window=4, depth=5)
STRATEGY = Strategy("sparse", 5, 1, 5)
SAMPLING = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=3, step=5, temperature=0.7)
OPTIONS = RolloutConfig(block_size=16, max_running=6)


def drafting(
    policy: PreTrainedModel,
    selector: Literal["quest", "mean", "verified", "gate", "gate-fp8"],
    drafter: ResidentDrafter | None = None,
) -> NativeEngine:
    """An engine that drafts with its own policy; by gates, with random ones."""
    if selector in ("gate", "gate-fp8"):
        gates = Gates(GateConfig.of(policy.config, select_block=4), seed=1).requires_grad_(False)
        layers, dtype = range(2), torch.float8_e4m3fn if selector == "gate-fp8" else None
        sparse = SparseAttention([Part(layers, GateSelector(gates, choice_of(SPARSE), layers=layers, dtype=dtype))])
    else:
        sparse = make_sparse(replace(SPARSE, selector=selector), policy)
    chooser = FixedChooser(STRATEGY)
    return NativeEngine(policy, drafter=drafter or SelfDrafter(), chooser=chooser, rollout=OPTIONS, sparse=sparse)


def three_tiers() -> CombinedDrafter:
    """The policy drafts, and suffixes for it."""
    suffix = NgramDrafter(min_match=1)
    return CombinedDrafter({"suffix": suffix, "sparse": SelfDrafter(suffix, source="suffix")})


@torch.inference_mode()
def fresh_prefill(policy: PreTrainedModel, tokens: list[int], selector: Described) -> PagedCache:
    """A cache of a sequence's tokens but for the last, computed at once, whose keys the selector has described."""
    sequence = Sequence(
        prompt=Prompt("fresh", tokens, ""), sample=0, noise_key=0, max_length=len(tokens) + 1, block_size=16
    )
    count = -(-len(tokens) // 16)
    sequence.block_table[:] = range(len(sequence.block_table))
    sequence.num_blocks = count
    cache = PagedCache(policy.config, num_blocks=count + 1, block_size=16, device="cpu", dtype=policy.dtype)
    packed = pack([Work(sequence, len(tokens) - 1)], block_size=16, device=torch.device("cpu"))
    decoder = make_decoder(policy)
    decoder.reach(len(tokens))
    decoder.forward(packed.token_ids, packed.positions, packed.seqs, cache)
    selector.attach(cache.storage, num_texts=1, num_rows=1, table_width=count)
    ends = torch.tensor([len(tokens) - 1], dtype=torch.int32)
    tables = packed.seqs.block_tables
    selector.describe(cache.storage, block_tables=tables, begins=0 * ends, ends=ends, most=len(tokens) - 1)
    return cache


@pytest.mark.parametrize("make_drafter", [SelfDrafter, three_tiers], ids=["two tiers", "three tiers"])
@pytest.mark.parametrize("selector", ["quest", "mean", "gate", "gate-fp8"])
def test_after_rejections_cache_and_descriptors_are_those_of_a_fresh_dense_prefill(
    selector: Literal["quest", "mean", "gate", "gate-fp8"],
    make_drafter: Callable[[], ResidentDrafter],
    policy: PreTrainedModel,
    long_prompts: list[Prompt],
) -> None:
    engine, beside = drafting(policy, selector, make_drafter()), drafting(policy, selector)
    assert engine.sparse is not None and beside.sparse is not None
    chosen, fresh = (each.parts[0].selector for each in (engine.sparse, beside.sparse))
    assert isinstance(chosen, Described) and isinstance(fresh, Described)
    sampling = replace(SAMPLING, max_new_tokens=60, stop_token_ids=(2, 40, 80, 120, 160, 200))

    async def compare_midway() -> int:
        compared = 0
        rollouts = engine.generate(long_prompts, sampling)
        async for _ in rollouts:
            running, scheduler = engine._running, engine._scheduler
            assert running is not None and scheduler is not None and engine._workspace.cache is not None
            engine._finished += running.drain()
            for sequence in scheduler.running:
                if sequence.num_uncached > 1 or not sequence.logprobs:
                    continue
                length = len(sequence.tokens) - 1
                cache = fresh_prefill(policy, sequence.tokens, fresh)
                slots = torch.tensor([sequence.slot(index) for index in range(length)])
                ours = engine._workspace.cache.storage.flatten(2, 3)[:, :, slots]
                # 1e-4: float32 sums in another order
                torch.testing.assert_close(ours, cache.storage.flatten(2, 3)[:, :, :length], atol=1e-4, rtol=1e-4)
                blocks = torch.arange(-(-length // 4))
                tables = torch.from_numpy(sequence.block_table.copy()).long()
                found = chosen.descriptors[:, tables[blocks // 4], blocks % 4]
                wanted = fresh.descriptors[:, blocks // 4, blocks % 4]
                atol, rtol = 1e-4, 1e-4
                if selector == "gate-fp8":  # next to a border such sums fall to either side of it
                    found, wanted, atol, rtol = found.float(), wanted.float(), 2**-9, 2**-3
                    assert (found == wanted).float().mean() > 0.99
                torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)
                compared += sum(sequence.proposed_by_depth) > sum(sequence.accepted_by_depth)
        return compared

    assert asyncio.run(compare_midway()) > 5, "sequences in the middle of their drafts"


@pytest.mark.parametrize("selector", ["quest", "gate", "verified"])
def test_drafting_leaves_no_trace_in_what_a_selector_knows(
    selector: Literal["quest", "gate", "verified"],
    policy: PreTrainedModel,
    collect: Collect,
    long_prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = drafting(policy, selector)
    assert engine.sparse is not None
    chosen, propose = engine.sparse.parts[0].selector, SelfDrafter.propose
    name = "weights" if selector == "verified" else "descriptors"
    changed: list[bool] = []
    last: list[torch.Tensor] = []

    def watched(self: SelfDrafter, *drafting: Any) -> None:
        before = getattr(chosen, name).clone()
        propose(self, *drafting)
        assert torch.equal(getattr(chosen, name), before)
        changed.extend(not torch.equal(before, each) for each in last)
        last[:] = [before]

    monkeypatch.setattr(SelfDrafter, "propose", watched)
    collect(engine, long_prompts, SAMPLING)
    assert sum(changed) > 5, "verification lets it know more"


@pytest.mark.parametrize("make_drafter", [SelfDrafter, three_tiers], ids=["two tiers", "three tiers"])
def test_blocks_that_a_draft_has_filled_are_read_until_it_is_verified(
    make_drafter: Callable[[], ResidentDrafter],
    policy: PreTrainedModel,
    collect: Collect,
    long_prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # no window and no sinks, and drafts longer than two blocks, which are described when they are committed
    config = replace(SPARSE, window=0, sinks=0, depth=11)
    chooser = FixedChooser(Strategy("sparse", 11, 1, 11))
    sparse = make_sparse(config, policy)
    engine = NativeEngine(policy, drafter=make_drafter(), chooser=chooser, rollout=OPTIONS, sparse=sparse)
    propose, select = SelfDrafter.propose, DescribedSelector.select
    committed: list[int] = []  # keys, of each row
    filled: list[bool] = []  # of each block that drafts filled, whether it was read

    def watched(self: SelfDrafter, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        committed[:] = (texts.lengths[rows.text.long()] - 1).tolist()
        propose(self, texts, rows, strategy, out)

    def selected(self: DescribedSelector, layer: int, query: torch.Tensor, *given: Any) -> BlockLists:
        lists = select(self, layer, query, *given)
        contexts: list[int] = given[1].context_lens.tolist()
        for row, context in enumerate(contexts):
            for head in range(lists.counts.shape[1]):
                read = lists.blocks[row, head, : int(lists.counts[row, head])].tolist()
                filled.extend(block in read for block in range(committed[row] // 4, context // 4))
        return lists

    monkeypatch.setattr(SelfDrafter, "propose", watched)
    monkeypatch.setattr(DescribedSelector, "select", selected)
    collect(engine, long_prompts, SAMPLING)
    assert len(filled) > 100 and all(filled)

"""What selectors pick, one list at a time: whose heads see everything, whose weights count, what is always read."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import SparseConfig
from kernels import select
from kernels.attention import PagedSequences, paged_sequences
from rollout import verified
from rollout.model import PagedCache
from rollout.selectors import HeadsSelector, NewestSelector, choice_of
from rollout.sparse import Selector
from rollout.verified import VerifiedSelector

CONFIG = SparseConfig(mode="draft", selector="streaming", select_block=4, budget_tokens=20, sinks=1, window=4)
BLOCKS = 10  # complete ones before the new token's


def sequence() -> PagedSequences:
    """One sequence with a new token."""
    return paged_sequences(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen_q=1,
        context_lens=torch.tensor([4 * BLOCKS], dtype=torch.int32),
        max_context=4 * BLOCKS,
        block_tables=torch.arange(3, dtype=torch.int32)[None],
        slots=torch.tensor([4 * BLOCKS]),
        block_size=16,
    )


def picked(selector: Selector, layer: int) -> list[list[int]]:
    """The blocks of each key head of the tiny policy, whose cache says nothing."""
    lists = selector.select(layer, torch.zeros(1, 4, 16), torch.tensor([4 * BLOCKS]), sequence(), torch.tensor([0]))
    return [blocks[:count] for blocks, count in zip(lists.blocks[0].tolist(), lists.counts[0].tolist(), strict=True)]


def attach(policy: PreTrainedModel, selector: Selector) -> None:
    cache = PagedCache(policy.config, num_blocks=4, block_size=16, device="cpu", dtype=policy.dtype)
    selector.attach(cache.storage, num_texts=1, num_rows=1, table_width=3)


def test_retrieval_heads_see_everything_and_others_sinks_and_the_newest(policy: PreTrainedModel) -> None:
    selector = HeadsSelector(torch.tensor([[True, False], [False, True]]), choice_of(CONFIG), select_block=4)
    attach(policy, selector)
    everything, newest = [*range(BLOCKS + 1)], [0, 7, 8, 9, 10]
    assert picked(selector, 0) == [everything, newest]
    assert picked(selector, 1) == [newest, everything]


def test_what_a_layer_attended_to_is_what_it_reads(policy: PreTrainedModel) -> None:
    selector = VerifiedSelector(choice_of(CONFIG), select_block=4)
    attach(policy, selector)
    selector.weights.fill_(-9.0)
    for layer, head, block in ((0, 0, 3), (0, 1, 4), (1, 0, 5), (1, 1, 6)):
        selector.weights[layer, 0, head, block] = -1.0
    # the sink, the window, the token's own, and of the others the best and then the newest
    assert picked(selector, 0) == [[0, 3, 8, 9, 10], [0, 4, 8, 9, 10]]
    assert picked(selector, 1) == [[0, 5, 8, 9, 10], [0, 6, 8, 9, 10]]


@pytest.mark.parametrize("together", [1, 1 << 20], ids=["a layer at a time", "all layers"])
def test_what_is_held_for_a_draft_has_every_block_that_it_fills(
    policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(verified, "CHOSEN_FROM", together)
    selector = VerifiedSelector(choice_of(replace(CONFIG, budget_tokens=24)), select_block=4)
    cache = PagedCache(policy.config, num_blocks=4, block_size=16, device="cpu", dtype=policy.dtype)
    selector.attach(cache.storage, num_texts=2, num_rows=2, table_width=3)
    selector.weights.fill_(-9.0)
    for layer, slot, head, block in (
        (0, 0, 0, 3),
        (0, 0, 1, 4),
        (0, 1, 0, 1),
        (0, 1, 1, 2),
        (1, 1, 0, 5),
        (1, 0, 1, 6),
    ):
        selector.weights[layer, slot, head, block] = -1.0
    first = sequence()
    seqs = replace(
        first,
        cu_seqlens_q=torch.tensor([0, 6, 12], dtype=torch.int32),
        max_seqlen_q=6,
        context_lens=torch.tensor([4 * BLOCKS, 4 * BLOCKS - 12], dtype=torch.int32),
        block_tables=first.block_tables.repeat(2, 1),
    )
    held = selector.hold(seqs, torch.tensor([1, 0]))
    assert [(lists.select_block, lists.held) for lists in held] == [(4, True), (4, True)]
    own = selector.select(0, torch.zeros(12, 4, 16), torch.zeros(12), seqs, torch.tensor([1, 0]))
    assert not own.held, "made just before they are read"
    found = [[[set(blocks.tolist()) for blocks in row] for row in lists.blocks] for lists in held]
    assert all(bool((lists.counts == 6).all()) for lists in held)
    # six tokens from 40 on fill blocks 10 and 11, and from 28 on blocks 7 and 8
    newest, older = {0, 8, 9, 10, 11}, {0, 5, 6, 7, 8}
    assert found[0] == [[newest | {1}, newest | {2}], [older | {3}, older | {4}]]
    assert found[1] == [[newest | {5}, newest | {7}], [older | {4}, older | {4}]]


def test_streaming_makes_its_scores_once(policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[torch.Tensor] = []  # kept, so that no other takes the place of one
    choose = select.choose_blocks

    def watched(given: torch.Tensor, *args: Any, **options: Any) -> select.BlockLists:
        scores.append(given)
        return choose(given, *args, **options)

    monkeypatch.setattr(select, "choose_blocks", watched)
    selector = NewestSelector(choice_of(CONFIG), select_block=4)
    for _ in range(2):  # CUDA graphs outlive a cache that is attached again
        attach(policy, selector)
        assert [picked(selector, layer) for layer in (0, 1)] == [[[0, 7, 8, 9, 10]] * 2] * 2
    assert len(scores) == 4 and len({given.data_ptr() for given in scores}) == 1


def test_sinks_and_the_window_are_read_whatever_the_rest_scores(policy: PreTrainedModel) -> None:
    choice = choice_of(SparseConfig(selector="streaming", select_block=4, budget_tokens=20, sinks=2, window=6))
    assert (choice.sinks, choice.recent, choice.budget_blocks) == (2, 2, 5)
    streaming = NewestSelector(choice, select_block=4)
    attach(policy, streaming)
    assert picked(streaming, 0) == [[0, 1, 8, 9, 10]] * 2
    verified = VerifiedSelector(choice, select_block=4)
    attach(policy, verified)
    verified.weights[:, :, :, 2:8] = 5.0
    assert picked(verified, 0) == [[0, 1, 8, 9, 10]] * 2

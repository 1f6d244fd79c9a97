"""Sparse attention, reference and kernel, against a softmax over the listed keys in float64, one token at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.attention import paged_attention_reference
from kernels.select import BlockLists
from kernels.sparse_attention import sparse_attention_reference

SCALE = 0.3
TREE = [-1, 0, 0, 1, 1, 2, 3]
CHAIN = list(range(-1, 15))


def blocks_of(paged: Any, select_block: int) -> list[int]:
    """How many selection blocks each row's keys touch."""
    return [-(-len(slots) // select_block) for slots in paged.slots]


def list_up(chosen: list[list[list[int]]], select_block: int, device: torch.device, room: int = 2) -> BlockLists:
    """Lists of the chosen blocks [B][Hkv], with `room` entries more than the longest, which hold what is not chosen."""
    width = max(len(blocks) for row in chosen for blocks in row) + room
    blocks = torch.zeros(len(chosen), len(chosen[0]), width, dtype=torch.int32)
    for row, heads in enumerate(chosen):
        for head, listed in enumerate(heads):
            blocks[row, head, : len(listed)] = torch.tensor(listed)
    counts = torch.tensor([[len(listed) for listed in row] for row in chosen], dtype=torch.int32)
    return BlockLists(blocks.to(device), counts.to(device), select_block)


def all_blocks(paged: Any, select_block: int) -> BlockLists:
    heads = paged.key_cache.shape[2]
    chosen = [[list(range(count))] * heads for count in blocks_of(paged, select_block)]
    return list_up(chosen, select_block, paged.query.device)


def some_blocks(paged: Any, select_block: int, share: float) -> BlockLists:
    """Some of the complete blocks, others for each head, and all that new tokens are in."""
    generator = torch.Generator().manual_seed(len(paged.seen))
    chosen: list[list[list[int]]] = []
    for count, context in zip(blocks_of(paged, select_block), paged.seqs.context_lens.tolist(), strict=True):
        first = context // select_block
        picks = torch.rand(paged.key_cache.shape[2], first, generator=generator) < share
        chosen.append([[*torch.nonzero(pick)[:, 0].tolist(), *range(first, count)] for pick in picks])
    return list_up(chosen, select_block, paged.query.device)


def wanted(paged: Any, lists: BlockLists) -> torch.Tensor:
    values = paged.value_cache.flatten(0, 1).double().cpu()
    groups = paged.query.shape[1] // values.shape[1]
    outputs = []
    for scores, (row, _) in zip(paged.scores(SCALE), paged.seen, strict=True):
        block = torch.arange(scores.shape[1]) // lists.select_block
        for head in range(values.shape[1]):
            listed = lists.blocks[row, head, : lists.counts[row, head]].cpu()
            scores[head * groups : (head + 1) * groups, ~torch.isin(block, listed)] = -torch.inf
        value = values[paged.slots[row]].repeat_interleave(groups, dim=1)
        outputs.append(torch.einsum("hl,lhd->hd", torch.softmax(scores, dim=1), value))
    return torch.stack(outputs)


CASES = [
    pytest.param([5, 0, 67, 200], [1, 1, 1, 1], None, id="decode"),
    pytest.param([3, 150, 30, 8], [5, 5, 5, 5], None, id="verify"),
    pytest.param([40, 0, 130, 8], [4, 17, 1, 2], None, id="ragged"),
    pytest.param([64, 31, 33], [17, 17, 17], [CHAIN, CHAIN, CHAIN], id="chains"),
    pytest.param([160, 9, 30], [8, 7, 5], [TREE, TREE, [-1, 0, 0]], id="trees"),
]


@pytest.mark.parametrize("select_block", [4, 16])
@pytest.mark.parametrize(("contexts", "news", "parents"), CASES)
def test_the_reference_is_a_softmax_over_the_listed_keys(
    make_paged: Callable[..., Any],
    contexts: list[int],
    news: list[int],
    parents: list[list[int]] | None,
    select_block: int,
) -> None:
    paged = make_paged(contexts, news, parents=parents)
    lists = some_blocks(paged, select_block, 0.4)
    output = sparse_attention_reference(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    torch.testing.assert_close(output.double(), wanted(paged, lists), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("contexts", "news", "parents"), CASES)
def test_lists_of_all_blocks_are_paged_attention(
    make_paged: Callable[..., Any], contexts: list[int], news: list[int], parents: list[list[int]] | None
) -> None:
    paged = make_paged(contexts, news, parents=parents)
    output = sparse_attention_reference(paged.query, *paged.caches, paged.seqs, all_blocks(paged, 8), scale=SCALE)
    dense = paged_attention_reference(
        paged.query, *paged.caches, paged.seqs, scale=SCALE, sliding_window=None, softcap=None
    )
    torch.testing.assert_close(output, dense)


def test_a_row_that_lists_nothing_gets_nothing(make_paged: Callable[..., Any]) -> None:
    paged = make_paged([20, 9], [1, 2])
    lists = all_blocks(paged, 4)
    lists.counts[1] = 0
    output = sparse_attention_reference(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    assert output[0].abs().min() > 0 and output[1:].abs().max() == 0

"""Sparse attention, reference and kernel, against a softmax over the listed keys in float64, one token at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import sparse_attention_triton
from kernels.attention import paged_attention_reference
from kernels.attention_plan import Launch
from kernels.select import BlockLists
from kernels.sparse_attention import sparse_attention, sparse_attention_reference

SCALE = 0.3
TREE = [-1, 0, 0, 1, 1, 2, 3]
CHAIN = list(range(-1, 15))


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")


def interpreted(*args: Any, **options: Any) -> torch.Tensor:
    """The kernel in small steps and runs, so that few blocks are cut into several."""
    launch = Launch(block_m=16, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1, fold=True)
    return sparse_attention_triton.sparse_attention_triton(*args, launch=launch, min_chunk=16, **options)


KERNELS = [
    pytest.param(sparse_attention_reference, id="reference"),
    pytest.param(interpreted, id="interpreted", marks=on_cpu),
]


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
    pytest.param([5, 0, 120], [1, 1, 1], None, id="decode"),
    pytest.param([3, 60], [5, 5], None, id="verify"),
    pytest.param([40, 0, 8], [4, 7, 2], None, id="ragged"),
    pytest.param([31], [17], [CHAIN], id="chain"),
    pytest.param([50, 9], [8, 5], [TREE, [-1, 0, 0]], id="trees"),
]


def check(attend: Callable[..., torch.Tensor], paged: Any, lists: BlockLists, tolerance: float = 1e-5) -> None:
    output = attend(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    torch.testing.assert_close(output.double().cpu(), wanted(paged, lists), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("select_block", [4, 32])
@pytest.mark.parametrize(("contexts", "news", "parents"), CASES)
@pytest.mark.parametrize("attend", KERNELS)
def test_new_tokens_attend_to_the_listed_keys_they_see(
    make_paged: Callable[..., Any],
    attend: Callable[..., torch.Tensor],
    contexts: list[int],
    news: list[int],
    parents: list[list[int]] | None,
    select_block: int,
) -> None:
    paged = make_paged(contexts, news, parents=parents, block_size=32)
    check(attend, paged, some_blocks(paged, select_block, 0.4))


@pytest.mark.parametrize(("contexts", "news", "parents"), CASES)
@pytest.mark.parametrize("attend", KERNELS)
def test_lists_of_all_blocks_are_paged_attention(
    make_paged: Callable[..., Any],
    attend: Callable[..., torch.Tensor],
    contexts: list[int],
    news: list[int],
    parents: list[list[int]] | None,
) -> None:
    paged = make_paged(contexts, news, parents=parents)
    output = attend(paged.query, *paged.caches, paged.seqs, all_blocks(paged, 8), scale=SCALE)
    dense = paged_attention_reference(
        paged.query, *paged.caches, paged.seqs, scale=SCALE, sliding_window=None, softcap=None
    )
    torch.testing.assert_close(output, dense)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 2)])
@pytest.mark.parametrize("attend", KERNELS)
def test_any_number_of_query_heads_shares_a_list(
    make_paged: Callable[..., Any], attend: Callable[..., torch.Tensor], heads: tuple[int, int]
) -> None:
    paged = make_paged([70, 64, 3], [5, 1, 2], heads=heads, head_dim=24)
    check(attend, paged, some_blocks(paged, 16, 0.5))


@pytest.mark.parametrize("attend", KERNELS)
def test_lists_of_very_unequal_lengths_are_all_read(
    make_paged: Callable[..., Any], attend: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the counts of all lists are more than a program looks at together."""
    monkeypatch.setattr(sparse_attention_triton, "MAX_BLOCK_U", 8)
    contexts = [250, 0, 17, 1, 90, 33, 5, 64, 2, 40]
    paged = make_paged(contexts, [1] * 10, heads=(4, 2))
    check(attend, paged, some_blocks(paged, 8, 0.7))


@pytest.mark.parametrize("attend", KERNELS)
def test_a_row_that_lists_nothing_gets_nothing(
    make_paged: Callable[..., Any], attend: Callable[..., torch.Tensor]
) -> None:
    paged = make_paged([20, 9, 130], [1, 2, 1])
    lists = all_blocks(paged, 4)
    lists.counts[1] = 0
    output = attend(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    assert output[0].abs().min() > 0 and output[1:3].abs().max() == 0 and output[3].abs().min() > 0


@pytest.mark.parametrize("attend", KERNELS)
def test_rows_without_a_sequence_may_list_anything(
    make_paged: Callable[..., Any], attend: Callable[..., torch.Tensor]
) -> None:
    """What stands past a list's end, and in lists of nobody, changes no other row and reads nothing outside."""
    paged = make_paged([70, 9, 33], [1, 1, 1])
    lists = some_blocks(paged, 4, 0.5)
    before = attend(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    exists = torch.arange(lists.blocks.shape[2]) < lists.counts[:, :, None]
    lists.blocks[~exists] = 1 << 28
    lists.blocks[1] = torch.tensor([-(1 << 28), 1 << 28]).repeat(lists.blocks.shape[2])[: lists.blocks.shape[2]]
    lists.counts[1] = torch.tensor([1 << 20, -5])
    after = attend(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    assert after.isfinite().all()
    torch.testing.assert_close(before[::2], after[::2])


@pytest.mark.parametrize("attend", KERNELS)
def test_slots_that_are_not_listed_do_not_leak(
    make_paged: Callable[..., Any], attend: Callable[..., torch.Tensor]
) -> None:
    paged = make_paged([70, 9], [2, 1], heads=(2, 1))
    lists = some_blocks(paged, 4, 0.5)
    before = attend(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    others = torch.ones(paged.key_cache.shape[0] * paged.seqs.block_size, dtype=torch.bool)
    for row, slots in enumerate(paged.slots):
        listed = lists.blocks[row, 0, : lists.counts[row, 0]]
        others[slots[torch.isin(torch.arange(len(slots)) // 4, listed)]] = False
    for cache in paged.caches:
        cache.flatten(0, 1)[others] = 1e4
    after = attend(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE)
    torch.testing.assert_close(before, after)


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
def test_layers_share_the_room_of_a_forward_and_leave_it_as_it_was(make_paged: Callable[..., Any]) -> None:
    paged = make_paged([200, 3], [1, 1])
    lists = all_blocks(paged, 8)
    first, second = (interpreted(paged.query, *paged.caches, paged.seqs, lists, scale=SCALE) for _ in range(2))
    (room,) = paged.seqs.rooms.values()
    assert torch.equal(first, second) and not room.arrived.any()


GPU_SHAPES = [
    pytest.param([9000, 64, 5, 700], [1, 1, 1, 1], None, id="decode"),
    pytest.param([3000, 64, 0], [17, 17, 17], None, id="verify"),
    pytest.param([3000, 64, 9], [5, 3, 8], [TREE[:4], TREE[:2], TREE], id="trees"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 2), 128), ((9, 3), 64), ((2, 2), 80), ((4, 1), 256)])
@pytest.mark.parametrize(("contexts", "news", "parents"), GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_on_the_gpu(
    make_paged: Callable[..., Any],
    dtype: torch.dtype,
    contexts: list[int],
    news: list[int],
    parents: list[list[int]] | None,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    paged = make_paged(
        contexts, news, parents=parents, heads=heads, head_dim=head_dim, block_size=64, device="cuda", dtype=dtype
    )
    for select_block in (16, 64):
        lists = some_blocks(paged, select_block, 0.3)
        check(sparse_attention, paged, lists, 1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
def test_a_captured_graph_attends_to_the_lists_it_finds_when_it_is_replayed(make_paged: Callable[..., Any]) -> None:
    paged = make_paged(
        [4000, 64, 5, 700], [1] * 4, heads=(16, 2), head_dim=128, block_size=64, device="cuda", dtype=torch.bfloat16
    )
    full = all_blocks(paged, 64)
    lists = BlockLists(full.blocks.clone(), full.counts.clone(), 64)
    seqs = replace(paged.seqs, rooms={})

    def layers() -> list[torch.Tensor]:
        return [sparse_attention(paged.query, *paged.caches, seqs, lists, scale=SCALE) for _ in range(3)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()  # compiles
    torch.cuda.synchronize()
    seqs.rooms.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layers()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        few = some_blocks(paged, 64, float(torch.rand(1, generator=generator)))
        lists.blocks[:, :, : few.blocks.shape[2]] = few.blocks[:, :, : lists.blocks.shape[2]]
        lists.counts.copy_(few.counts)
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        for output in outputs:
            torch.testing.assert_close(output.double().cpu(), wanted(paged, lists), atol=3e-2, rtol=3e-2)

"""Lists of blocks against a choice written out in Python, one list at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import PagedSequences, paged_sequences
from kernels.select import BlockLists, Choice, choose_blocks, choose_blocks_reference, newest_blocks
from kernels.select_triton import choose_blocks_triton

BLOCK_SIZE = 16
SELECT_BLOCK = 4


@dataclass(frozen=True)
class Kernel:
    """One way to choose, and where."""

    choose: Callable[..., BlockLists]
    device: str


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
KERNELS = [
    pytest.param(Kernel(choose_blocks_reference, "cpu"), id="reference"),
    pytest.param(Kernel(choose_blocks_triton, "cpu"), id="triton", marks=on_cpu),
    pytest.param(Kernel(choose_blocks, "cuda"), id="cuda", marks=pytest.mark.gpu),
]


def sequences(contexts: list[int], news: list[int], *, device: str, max_context: int | None = None) -> PagedSequences:
    """Sequences whose blocks lie one after another; a bound on their lengths may be far above them."""
    bound = max(contexts) if max_context is None else max_context
    width = -(-(bound + max(news)) // BLOCK_SIZE)
    tables = torch.arange(len(contexts) * width, dtype=torch.int32).view(-1, width)
    slots = [
        tables[row].long()[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE
        for row, (context, new) in enumerate(zip(contexts, news, strict=True))
        for index in [torch.arange(context, context + new)]
    ]
    starts = torch.tensor([0, *news]).cumsum(0).int()
    return paged_sequences(
        cu_seqlens_q=starts.to(device),
        max_seqlen_q=max(news),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        max_context=bound,
        block_tables=tables.to(device),
        slots=torch.cat(slots).to(device),
        block_size=BLOCK_SIZE,
    )


def wanted(scores: list[float], context: int, new: int, choice: Choice, select_block: int = SELECT_BLOCK) -> list[int]:
    """The definition, a list at a time."""
    total = -(-(context + new) // select_block)
    complete = context // select_block
    always = [i for i in range(total) if i < choice.sinks or i >= complete - choice.recent]
    others = sorted(set(range(total)) - set(always), key=lambda i: (scores[i], i), reverse=True)
    ranking = always + others
    wanted = math.floor(total * (round(choice.share * 65536) / 65536) + 0.5)
    wanted = min(max(wanted, choice.budget_blocks), choice.max_blocks)
    if choice.threshold is not None:
        passing = always + [i for i in others if scores[i] > choice.threshold]
        wanted = min(len(passing), wanted)
    return sorted(ranking[: max(wanted, len(always))])


def check(lists: BlockLists, wanted_lists: list[list[list[int]]], room: int) -> None:
    blocks, counts = lists.blocks.cpu(), lists.counts.cpu()
    assert blocks.dtype == counts.dtype == torch.int32
    assert blocks.shape == (len(wanted_lists), len(wanted_lists[0]), room)
    assert [[b[:c].tolist() for b, c in zip(*row, strict=True)] for row in zip(blocks, counts, strict=True)] == (
        wanted_lists
    )


@st.composite
def cases(draw: Any) -> tuple[list[int], list[int], int, Choice, torch.Tensor]:
    """Contexts, new tokens, a bound on the contexts, a choice with room for them, and scores full of ties."""
    num_sequences = draw(st.integers(1, 3))
    contexts = draw(st.lists(st.integers(0, 150), min_size=num_sequences, max_size=num_sequences))
    news = draw(st.lists(st.integers(0, 9), min_size=num_sequences, max_size=num_sequences).filter(any))
    bound = draw(st.sampled_from([max(contexts), 160]))
    num_blocks = sequences(contexts, news, device="cpu", max_context=bound).block_tables.shape[1] * 4
    sinks, recent = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    max_blocks = draw(st.integers(sinks + recent + 4, 50))
    budget = draw(st.integers(0, max_blocks))
    choice = Choice(
        max_blocks=max_blocks,
        budget_blocks=budget,
        threshold=draw(st.sampled_from([None, -0.5, 0.0, 1.0])),
        share=draw(st.sampled_from([0.0, 0.1, 0.37, 1.0])),
        sinks=sinks,
        recent=recent,
    )
    # by a seed: drawn one by one, scores would take most of the test's time
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.tensor([-math.inf, -1e30, -1.0, -0.5, -0.0, 0.0, 1e-30, 1.0, 1.5, math.inf])
    scores = values[torch.randint(len(values), (num_sequences, 2, num_blocks), generator=generator)]
    return contexts, news, bound, choice, scores


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40)
@given(case=cases())
def test_lists_are_the_always_read_and_the_best_of_the_rest(
    kernel: Kernel, case: tuple[list[int], list[int], int, Choice, torch.Tensor]
) -> None:
    contexts, news, bound, choice, scores = case
    seqs = sequences(contexts, news, device=kernel.device, max_context=bound)
    lists = kernel.choose(scores.to(kernel.device), seqs, choice, select_block=SELECT_BLOCK)
    rows = zip(scores.tolist(), contexts, news, strict=True)
    expected = [[wanted(head, context, new, choice) for head in heads] for heads, context, new in rows]
    check(lists, expected, min(choice.max_blocks, -(-(bound + max(news)) // SELECT_BLOCK)))
    for blocks, count in zip(lists.blocks.flatten(0, 1).tolist(), lists.counts.flatten().tolist(), strict=True):
        assert blocks[:count] == sorted(set(blocks[:count]))
        assert all(0 <= block < scores.shape[2] for block in blocks)


@pytest.mark.parametrize("num_blocks", [7, 300, 1500])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_best_of_many_scores_are_found(kernel: Kernel, num_blocks: int) -> None:
    torch.manual_seed(num_blocks)
    contexts, news = [num_blocks * SELECT_BLOCK - 1, num_blocks * SELECT_BLOCK // 2 + 1], [1, 1]
    seqs = sequences(contexts, news, device=kernel.device)
    choice = Choice(max_blocks=60, budget_blocks=40, sinks=1, recent=1)
    scores = torch.randn(2, 3, num_blocks) * torch.tensor([1e-4, 1.0, 1e4])[:, None]
    lists = kernel.choose(scores.to(kernel.device), seqs, choice, select_block=SELECT_BLOCK)
    rows = zip(scores.tolist(), contexts, news, strict=True)
    expected = [[wanted(head, context, new, choice) for head in heads] for heads, context, new in rows]
    check(lists, expected, min(60, num_blocks))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_lies_past_the_complete_blocks_is_not_looked_at(kernel: Kernel) -> None:
    torch.manual_seed(0)
    contexts, news = [50, 0, 97, 64], [3, 3, 3, 3]
    seqs = sequences(contexts, news, device=kernel.device, max_context=300)
    choice = Choice(max_blocks=9, budget_blocks=9, recent=1)
    scores = torch.randn(4, 2, 80)
    before = kernel.choose(scores.to(kernel.device), seqs, choice, select_block=SELECT_BLOCK)
    for row, context in enumerate(contexts):
        scores[row, :, context // SELECT_BLOCK :] = math.nan
    after = kernel.choose(scores.to(kernel.device), seqs, choice, select_block=SELECT_BLOCK)
    assert torch.equal(before.counts, after.counts) and torch.equal(before.blocks, after.blocks)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_without_a_score_come_after_those_that_have_one(kernel: Kernel) -> None:
    seqs = sequences([120], [1], device=kernel.device)
    choice = Choice(max_blocks=31, budget_blocks=12, recent=2)
    scores = torch.arange(10, 0, -1.0).expand(1, 1, 10).to(kernel.device)
    lists = kernel.choose(scores, seqs, choice, select_block=SELECT_BLOCK)
    check(lists, [[[*range(9), 28, 29, 30]]], 31)
    lists = kernel.choose(scores, seqs, replace(choice, budget_blocks=15), select_block=SELECT_BLOCK)
    check(lists, [[[*range(10), 26, 27, 28, 29, 30]]], 31)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_scores_the_list_is_sinks_and_a_window(kernel: Kernel) -> None:
    seqs = sequences([121, 5], [1, 1], device=kernel.device)
    choice = Choice(max_blocks=8, budget_blocks=8, sinks=2)
    expected = [[[0, 1, *range(25, 31)]] * 2, [[0, 1]] * 2]
    equal = torch.zeros(1, device=kernel.device)
    check(newest_blocks(equal, seqs, choice, num_kv_heads=2, select_block=SELECT_BLOCK), expected, 8)
    check(kernel.choose(equal.expand(2, 2, 31), seqs, choice, select_block=SELECT_BLOCK), expected, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_budget_grows_with_the_sequence(kernel: Kernel) -> None:
    contexts = [7, 199, 1999, 3999]
    seqs = sequences(contexts, [1] * 4, device=kernel.device)
    choice = Choice(max_blocks=90, budget_blocks=10, share=0.1)
    scores = torch.randn(4, 1, 1000, device=kernel.device)
    lists = kernel.choose(scores, seqs, choice, select_block=SELECT_BLOCK)
    assert lists.counts.flatten().tolist() == [2, 10, 50, 90]


def test_listed_blocks_are_those_before_the_counts() -> None:
    lists = BlockLists(torch.tensor([[[0, 2, 3], [1, 5, 0]]]).int(), torch.tensor([[2, 2]]).int(), SELECT_BLOCK)
    assert lists.listed(4).int().tolist() == [[[1, 0, 1, 0], [0, 1, 0, 0]]]


def test_a_list_without_room_for_what_is_always_read_is_refused() -> None:
    seqs = sequences([121], [9], device="cpu")
    with pytest.raises(AssertionError, match="no room for 3 blocks of 9 new tokens"):
        choice = Choice(max_blocks=4, budget_blocks=4, sinks=1, recent=1)
        newest_blocks(torch.zeros(1), seqs, choice, num_kv_heads=1, select_block=SELECT_BLOCK)

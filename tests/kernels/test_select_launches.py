"""Scoring and choosing are two launches, and replay in a captured graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import describe_triton, scores_triton, select_triton
from kernels.attention import PagedSequences, paged_sequences
from kernels.describe import describe, empty_descriptors
from kernels.select import BlockLists, Choice, bound_scores, choose_blocks, choose_blocks_reference
from kernels.select_triton import choose_blocks_triton

SELECT_BLOCK, BLOCK_SIZE, WIDTH = 16, 64, 40
CHOICE = Choice(max_blocks=32, budget_blocks=24, sinks=1, recent=2)


def sequences(contexts: list[int], device: str) -> PagedSequences:
    count = len(contexts)
    return paged_sequences(
        cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32, device=device),
        max_seqlen_q=1,
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        max_context=WIDTH * BLOCK_SIZE - 1,
        block_tables=torch.arange(count * WIDTH, dtype=torch.int32, device=device).view(count, WIDTH),
        slots=torch.zeros(count, dtype=torch.int64, device=device),
        block_size=BLOCK_SIZE,
    )


def test_scores_and_lists_are_a_launch_each(
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Callable[[], object]], int],
    counted: Callable[[str, list[str]], object],
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(scores_triton, "_score_kernel", counted("score", launched))
    monkeypatch.setattr(select_triton, "_choose_kernel", counted("choose", launched))
    query, minmax = torch.zeros(2, 4, 8), torch.zeros(2 * WIDTH, BLOCK_SIZE // SELECT_BLOCK, 2, 16)
    seqs = sequences([900, 5], "cpu")

    def select() -> BlockLists:
        scores = scores_triton.bound_scores_triton(query, minmax, seqs)
        return choose_blocks_triton(scores, seqs, CHOICE, select_block=SELECT_BLOCK)

    assert launches(select) == 0
    assert launched == ["score", "choose"]


def test_all_layers_are_described_in_one_launch(
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Callable[[], object]], int],
    counted: Callable[[str, list[str]], object],
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(describe_triton, "_describe_kernel", counted("describe", launched))
    storage = torch.zeros(7, 2, 4, BLOCK_SIZE, 2, 8)
    out = empty_descriptors("minmax", storage, select_block=SELECT_BLOCK)
    options: dict[str, Any] = {"block_tables": torch.zeros(2, 2, dtype=torch.int32), "max_tokens": 9}
    begins, ends = torch.tensor([3, 60], dtype=torch.int32), torch.tensor([4, 69], dtype=torch.int32)
    assert (
        launches(lambda: describe_triton.describe_triton("minmax", storage, out, begins=begins, ends=ends, **options))
        == 0
    )
    assert launched == ["describe"]


@pytest.mark.gpu
def test_a_captured_selection_replays_for_other_contexts() -> None:
    torch.manual_seed(0)
    contexts = [[900, 2000], [2559, 17]]
    storage = torch.randn(3, 2, 2 * WIDTH, BLOCK_SIZE, 2, 64, device="cuda", dtype=torch.bfloat16)
    minmax = empty_descriptors("minmax", storage, select_block=SELECT_BLOCK)
    query = torch.randn(2, 8, 64, device="cuda", dtype=torch.bfloat16)
    seqs = sequences(contexts[0], "cuda")
    begins = torch.zeros(2, dtype=torch.int32, device="cuda")

    def select() -> tuple[torch.Tensor, BlockLists]:
        tables, ends = seqs.block_tables, seqs.context_lens
        describe("minmax", storage, minmax, block_tables=tables, begins=begins, ends=ends, max_tokens=seqs.max_context)
        scores = bound_scores(query, minmax[1], seqs)
        return scores, choose_blocks(scores, seqs, CHOICE, select_block=SELECT_BLOCK)

    select()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, lists = select()
    for row in contexts:
        seqs.context_lens.copy_(torch.tensor(row))
        query.normal_()
        graph.replay()
        exact = bound_scores(query, minmax[1], seqs).cpu()
        wanted = choose_blocks_reference(exact, sequences(row, "cpu"), CHOICE, select_block=SELECT_BLOCK)
        complete = [length // SELECT_BLOCK for length in row]
        for index, count in enumerate(complete):
            assert torch.equal(scores[index, :, :count].cpu(), exact[index, :, :count])
        is_listed = torch.arange(lists.blocks.shape[2]) < wanted.counts[:, :, None]
        assert torch.equal(lists.counts.cpu(), wanted.counts)
        assert torch.equal(lists.blocks.cpu()[is_listed], wanted.blocks[is_listed])

"""A gate's scores and lists take two launches, its descriptors one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import gate_compress_triton, gate_queries_triton, gate_triton
from kernels.attention import paged_sequences
from kernels.gate import GateWeights, Rotation, empty_compressed
from kernels.select import BlockLists, Choice


def make_weights() -> GateWeights:
    """Of 3 layers, 4 query and 2 key heads of 8."""
    rotation = Rotation(torch.ones(4), 1.0)
    weights = torch.zeros(3, 2, 2, 8, 8), torch.zeros(3, 2, 24, 8), torch.ones(3, 8), torch.ones(3, 8)
    return GateWeights(*weights, rotation=rotation, gate_rotation=rotation, eps=1e-6)


def test_scores_and_lists_are_two_launches(
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Callable[[], object]], int],
    counted: Callable[[str, list[str]], object],
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(gate_queries_triton, "_merge_kernel", counted("merge", launched))
    monkeypatch.setattr(gate_triton, "_score_kernel", counted("score", launched))
    seqs = paged_sequences(
        cu_seqlens_q=torch.arange(3, dtype=torch.int32),
        max_seqlen_q=1,
        context_lens=torch.tensor([900, 5], dtype=torch.int32),
        max_context=1000,
        block_tables=torch.zeros(2, 20, dtype=torch.int32),
        slots=torch.zeros(2, dtype=torch.int64),
        block_size=64,
    )
    weights, descriptors = make_weights(), torch.zeros(9, 1, 2, 8)
    query, positions = torch.zeros(2, 4, 8), torch.tensor([900, 5])
    choice = Choice(max_blocks=8, budget_blocks=8)

    def choose() -> BlockLists:
        return gate_triton.gate_choose_triton(weights, 1, query, positions, descriptors, seqs, choice)

    assert launches(choose) == 0
    assert launched == ["merge", "score"]


def test_all_layers_are_compressed_in_one_launch(
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Callable[[], object]], int],
    counted: Callable[[str, list[str]], object],
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(gate_compress_triton, "_compress_kernel", counted("compress", launched))
    weights, storage = make_weights(), torch.zeros(3, 2, 4, 64, 2, 8)
    out = empty_compressed(weights, storage, select_block=16)
    options: dict[str, Any] = {"block_tables": torch.zeros(2, 2, dtype=torch.int32), "max_tokens": 9}
    begins, ends = torch.tensor([3, 60], dtype=torch.int32), torch.tensor([4, 69], dtype=torch.int32)
    compress = gate_compress_triton.compress_triton
    assert launches(lambda: compress(weights, storage, out, begins=begins, ends=ends, **options)) == 0
    assert launched == ["compress"]

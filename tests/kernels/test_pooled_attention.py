"""Pooled attention, reference and kernel, against attention written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.attention import PackedSequences
from kernels.pooled_attention import block_weights, pooled_attention, pooled_attention_reference
from kernels.pooled_attention_triton import pooled_attention_triton

SCALE, SELECT = 0.3, 16


def small_tiles(*args: Any, **options: Any) -> Any:
    return pooled_attention_triton(*args, block_m=32, **options)


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
KERNELS = [
    pytest.param(pooled_attention_reference, "cpu", torch.float32, 1e-5, id="reference"),
    pytest.param(small_tiles, "cpu", torch.float32, 1e-5, id="triton", marks=on_cpu),
    pytest.param(pooled_attention, "cuda", torch.bfloat16, 3e-2, id="bfloat16", marks=pytest.mark.gpu),
]
LENGTHS = [[1], [16, 33], [50, 3, 32], [70]]


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("attend", "device", "dtype", "tolerance"), KERNELS)
def test_output_block_maxima_and_lse_are_those_of_attention_written_out(
    attend: Callable[..., Any],
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    lengths: list[int],
    heads: tuple[int, int],
) -> None:
    total, groups, dim = sum(lengths), heads[0] // heads[1], 20
    torch.manual_seed(total)
    # heads before tokens in memory, as transformers hands queries over
    query, key, value = (
        torch.randn(count, total, dim).to(device, dtype).transpose(0, 1) for count in (heads[0], heads[1], heads[1])
    )
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    seqs = PackedSequences(cu_seqlens, max(lengths))
    output, scores, lse = attend(query, key, value, seqs, scale=SCALE, select_block=SELECT)
    num_blocks = -(-max(lengths) // SELECT)
    assert scores.shape == (total, heads[0], num_blocks) and lse.shape == (total, heads[0])
    begin = 0
    for length in lengths:
        q, k, v = (x[begin : begin + length].double().cpu() for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        wanted = torch.einsum("qhd,khd->qhk", q, k) * SCALE
        index = torch.arange(length)
        wanted = wanted.masked_fill(index > index[:, None, None], -torch.inf)
        blocks = torch.full((length, heads[0], num_blocks), -torch.inf, dtype=torch.float64)
        for block, part in enumerate(wanted.split(SELECT, dim=2)):
            blocks[:, :, block] = part.amax(dim=2)
        ours = slice(begin, begin + length)
        attended = torch.einsum("qhk,khd->qhd", wanted.softmax(dim=2), v)
        for found, right in (
            (output[ours], attended),
            (scores[ours], blocks),
            (lse[ours], wanted.logsumexp(dim=2)),
            (
                block_weights(scores, lse, num_kv_heads=heads[1])[ours],
                (blocks - wanted.logsumexp(dim=2)[:, :, None]).exp().unflatten(1, (heads[1], groups)).amax(dim=2),
            ),
        ):
            torch.testing.assert_close(found.double().cpu(), right, atol=tolerance, rtol=tolerance)
        begin += length


@pytest.mark.parametrize(("attend", "device", "dtype", "tolerance"), KERNELS)
def test_blocks_that_a_token_does_not_see_weigh_nothing(
    attend: Callable[..., Any], device: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(40, 2, 16).to(device, dtype) for _ in range(3))
    seqs = PackedSequences(torch.tensor([0, 40], dtype=torch.int32, device=device), 40)
    _, scores, lse = attend(query, key, value, seqs, scale=SCALE, select_block=SELECT)
    weights = block_weights(scores, lse, num_kv_heads=2)
    assert not weights[:16, :, 1:].any() and not weights[16:32, :, 2:].any()
    assert (weights[16:, :, 0] > 0).all()
    assert weights.isfinite().all()


def test_a_chunk_of_query_tokens_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(50, heads, 16) for heads in (4, 2, 2))
    seqs = PackedSequences(torch.tensor([0, 37, 50], dtype=torch.int32), 37)
    whole = pooled_attention_reference(query, key, value, seqs, scale=SCALE, select_block=SELECT)
    monkeypatch.setattr("kernels.pooled_attention.CHUNK_ELEMENTS", 4 * 37 * 5)
    for chunked, at_once in zip(
        pooled_attention_reference(query, key, value, seqs, scale=SCALE, select_block=SELECT), whole, strict=True
    ):
        torch.testing.assert_close(chunked, at_once, atol=1e-6, rtol=1e-6)

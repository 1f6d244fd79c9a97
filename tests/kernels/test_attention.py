"""Packed attention against attention written out in float64, one query token at a time."""

from typing import Any

import pytest
import torch

from kernels.attention import PackedSequences, packed_attention

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3
VARIANTS = [(None, None), (4, None), (None, 2.0), (5, 1.5)]  # sliding_window, softcap


def attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """One token's attention to the keys it sees. query [Hq, D]; keys, values [L, Hkv, D]. Returns [Hq, D] float64."""
    groups = HEADS // KV_HEADS
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hl,lhd->hd", torch.softmax(scores, dim=1), values)


def packed_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    outputs, start = [], 0
    for length in lengths:
        for index in range(length):
            seen = slice(start + (0 if window is None else max(0, index + 1 - window)), start + index + 1)
            outputs.append(attend_one(query[start + index], key[seen], value[seen], softcap))
        start += length
    return torch.stack(outputs)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize("lengths", [[1], [7, 1, 13], [4, 4]])
def test_packed_attention_and_its_gradients_equal_the_definition(
    lengths: list[int], window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    seqs = PackedSequences(cumulative(lengths), max(lengths))
    output = packed_attention(query, key, value, seqs, scale=SCALE, sliding_window=window, softcap=softcap)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = packed_reference(q, k, v, lengths, window, softcap)
    torch.testing.assert_close(output, wanted.float(), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (wanted * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_in_bfloat16_on_the_gpu_equals_the_definition(window: int | None) -> None:
    lengths = [7, 1, 130]
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, 64) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = inputs = [torch.randn(shape, **options) for shape in shapes]
    seqs = PackedSequences(cumulative(lengths).cuda(), max(lengths))
    output = packed_attention(query, key, value, seqs, scale=SCALE, sliding_window=window, softcap=None)
    q, k, v = exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    wanted = packed_reference(q, k, v, lengths, window, None)
    torch.testing.assert_close(output.cpu().double(), wanted, atol=3e-2, rtol=3e-2)
    weight = torch.randn_like(wanted)
    (output * weight.to(output)).sum().backward()
    (wanted * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, atol=1e-1, rtol=5e-2)

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Products of a few tokens with weights of eight bits, as a Triton kernel; kernels/lowbit.py defines what they compute.

As in kernels/linear_triton.py a program streams its rows of the weight through a pipeline of tiles, and the product is
weight tile x tokens^T. The eight bits are widened in registers, on their way from the pipeline to the tensor cores: 16
bits hold them exactly, and a row's scale is multiplied in once, at the end.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import Tile
from kernels.linear_triton import join, overlaps, silu_mul, split_room
from kernels.lowbit import LowBit


def linear_triton(
    x: torch.Tensor,
    weight: LowBit,
    *,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    """linear, in one launch. With split_k > 1, calls on one device must be ordered: they share arrival counters."""
    return _launch(x, weight, None, bias=bias, residual=residual, tile=tile)


def gated_linear_triton(x: torch.Tensor, gate: LowBit, up: LowBit, *, tile: Tile) -> torch.Tensor:
    """gated_linear, in one launch."""
    assert tile.split_k == 1 and gate.values.shape == up.values.shape
    return _launch(x, gate, up, bias=None, residual=None, tile=tile)


def _launch(
    x: torch.Tensor,
    weight: LowBit,
    up: LowBit | None,
    *,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    num_tokens, num_columns = x.shape
    num_features = len(weight.values)
    assert num_columns % (tile.block_k * tile.split_k) == 0, (num_columns, tile)
    assert x.stride(1) == 1 and weight.values.is_contiguous() and weight.scales.is_contiguous()
    assert tile.slices == 1 and tile.block_m >= 8, tile
    out = x.new_empty(num_tokens, num_features)
    grid = (triton.cdiv(num_tokens, tile.block_m), triton.cdiv(num_features, tile.block_n), tile.split_k)
    parts, arrivals = split_room(out, grid, tile)
    overlap = overlaps(x.device)
    second = weight if up is None else up
    _lowbit_kernel[grid](
        x,
        weight.values,
        second.values,
        weight.scales,
        second.scales,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        parts,
        arrivals,
        num_tokens,
        num_features,
        num_columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        GATED=up is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        OVERLAP=overlap,
        STAGES=tile.num_stages,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=overlap,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _lowbit_kernel(
    x_ptr,
    weight_ptr,
    up_ptr,
    scale_ptr,
    up_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    num_tokens,
    num_features,
    num_columns,
    x_stride,
    residual_stride,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # programs of the same weight rows run side by side, so all but the first find them in L2
    block_m, block_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = x_ptr.dtype.element_ty
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    # counted in blocks, so that the compiler sees what divides these
    num_blocks = num_columns // (BLOCK_K * SPLIT_K)
    k_start, k_end = split * num_blocks * BLOCK_K, (split + 1) * num_blocks * BLOCK_K
    is_feature = features < num_features
    if OVERLAP:
        gdc_wait()

    inside = (tokens[:, None] < num_tokens) & is_feature[None, :]
    if RESIDUAL:  # asked for here, for at the end everyone would wait for it
        residual_ptrs = residual_ptr + tokens[:, None].to(tl.int64) * residual_stride + features[None, :]
        residual = tl.load(residual_ptrs, mask=inside, other=0.0)
    is_token = tokens[:, None] < num_tokens
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * x_stride + column[None, :]
    rows = tl.minimum(features, num_features - 1)[:, None].to(tl.int64) * num_columns + column[None, :]
    weight_ptrs, up_ptrs = weight_ptr + rows, up_ptr + rows

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = acc
    for k in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_ptrs + k)
        tile = tl.load(x_ptrs + k, mask=is_token, other=0.0)
        acc = tl.dot(weight.to(dtype), tl.trans(tile), acc, input_precision=PRECISION)
        if GATED:
            up = tl.load(up_ptrs + k)
            acc_up = tl.dot(up.to(dtype), tl.trans(tile), acc_up, input_precision=PRECISION)

    if OVERLAP:
        gdc_launch_dependents()
    is_last = True
    if SPLIT_K > 1:
        place = block_n * tl.num_programs(0) + block_m
        acc, is_last = join(acc, parts_ptr, arrivals_ptr, place, split, SPLIT_K, BLOCK_N, BLOCK_M)
    if is_last:
        # rounded wherever torch's separate operations would
        y = tl.trans(acc) * tl.load(scale_ptr + features, mask=is_feature, other=0.0)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + features, mask=is_feature, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype)
        if GATED:
            up_scale = tl.load(up_scale_ptr + features, mask=is_feature, other=0.0)
            y = silu_mul(y, (tl.trans(acc_up) * up_scale[None, :]).to(dtype))
        if RESIDUAL:
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out_ptr + tokens[:, None].to(tl.int64) * num_features + features[None, :], y, mask=inside)

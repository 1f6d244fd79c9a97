# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Products of a few tokens with large weights, as Triton kernels; kernels/linear.py defines what they compute.

With T tokens each weight is worth 2 T operations for 2 bytes read, so up to a few hundred tokens the weights' way from
memory is all that counts. Three things keep that way busy:
  - a program owns BLOCK_N rows of the weight and streams them through a pipeline of num_stages tiles; the product is
    taken as weight tile x tokens^T, so that the long side fills the tensor cores and 8 tokens are no worse than 1;
  - bias, residual, silu and product ride along, and no intermediate leaves the chip;
  - kernels of a chain overlap (programmatic dependent launch): while one drains, the next is already resident.
The norm is a kernel before: in the loop it costs the tokens' way past the copy engine, and loses from 8 tokens on.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import Norm, Tile

MAX_SPLIT_TILES = 1 << 14  # output tiles of one product that several programs share


def linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    """linear, in one launch. With split_k > 1, calls on one device must be ordered: they share arrival counters."""
    return _launch(x, weight, None, bias=bias, residual=residual, tile=tile)


def gated_linear_triton(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, tile: Tile) -> torch.Tensor:
    """gated_linear, in one launch. Both weights have the same row stride."""
    assert tile.split_k == 1 and gate.stride() == up.stride() and gate.shape == up.shape
    return _launch(x, gate, up, bias=None, residual=None, tile=tile)


def rms_norm_triton(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """rms_norm, one program a row."""
    num_tokens, width = x.shape
    out = x.new_empty(num_tokens, width)
    overlap = overlaps(x.device)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_tokens,)](
        x,
        norm.weight,
        out,
        width,
        x.stride(0),
        norm.eps,
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=min(max(block // 512, 1), 8),
        launch_pdl=overlap,
    )
    return out


def silu_mul_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu_mul, 1024 elements a program."""
    num_tokens, width = gate.shape
    assert gate.stride() == up.stride() and gate.stride(1) == 1
    out = gate.new_empty(num_tokens, width)
    overlap = overlaps(gate.device)
    _silu_mul_kernel[(num_tokens, triton.cdiv(width, 1024))](
        gate, up, out, width, gate.stride(0), BLOCK=1024, OVERLAP=overlap, num_warps=4, launch_pdl=overlap
    )
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    num_tokens, num_columns = x.shape
    num_features = weight.shape[0]
    assert num_columns % (tile.block_k * tile.split_k) == 0, (num_columns, tile)
    assert x.stride(1) == weight.stride(1) == 1
    assert tile.slices == 1 or tile.block_m >= 8, tile
    out = x.new_empty(num_tokens, num_features)
    grid = (triton.cdiv(num_tokens, tile.block_m), triton.cdiv(num_features, tile.block_n), tile.split_k)
    parts, arrivals = split_room(out, grid, tile)
    overlap = overlaps(x.device)
    _linear_kernel[grid](
        x,
        weight,
        weight if up is None else up,
        weight if bias is None else bias,
        x if residual is None else residual,
        out,
        parts,
        arrivals,
        num_tokens,
        num_features,
        num_columns,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        GATED=up is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        SLICES=tile.slices,
        OVERLAP=overlap,
        STAGES=tile.num_stages,
        # fp32 serves tests and small models: as exact as torch's
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=overlap,
    )
    return out


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor drains."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def split_room(out: torch.Tensor, grid: tuple[int, int, int], tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs that share an output tile leave their parts, and count themselves; out where none does."""
    if tile.split_k == 1:
        return out, out  # not touched
    assert grid[0] * grid[1] <= MAX_SPLIT_TILES
    parts = out.new_empty(grid[0] * grid[1] * tile.split_k * tile.block_n * tile.block_m, dtype=torch.float32)
    return parts, _arrival_counters(out.device)


@cache
def _arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeros, to which every kernel returns them."""
    assert device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "run once before capturing"
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)


@triton.jit
def _spread(rows, BLOCK_K: tl.constexpr, SLICES: tl.constexpr):
    """A tile's offsets from its rows': [rows, columns] or, where warps share columns, [slices, rows, columns]."""
    width: tl.constexpr = BLOCK_K // SLICES
    column = tl.arange(0, width)
    if SLICES == 1:
        offsets = rows[:, None] + column[None, :]
    else:
        offsets = rows[None, :, None] + (tl.arange(0, SLICES)[:, None, None] * width + column[None, None, :])
    return offsets


@triton.jit
def join(acc, parts_ptr, arrivals_ptr, place, split, SPLIT_K, BLOCK_N, BLOCK_M):
    """Leave this program's part, and sum all parts where it is the last to come. Returns (sum, is last)."""
    size: tl.constexpr = BLOCK_N * BLOCK_M
    inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    part_ptrs = parts_ptr + place.to(tl.int64) * (SPLIT_K * size) + inner
    tl.store(part_ptrs + split * size, acc)
    tl.debug_barrier()  # every thread has stored before one announces it
    is_last = tl.atomic_add(arrivals_ptr + place, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        tl.store(arrivals_ptr + place, 0)
        # in the parts' own order, so that the sum does not depend on who comes last; past L1, which may be stale
        acc = tl.load(part_ptrs, cache_modifier=".cg")
        for other in tl.static_range(1, SPLIT_K):
            acc += tl.load(part_ptrs + other * size, cache_modifier=".cg")
    return acc, is_last


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    up_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    num_tokens,
    num_features,
    num_columns,
    x_stride,
    weight_stride,
    residual_stride,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SLICES: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # programs of the same weight rows run side by side, so all but the first find them in L2
    block_m, block_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = x_ptr.dtype.element_ty
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # counted in blocks, so that the compiler sees what divides these
    num_blocks = num_columns // (BLOCK_K * SPLIT_K)
    k_start, k_end = split * num_blocks * BLOCK_K, (split + 1) * num_blocks * BLOCK_K

    if OVERLAP:
        gdc_wait()

    inside = (tokens[:, None] < num_tokens) & (features[None, :] < num_features)
    if RESIDUAL:  # asked for here, for at the end everyone would wait for it
        residual_ptrs = residual_ptr + tokens[:, None].to(tl.int64) * residual_stride + features[None, :]
        residual = tl.load(residual_ptrs, mask=inside, other=0.0)
    is_token = tokens[:, None] < num_tokens if SLICES == 1 else tokens[None, :, None] < num_tokens
    x_ptrs = x_ptr + _spread(tokens.to(tl.int64) * x_stride, BLOCK_K, SLICES)
    rows = _spread(tl.minimum(features, num_features - 1).to(tl.int64) * weight_stride, BLOCK_K, SLICES)
    weight_ptrs, up_ptrs = weight_ptr + rows, up_ptr + rows

    # fewer tokens than a tensor core takes: multiply and add, and sum along the columns once at the end
    has_dot: tl.constexpr = BLOCK_M >= 8
    if SLICES > 1:
        acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_M] if has_dot else [BLOCK_N, BLOCK_M, BLOCK_K], tl.float32)
    acc_up = acc
    for k in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_ptrs + k)
        tile = tl.load(x_ptrs + k, mask=is_token, other=0.0)
        if has_dot:
            acc = tl.dot(weight, tl.trans(tile), acc, input_precision=PRECISION)
        else:
            acc += weight.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
        if GATED:
            up = tl.load(up_ptrs + k)
            if has_dot:
                acc_up = tl.dot(up, tl.trans(tile), acc_up, input_precision=PRECISION)
            else:
                acc_up += up.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
    if SLICES > 1:
        acc, acc_up = tl.sum(acc, 0), tl.sum(acc_up, 0)
    elif not has_dot:
        acc, acc_up = tl.sum(acc, 2), tl.sum(acc_up, 2)

    if OVERLAP:
        gdc_launch_dependents()
    is_last = True
    if SPLIT_K > 1:
        place = block_n * tl.num_programs(0) + block_m
        acc, is_last = join(acc, parts_ptr, arrivals_ptr, place, split, SPLIT_K, BLOCK_N, BLOCK_M)
    if is_last:
        # rounded wherever torch's separate operations would
        y = tl.trans(acc)
        if BIAS:
            y += tl.load(bias_ptr + features, mask=features < num_features, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype)
        if GATED:
            y = silu_mul(y, tl.trans(acc_up).to(dtype))
        if RESIDUAL:
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out_ptr + tokens[:, None].to(tl.int64) * num_features + features[None, :], y, mask=inside)


@triton.jit
def silu_mul(gate, up):
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _rms_norm_kernel(x_ptr, norm_ptr, out_ptr, width, x_stride, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    # before the wait: no kernel that starts its successors early writes weights
    norm = tl.load(norm_ptr + column, mask=inside, other=0.0)
    if OVERLAP:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()  # not sooner: the next kernel reads nothing before this one has ended
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * rstd).to(x.dtype).to(tl.float32) * norm.to(tl.float32)
    tl.store(out_ptr + row * width + column, normed.to(x.dtype), mask=inside)


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, width, stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * stride + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * stride + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + column, silu_mul(gate, up), mask=inside)

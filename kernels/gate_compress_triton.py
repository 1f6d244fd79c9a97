# mypy: allow-untyped-defs
# ruff: noqa: N803
"""A gate's descriptors of cached keys in one launch for all layers (Triton); kernels/gate.py defines them.

A program pools some selection blocks of one layer and key head, one after another, and multiplies them together with
the layer's and head's weights: for few blocks these outweigh the keys, and are read once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.describe import most_touched
from kernels.gate import GateWeights
from kernels.linear_triton import overlaps
from kernels.turns_triton import cos_sin

ITEMS = 16  # selection blocks of a program: the rows that a tensor core's product has anyway


def compress_triton(
    weights: GateWeights,
    storage: torch.Tensor,
    out: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> None:
    """kernels.gate.compress on the GPU."""
    assert storage.is_contiguous() and out.is_contiguous() and block_tables.stride(1) == 1
    assert begins.is_contiguous() and ends.is_contiguous() and weights.key_weight.is_contiguous()
    num_layers, _, _, block_size, num_kv_heads, head_dim = storage.shape
    parts, gate_dim = out.shape[2], weights.gate_dim
    assert weights.key_weight.shape == (num_layers, num_kv_heads, 3 * head_dim, gate_dim)
    num_items = len(begins) * most_touched(max_tokens, block_size // parts)
    overlap = overlaps(storage.device)
    _compress_kernel[(triton.cdiv(num_items, ITEMS), num_layers * num_kv_heads)](
        storage,
        weights.key_weight,
        weights.key_norm,
        weights.rotation.frequencies,
        weights.gate_rotation.frequencies,
        out,
        block_tables,
        begins,
        ends,
        len(begins),
        num_items,
        storage.stride(0),
        out.stride(0),
        block_tables.stride(0),
        weights.rotation.scaling,
        weights.gate_rotation.scaling,
        weights.eps,
        PARTS=parts,
        SELECT_BLOCK=block_size // parts,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GATE_DIM=gate_dim,
        ITEMS=ITEMS,
        BLOCK_T=triton.next_power_of_2(block_size // parts),
        BLOCK_H=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK_O=max(16, triton.next_power_of_2(gate_dim // 2)),
        LARGEST=torch.finfo(out.dtype).max,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )


@triton.jit(do_not_specialize=["num_rows", "num_items", "layer_stride", "out_stride", "table_stride"])
def _compress_kernel(
    storage,
    weight,
    norm,
    frequencies,
    gate_frequencies,
    out,
    block_tables,
    begins,
    ends,
    num_rows,
    num_items,
    layer_stride,
    out_stride,
    table_stride,
    scaling,
    gate_scaling,
    eps,
    PARTS: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE_DIM: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some selection blocks, for one layer and key head. All rows' first blocks come before any row's second."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    layer, head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    row, exists = item % num_rows, item < num_items
    begin, end = tl.load(begins + row, mask=exists, other=0), tl.load(ends + row, mask=exists, other=0)
    selected = begin // SELECT_BLOCK + item // num_rows
    num_keys = tl.minimum(end - selected * SELECT_BLOCK, SELECT_BLOCK)
    num_keys = tl.where(begin < end, tl.maximum(num_keys, 0), 0)
    if tl.max(num_keys, axis=0) == 0:
        return
    is_touched = num_keys > 0
    table = block_tables + row.to(tl.int64) * table_stride + selected // PARTS
    block = tl.load(table, mask=is_touched, other=0)
    place = block.to(tl.int64) * PARTS + selected % PARTS  # of the descriptor, and of the keys as it counts them
    half: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_H)
    is_dim = dim < half
    frequency = tl.load(frequencies + dim, mask=is_dim, other=0.0)
    token = tl.arange(0, BLOCK_T)
    cached = storage + layer.to(tl.int64) * layer_stride + head * HEAD_DIM
    cached += token[:, None] * (KV_HEADS * HEAD_DIM) + dim[None, :]

    # of the first and the second half of a head's dimensions, which turn together
    high, other_high = tl.zeros([ITEMS, BLOCK_H], tl.float32), tl.zeros([ITEMS, BLOCK_H], tl.float32)
    low, other_low, mean, other_mean = high, high, high, high
    for number in range(ITEMS):
        is_it = tl.arange(0, ITEMS) == number
        count = tl.sum(tl.where(is_it, num_keys, 0), axis=0)
        if count > 0:
            begin_key = tl.sum(tl.where(is_it, place, 0), axis=0) * (SELECT_BLOCK * KV_HEADS * HEAD_DIM)
            start = tl.sum(tl.where(is_it, selected, 0), axis=0) * SELECT_BLOCK
            is_key = (token < count)[:, None]
            mask = is_key & is_dim[None, :]
            x = tl.load(cached + begin_key, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(cached + begin_key + half, mask=mask, other=0.0).to(tl.float32)
            cosine, sine = cos_sin((start + token).to(tl.float32)[:, None] * frequency[None, :])
            cosine, sine = cosine / scaling, sine / scaling
            plain, other = x * cosine + y * sine, y * cosine - x * sine
            here = is_it[:, None]
            high = tl.where(here, tl.max(tl.where(is_key, plain, -float("inf")), axis=0)[None, :], high)
            low = tl.where(here, tl.min(tl.where(is_key, plain, float("inf")), axis=0)[None, :], low)
            mean = tl.where(here, tl.sum(plain, axis=0)[None, :] / count, mean)
            other_high = tl.where(here, tl.max(tl.where(is_key, other, -float("inf")), axis=0)[None, :], other_high)
            other_low = tl.where(here, tl.min(tl.where(is_key, other, float("inf")), axis=0)[None, :], other_low)
            other_mean = tl.where(here, tl.sum(other, axis=0)[None, :] / count, other_mean)

    weight += tl.program_id(1).to(tl.int64) * (3 * HEAD_DIM * GATE_DIM)
    first, second = tl.zeros([ITEMS, BLOCK_O], tl.float32), tl.zeros([ITEMS, BLOCK_O], tl.float32)
    first, second = _multiply(high, weight, first, second, HEAD_DIM, GATE_DIM, BLOCK_H, BLOCK_O)
    weight += half * GATE_DIM
    first, second = _multiply(other_high, weight, first, second, HEAD_DIM, GATE_DIM, BLOCK_H, BLOCK_O)
    weight += half * GATE_DIM
    first, second = _multiply(low, weight, first, second, HEAD_DIM, GATE_DIM, BLOCK_H, BLOCK_O)
    weight += half * GATE_DIM
    first, second = _multiply(other_low, weight, first, second, HEAD_DIM, GATE_DIM, BLOCK_H, BLOCK_O)
    weight += half * GATE_DIM
    first, second = _multiply(mean, weight, first, second, HEAD_DIM, GATE_DIM, BLOCK_H, BLOCK_O)
    weight += half * GATE_DIM
    first, second = _multiply(other_mean, weight, first, second, HEAD_DIM, GATE_DIM, BLOCK_H, BLOCK_O)

    gate_half: tl.constexpr = GATE_DIM // 2
    column = tl.arange(0, BLOCK_O)
    is_column = column < gate_half
    size = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / GATE_DIM + eps)[:, None]
    gain = norm + layer * GATE_DIM + column
    first *= size * tl.load(gain, mask=is_column, other=0.0).to(tl.float32)[None, :]
    second *= size * tl.load(gain + gate_half, mask=is_column, other=0.0).to(tl.float32)[None, :]
    gate_frequency = tl.load(gate_frequencies + column, mask=is_column, other=0.0)
    cosine, sine = cos_sin((selected * SELECT_BLOCK).to(tl.float32)[:, None] * gate_frequency[None, :])
    cosine, sine = cosine * gate_scaling, sine * gate_scaling
    target = out + layer.to(tl.int64) * out_stride + ((place * KV_HEADS + head) * GATE_DIM)[:, None] + column[None, :]
    mask = is_touched[:, None] & is_column[None, :]
    turned, other_turned = first * cosine - second * sine, second * cosine + first * sine
    tl.store(target, tl.clamp(turned, -LARGEST, LARGEST), mask=mask)
    tl.store(target + gate_half, tl.clamp(other_turned, -LARGEST, LARGEST), mask=mask)


@triton.jit
def _multiply(
    pooled,
    weight,
    first,
    second,
    HEAD_DIM: tl.constexpr,
    GATE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Add a half of what is pooled [ITEMS, D / 2], times its weights, to the two halves of the merged keys."""
    dim, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_O)
    mask = (dim < HEAD_DIM // 2)[:, None] & (column < GATE_DIM // 2)[None, :]
    line = weight + dim[:, None] * GATE_DIM + column[None, :]
    pooled = pooled.to(weight.dtype.element_ty)
    first = tl.dot(pooled, tl.load(line, mask=mask, other=0.0), first, input_precision="ieee")
    right = tl.load(line + GATE_DIM // 2, mask=mask, other=0.0)
    return first, tl.dot(pooled, right, second, input_precision="ieee")

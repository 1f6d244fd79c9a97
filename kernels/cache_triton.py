# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Writing to the paged KV cache in one kernel a layer, and compacting it in one kernel a cycle (Triton)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear_triton import overlaps

BLOCK_HEADS = 4  # of a program; 4 heads of 128 are 16 bytes for each thread of two warps
MOVE_ELEMENTS = 8192  # that a program of compact holds in registers: all moves of a row, some columns of an entry
MOVE_PROGRAMS = 1024  # a few for each multiprocessor: planes are shared out so that few programs have nothing to do


def rope_and_write_triton(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """kernels.cache.rope_and_write on the GPU."""
    num_tokens, head_dim, rotary_dim = qkv.shape[0], key_cache.shape[3], cos.shape[1]
    assert (q_norm is None) == (k_norm is None)
    assert qkv.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    overlap = overlaps(qkv.device)
    _rope_and_write_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, BLOCK_HEADS))](
        qkv,
        positions,
        cos,
        sin,
        slots,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        query,
        key_cache,
        value_cache,
        qkv.stride(0),
        eps,
        HAS_NORM=q_norm is not None,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_H=BLOCK_HEADS,
        BLOCK_D=triton.next_power_of_2(head_dim),
        OVERLAP=overlap,
        num_warps=2,
        launch_pdl=overlap,
    )
    return query


@triton.jit
def _rope_and_write_kernel(
    qkv,
    positions,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    query,
    key_cache,
    value_cache,
    token_stride,
    eps,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A few heads of one token: queries, keys and values alike, told apart by their number."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()  # not earlier: attention to held lists counts on all before this one to have ended
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    exists = (head < HEADS + 2 * KV_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    turns = dim < ROTARY_DIM
    half: tl.constexpr = ROTARY_DIM // 2
    # the dimension that a dimension turns with, and itself where it does not turn
    other = tl.where(turns, tl.where(dim < half, dim + half, dim - half), dim)
    row = qkv + token * token_stride + head[:, None] * HEAD_DIM
    x = tl.load(row + dim[None, :], mask=exists, other=0.0)
    y = tl.load(row + other[None, :], mask=exists, other=0.0)
    weight, other_weight = x, y  # not read without a norm
    if HAS_NORM:
        is_dim = dim < HEAD_DIM
        q_weight = tl.load(q_norm + dim, mask=is_dim, other=0.0)[None, :]
        k_weight = tl.load(k_norm + dim, mask=is_dim, other=0.0)[None, :]
        q_other = tl.load(q_norm + other, mask=is_dim, other=0.0)[None, :]
        k_other = tl.load(k_norm + other, mask=is_dim, other=0.0)[None, :]
        weight = tl.where(is_query[:, None], q_weight, k_weight)
        other_weight = tl.where(is_query[:, None], q_other, k_other)
    cosine = tl.load(cos + position * ROTARY_DIM + dim, mask=turns, other=1.0)[None, :]
    sine = tl.load(sin + position * ROTARY_DIM + dim, mask=turns, other=0.0)[None, :]
    turned = norm_and_turn(x, y, weight, other_weight, cosine, sine, eps, HAS_NORM, HEAD_DIM, ROTARY_DIM, BLOCK_D)
    tl.store(query + (token * HEADS + head[:, None]) * HEAD_DIM + dim[None, :], turned, mask=exists & is_query[:, None])
    entry = slot * (KV_HEADS * HEAD_DIM)
    key = entry + (head[:, None] - HEADS) * HEAD_DIM + dim[None, :]
    tl.store(key_cache + key, turned, mask=exists & is_key[:, None])
    value = entry + (head[:, None] - HEADS - KV_HEADS) * HEAD_DIM + dim[None, :]
    tl.store(value_cache + value, x, mask=exists & is_value[:, None])


@triton.jit
def norm_and_turn(
    x,
    y,
    weight,
    other_weight,
    cosine,
    sine,
    eps,
    HAS_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Heads x [H, D], normed and turned. y, other_weight: of the dimension that each dimension turns with."""
    dtype: tl.constexpr = x.dtype
    dim = tl.arange(0, BLOCK_D)
    normed, normed_other = x, y
    if HAS_NORM:
        exact = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(exact * exact, axis=1) / HEAD_DIM + eps)[:, None]
        normed = (exact * scale).to(dtype).to(tl.float32)
        normed_other = (y.to(tl.float32) * scale).to(dtype).to(tl.float32)
        normed = (normed * weight.to(tl.float32)).to(dtype)
        normed_other = (normed_other * other_weight.to(tl.float32)).to(dtype)
    sine = tl.where((dim < ROTARY_DIM // 2)[None, :], -sine.to(tl.float32), sine.to(tl.float32))
    along = (normed.to(tl.float32) * cosine.to(tl.float32)).to(dtype).to(tl.float32)
    across = (normed_other.to(tl.float32) * sine).to(dtype).to(tl.float32)
    return tl.where((dim < ROTARY_DIM)[None, :], (along + across).to(dtype), normed)


def compact_triton(storage: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """kernels.cache.compact on the GPU."""
    assert storage.is_contiguous() and src.is_contiguous() and dst.is_contiguous()
    num_rows, num_moves = src.shape
    num_planes = storage.shape[0] * 2
    entry_size = storage.shape[4] * storage.shape[5]
    block_moves = triton.next_power_of_2(num_moves)
    block_elements = min(triton.next_power_of_2(entry_size), max(16, MOVE_ELEMENTS // block_moves))
    columns = triton.cdiv(entry_size, block_elements)
    shares = min(num_planes, max(1, MOVE_PROGRAMS // (num_rows * columns)))
    overlap = overlaps(storage.device)
    _compact_kernel[(num_rows, columns, shares)](
        storage,
        src,
        dst,
        num_moves,
        num_planes,
        storage.shape[2] * storage.shape[3] * entry_size,
        ENTRY_SIZE=entry_size,
        BLOCK_M=block_moves,
        BLOCK_E=block_elements,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )


@triton.jit(do_not_specialize=["num_moves", "num_planes"])
def _compact_kernel(
    storage,
    src,
    dst,
    num_moves,
    num_planes,
    plane_stride,
    ENTRY_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row's moves, for some columns of the entries of some planes (a layer's keys, or its values)."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    move = tl.arange(0, BLOCK_M)
    exists = move < num_moves
    row = tl.program_id(0).to(tl.int64) * num_moves
    source = tl.load(src + row + move, mask=exists, other=-1)
    target = tl.load(dst + row + move, mask=exists, other=-1)
    moves = (source != target) & (source >= 0) & (target >= 0)
    if tl.sum(moves.to(tl.int32), axis=0) == 0:
        return
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = moves[:, None] & (column < ENTRY_SIZE)[None, :]
    stride = tl.cast(plane_stride, tl.int64)
    base = storage + tl.program_id(2) * stride
    for _ in range(tl.program_id(2), num_planes, tl.num_programs(2)):
        entries = tl.load(base + source[:, None] * ENTRY_SIZE + column[None, :], mask=mask)
        tl.debug_barrier()  # one thread's target may be another's source
        tl.store(base + target[:, None] * ENTRY_SIZE + column[None, :], entries, mask=mask)
        base += tl.num_programs(2) * stride

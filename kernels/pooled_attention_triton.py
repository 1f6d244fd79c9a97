# mypy: allow-untyped-defs
# ruff: noqa: N803
"""pooled_attention in one launch; kernels/pooled_attention.py defines it.

A program holds the queries of BLOCK_M tokens of one head and streams the keys they see, a selection block a step, so
that a step's row maximum is what the block's score is; scores are kept in float32 as exponents of e.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.attention import PackedSequences
from kernels.attention_steps import absorb

BLOCK_M = 64
LN_2 = math.log(2)


@torch.no_grad()
def pooled_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqs: PackedSequences,
    *,
    scale: float,
    select_block: int,
    block_m: int = BLOCK_M,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pooled_attention on the GPU. select_block is a power of two, at least 16."""
    num_tokens, num_heads, head_dim = query.shape
    assert select_block >= 16 and select_block & (select_block - 1) == 0, f"select_block={select_block}"
    num_sequences, num_blocks = seqs.cu_seqlens.shape[0] - 1, triton.cdiv(seqs.max_seqlen, select_block)
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    scores = torch.empty(num_tokens, num_heads, num_blocks, dtype=torch.float32, device=query.device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=query.device)
    _pooled_kernel[(triton.cdiv(seqs.max_seqlen, block_m), num_heads, num_sequences)](
        query,
        key,
        value,
        output,
        scores,
        lse,
        seqs.cu_seqlens,
        num_blocks,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        scale * math.log2(math.e),
        LN_2=LN_2,
        HEADS=num_heads,
        GROUPS=num_heads // key.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=select_block,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=4,
        num_stages=2,
    )
    return output, scores, lse


@triton.jit
def _pooled_kernel(
    query,
    key,
    value,
    output,
    scores_out,
    lse_out,
    cu_seqlens,
    num_blocks,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    scale,
    LN_2: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # the tiles that see the most keys first, so that the last to run are short
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(cu_seqlens + tl.program_id(2)).to(tl.int64)
    length = (tl.load(cu_seqlens + tl.program_id(2) + 1) - begin).to(tl.int32)
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < length
    dims = tl.arange(0, BLOCK_D)
    has_dim = dims < HEAD_DIM
    column = tl.arange(0, BLOCK_N)
    token = begin + index
    q = tl.load(
        query + token[:, None] * query_stride + head * query_head_stride + dims[None, :],
        mask=inside[:, None] & has_dim[None, :],
        other=0.0,
    )
    kv_head = head // GROUPS
    keys = key + begin * key_stride + kv_head * key_head_stride
    values = value + begin * value_stride + kv_head * value_head_stride
    score_row = scores_out + (token * HEADS + head) * num_blocks
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # a tile past its sequence's end has no keys to read, and no row to store
    seen = tl.cdiv(tl.minimum((tile + 1) * BLOCK_M, length), BLOCK_N)
    seen = tl.where(tile * BLOCK_M < length, seen, 0)
    for block in range(seen):
        where = block * BLOCK_N + column
        is_key = where < length
        k = tl.load(
            keys + where[None, :].to(tl.int64) * key_stride + dims[:, None],
            mask=is_key[None, :] & has_dim[:, None],
            other=0.0,
        )
        v = tl.load(
            values + where[:, None].to(tl.int64) * value_stride + dims[None, :],
            mask=is_key[:, None] & has_dim[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(where[None, :] <= index[:, None], scores, -float("inf"))
        tl.store(score_row + block, tl.max(scores, axis=1) * LN_2, mask=inside)
        maximum, total, acc = absorb(scores, v, maximum, total, acc)
    # padding rows have seen the keys before the sequence's end, or nothing
    total = tl.where(total == 0.0, 1.0, total)
    for block in range(seen, num_blocks):
        tl.store(score_row + block, tl.full((BLOCK_M,), -float("inf"), tl.float32), mask=inside)
    tl.store(lse_out + token * HEADS + head, (maximum + tl.log2(total)) * LN_2, mask=inside)
    tl.store(
        output + (token[:, None] * HEADS + head) * HEAD_DIM + dims[None, :],
        (acc / total[:, None]).to(output.dtype.element_ty),
        mask=inside[:, None] & has_dim[None, :],
    )

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Scores of blocks by their descriptors, and by what a dense forward left behind (Triton).

A program reads some descriptors of one sequence and key head, once, for all new tokens. The host knows a bound on the
context alone, which may be far above it, so a fixed number of programs share out the blocks that there are.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import PagedSequences
from kernels.attention_plan import num_programs
from kernels.linear_triton import overlaps
from kernels.select import num_selection_blocks

if TYPE_CHECKING:
    from kernels.attention import BlockMaxima

TILE = 8192  # elements of descriptors that a program holds
PROGRAMS_PER_SM = 16
MAXIMA_BLOCKS = 256  # that a program of verified_scores looks at


def bound_scores_triton(query: torch.Tensor, minmax: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
    """kernels.select.bound_scores on the GPU."""
    return _score(query, minmax, seqs, is_bound=True)


def mean_scores_triton(query: torch.Tensor, means: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
    """kernels.select.mean_scores on the GPU."""
    return _score(query, means, seqs, is_bound=False)


def _score(query: torch.Tensor, descriptors: torch.Tensor, seqs: PagedSequences, *, is_bound: bool) -> torch.Tensor:
    num_heads, head_dim = query.shape[1:]
    parts, num_kv_heads, width = descriptors.shape[1:]
    assert query.stride(2) == 1 and descriptors.is_contiguous() and seqs.block_tables.stride(1) == 1
    assert width == head_dim * (2 if is_bound else 1)
    num_rows = len(seqs.context_lens)
    num_blocks = num_selection_blocks(seqs, seqs.block_size // parts)
    scores = torch.empty(num_rows, num_kv_heads, num_blocks, dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n = min(max(16, TILE // (block_d * width // head_dim)), 128)
    wave = num_programs(query.device, PROGRAMS_PER_SM) // (num_rows * num_kv_heads)
    splits = max(1, min(triton.cdiv(num_blocks, block_n), wave))
    overlap = overlaps(query.device)
    _score_kernel[(num_rows * splits * num_kv_heads,)](
        query,
        descriptors,
        scores,
        seqs.cu_seqlens_q,
        seqs.context_lens,
        seqs.block_tables,
        num_blocks,
        splits,
        query.stride(0),
        query.stride(1),
        seqs.block_tables.stride(0),
        IS_BOUND=is_bound,
        IS_SINGLE=seqs.max_seqlen_q == 1,
        KV_HEADS=num_kv_heads,
        GROUPS=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PARTS=parts,
        SELECT_BLOCK=seqs.block_size // parts,
        BLOCK_G=triton.next_power_of_2(num_heads // num_kv_heads),
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    return scores


@triton.jit
def _mean_query(query, token, head, token_stride, head_stride, GROUPS, HEAD_DIM, BLOCK_G, BLOCK_D):
    """The mean of the query heads that share a key head, float32 [D]."""
    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    place = tl.cast(token, tl.int64) * token_stride + (head * GROUPS + member)[:, None] * head_stride + dim[None, :]
    mask = (member < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.sum(tl.load(query + place, mask=mask, other=0.0).to(tl.float32), axis=0) / GROUPS


@triton.jit
def _products(q, low, high, IS_BOUND: tl.constexpr):
    """The scores of descriptors [N, D] for a query [D]."""
    if IS_BOUND:
        # the larger product is with the maximum where q is positive, and with the minimum where it is negative
        scores = tl.sum(tl.where((q > 0)[None, :], high, low) * q[None, :], axis=1)
    else:
        scores = tl.sum(low * q[None, :], axis=1)
    return scores


@triton.jit(do_not_specialize=["num_blocks", "splits", "table_stride"])
def _score_kernel(
    query,
    descriptors,
    scores,
    cu_seqlens,
    context_lens,
    block_tables,
    num_blocks,
    splits,  # programs that share out the blocks of a row and head
    query_token_stride,
    query_head_stride,
    table_stride,
    IS_BOUND: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0) % KV_HEADS  # fastest: heads of one block lie side by side in memory
    split = tl.program_id(0) // KV_HEADS % splits
    row = tl.program_id(0) // KV_HEADS // splits
    complete = tl.minimum(tl.load(context_lens + row) // SELECT_BLOCK, num_blocks)
    first_token = tl.load(cu_seqlens + row)
    num_tokens = tl.load(cu_seqlens + row + 1) - first_token
    planes: tl.constexpr = 2 if IS_BOUND else 1
    dim = tl.arange(0, BLOCK_D)
    is_dim = (dim < HEAD_DIM)[None, :]
    table = block_tables + row.to(tl.int64) * table_stride
    target = scores + (row * KV_HEADS + head).to(tl.int64) * num_blocks
    q = tl.zeros([BLOCK_D], tl.float32)
    if IS_SINGLE:
        # a row without a new token reads another's query, or the last; its scores are set right below
        token = tl.minimum(first_token, tl.load(cu_seqlens + tl.num_programs(0) // (KV_HEADS * splits)) - 1)
        q = _mean_query(query, token, head, query_token_stride, query_head_stride, GROUPS, HEAD_DIM, BLOCK_G, BLOCK_D)
    for begin in range(split * BLOCK_N, complete, splits * BLOCK_N):
        index = begin + tl.arange(0, BLOCK_N)
        is_complete = index < complete
        block = tl.load(table + index // PARTS, mask=is_complete, other=0).to(tl.int64)
        place = (block * PARTS + index % PARTS) * (KV_HEADS * planes * HEAD_DIM) + head * (planes * HEAD_DIM)
        described = descriptors + place[:, None] + dim[None, :]
        mask = is_complete[:, None] & is_dim
        low = tl.load(described, mask=mask, other=0.0).to(tl.float32)
        high = low
        if IS_BOUND:
            high = tl.load(described + HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
        best = tl.full([BLOCK_N], -float("inf"), tl.float32)
        if IS_SINGLE:
            best = tl.where(num_tokens > 0, _products(q, low, high, IS_BOUND), best)
        else:
            for token in range(first_token, first_token + num_tokens):
                q = _mean_query(
                    query, token, head, query_token_stride, query_head_stride, GROUPS, HEAD_DIM, BLOCK_G, BLOCK_D
                )
                best = tl.maximum(best, _products(q, low, high, IS_BOUND))
        tl.store(target + index, best, mask=is_complete)


def verified_scores_triton(maxima: "BlockMaxima", seqs: PagedSequences, out: torch.Tensor, rows: torch.Tensor) -> None:
    """kernels.select.verified_scores on the GPU."""
    num_heads, num_blocks = maxima.scores.shape[1:]
    num_rows, num_kv_heads = len(seqs.context_lens), out.shape[1]
    assert maxima.scores.is_contiguous() and maxima.lse.is_contiguous()
    assert out.stride(2) == 1 and out.shape[2] >= num_blocks and len(rows) == num_rows
    overlap = overlaps(out.device)
    _verified_kernel[(triton.cdiv(num_blocks, MAXIMA_BLOCKS), num_rows * num_kv_heads)](
        maxima.scores,
        maxima.lse,
        out,
        rows,
        seqs.cu_seqlens_q,
        seqs.context_lens,
        num_blocks,
        out.stride(0),
        out.stride(1),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        SELECT_BLOCK=maxima.select_block,
        BLOCK_G=triton.next_power_of_2(num_heads // num_kv_heads),
        BLOCK_N=MAXIMA_BLOCKS,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )


@triton.jit(do_not_specialize=["num_blocks", "row_stride", "head_stride"])
def _verified_kernel(
    maxima,
    lse,
    scores,
    slots,
    cu_seqlens,
    context_lens,
    num_blocks,
    row_stride,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some blocks of one sequence and key head, over all of its new tokens and the group's query heads."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    groups: tl.constexpr = HEADS // KV_HEADS
    first_token = tl.load(cu_seqlens + row)
    num_tokens = tl.load(cu_seqlens + row + 1) - first_token
    num_seen = tl.cdiv(tl.load(context_lens + row) + num_tokens, SELECT_BLOCK)
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.arange(0, BLOCK_G)
    is_member = member < groups
    mask = is_member[:, None] & (index < tl.minimum(num_seen, num_blocks))[None, :]
    best = tl.full([BLOCK_N], -float("inf"), tl.float32)
    # no token looks at a chunk past the last block that is seen
    last_token = tl.where(tl.program_id(0) * BLOCK_N < num_seen, first_token + num_tokens, first_token)
    for token in range(first_token, last_token):
        rows = tl.cast(token, tl.int64) * HEADS + head * groups + member
        total = tl.load(lse + rows, mask=is_member, other=0.0)
        # a row that sees nothing: -inf less -inf is not a number
        total = tl.where(total == -float("inf"), 0.0, total)
        largest = tl.load(maxima + rows[:, None] * num_blocks + index[None, :], mask=mask, other=-float("inf"))
        best = tl.maximum(best, tl.max(largest - total[:, None], axis=0))
    place = tl.load(slots + row) * row_stride + head * head_stride
    tl.store(scores + place + index, best, mask=index < num_blocks)

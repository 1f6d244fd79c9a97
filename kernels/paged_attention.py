# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Split-KV attention over a paged cache for decode, verification, draft trees and prefill (Triton).

One program reads one chunk of one sequence's keys and values, once, for all rows of a tile: the new tokens times the
query heads that share a key head. Chunks of a tile are merged by their maxima and sums (Flash-Decoding, 2023).
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import BlockMaxima, PagedSequences
from kernels.attention_combine import LN_2, combine, merge_shape
from kernels.attention_plan import (
    ITEM_FIELDS,
    MIN_CHUNK,
    NO_WINDOW,
    Launch,
    geometry_of,
    plan_for,
)
from kernels.attention_steps import absorb, as_rows, finish, merge_slices
from kernels.linear_triton import overlaps

MAX_SELECT_BLOCK = 128  # keys of a step that registers hold
SHARED_BYTES = 227 << 10  # that a program may have


def paged_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    maxima: BlockMaxima | None = None,
    launch: Launch | None = None,
    min_chunk: int = MIN_CHUNK,
) -> torch.Tensor:
    """kernels.attention.paged_attention on the GPU. A row that sees nothing gets 0.

    launch: None chooses by shape; min_chunk: keys below which a sequence is not cut further.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    groups = num_heads // num_kv_heads
    assert query.stride(2) == 1 and key_cache.is_contiguous() and value_cache.is_contiguous()
    geometry = geometry_of(
        seqs,
        groups=groups,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=query.dtype,
        window=NO_WINDOW if sliding_window is None else sliding_window,
        min_chunk=min_chunk,
        launch=launch,
    )
    block_d = max(16, triton.next_power_of_2(head_dim))
    if maxima is not None:
        assert sliding_window is None and maxima.scores.is_contiguous() and maxima.lse.is_contiguous()
        launch = with_whole_blocks(geometry.launch, maxima.select_block, block_d * query.element_size())
        geometry = replace(geometry, launch=launch)
    launch = geometry.launch
    assert seqs.block_tables.stride(1) == 1 and groups <= launch.block_m
    assert launch.slices in (1, launch.num_warps)
    plan = plan_for(seqs, geometry, head_dim)
    output = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    is_tree = seqs.ancestors is not None
    merge_rows, merge_splits = merge_shape(plan, block_d)
    overlap = overlaps(query.device)
    scores, lse = (None, None) if maxima is None else (maxima.scores, maxima.lse)
    _attention_kernel[(plan.items.shape[0] * num_kv_heads,)](
        query,
        key_cache,
        value_cache,
        output,
        output if scores is None else scores,
        output if lse is None else lse,
        seqs.block_tables,
        seqs.ancestors if is_tree else query,
        seqs.positions if is_tree else query,
        plan.items,
        plan.counts,
        plan.arrived,
        plan.maxima,
        plan.sums,
        plan.partials,
        plan.rows,
        query.stride(0),
        query.stride(1),
        seqs.block_tables.stride(0),
        scale / softcap if softcap is not None else scale * math.log2(math.e),
        0.0 if softcap is None else softcap * math.log2(math.e),
        geometry.window,
        0 if scores is None else scores.shape[2],
        HAS_MAXIMA=maxima is not None,
        SELECT=1 if maxima is None else maxima.select_block,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=sliding_window is not None,
        IS_TREE=is_tree,
        MAY_SPLIT=plan.may_split,
        FOLD=launch.fold,
        KV_HEADS=num_kv_heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=seqs.block_size,
        FIELDS=ITEM_FIELDS,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_D=block_d,
        MERGE_ROWS=merge_rows,
        MERGE_SPLITS=merge_splits,
        STAGES=launch.num_stages,
        SLICES=launch.slices,
        OVERLAP=overlap,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        launch_pdl=overlap,
    )
    combine(output, lse, plan, block_d=block_d, merge_rows=merge_rows, merge_splits=merge_splits, overlap=overlap)
    return output


def with_whole_blocks(launch: Launch, select_block: int, row_bytes: int) -> Launch:
    """The launch, changed where it must be for every step to hold whole selection blocks, in one slice.

    row_bytes: of a head's query, key or value.
    """
    assert select_block & (select_block - 1) == 0 and select_block <= MAX_SELECT_BLOCK, select_block
    if launch.slices == 1 and launch.block_n >= select_block:
        return launch
    if launch.slices == 1:
        # wider steps, so fewer of them in shared memory: keys and values, beside the queries
        fits = (launch.block_m + 2 * 2 * select_block) * row_bytes <= SHARED_BYTES
        return replace(launch, block_n=select_block, num_stages=2 if fits else 1)
    return Launch(launch.block_m, max(64, select_block), num_warps=4, num_stages=3, programs_per_sm=3, fold=launch.fold)


# one compilation whatever the table's width and the draft's size
@triton.jit(do_not_specialize=["room", "table_stride", "window", "num_blocks"])
def _attention_kernel(
    query,
    key_cache,
    value_cache,
    output,
    block_scores,  # [T, Hq, num_blocks]
    lse,
    block_tables,
    ancestors,
    positions,
    items,
    counts,
    arrived,
    maxima,
    sums,
    partials,
    room,  # rows of a chunk in maxima, sums and partials
    query_token_stride,
    query_head_stride,
    table_stride,
    score_scale,  # to the exponent of 2, or with a softcap to what tanh takes
    cap,
    window,
    num_blocks,
    HAS_MAXIMA: tl.constexpr,
    SELECT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_TREE: tl.constexpr,
    MAY_SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SLICES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    item = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS  # fastest: heads of one token lie side by side in memory
    field = items + item * FIELDS
    sequence = tl.load(field + 0)
    first_token = tl.load(field + 1)
    num_tokens = tl.load(field + 2)
    first_index = tl.load(field + 3)
    context = tl.load(field + 4)
    first_node = tl.load(field + 5)
    first_key = tl.load(field + 6)
    last_key = tl.load(field + 7)
    chunk = tl.load(field + 8)
    num_chunks = tl.load(field + 9)
    tile = tl.load(field + 10)
    first_partial = tl.load(field + 11)
    if item >= tl.load(counts):
        return

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token = rows // GROUPS
    in_use = token < num_tokens
    is_dim = dims < HEAD_DIM
    token_row = (first_token + token).to(tl.int64)
    query_head = head * GROUPS + rows % GROUPS
    q = tl.load(
        query + (token_row * query_token_stride + query_head * query_head_stride)[:, None] + dims[None, :],
        mask=in_use[:, None] & is_dim[None, :],
        other=0.0,
    )
    index = first_index + token  # in the sequence, as keys are counted
    query_position = index.to(tl.int64)
    bits = tl.zeros([BLOCK_M], tl.int64)
    if IS_TREE:
        bits = tl.load(ancestors + token_row, mask=in_use, other=0)
        if HAS_WINDOW:
            query_position = tl.load(positions + token_row, mask=in_use, other=0)
    # keys that every row of the tile sees end here: at the first token's own, and at the first node
    common_end = tl.minimum(first_index + 1, first_node)

    table = block_tables + sequence.to(tl.int64) * table_stride
    head_dims = head * HEAD_DIM + dims
    row_index, row_bits = as_rows(index, SLICES), as_rows(bits, SLICES)
    row_position = as_rows(query_position, SLICES)
    step = tl.arange(0, BLOCK_N)
    if SLICES == 1:
        maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        # a product of its own for each warp: rows across warps would meet at nine barriers a step
        step = tl.reshape(step, (SLICES, BLOCK_N // SLICES))
        q = tl.broadcast_to(q[None, :, :], (SLICES, BLOCK_M, BLOCK_D))
        maximum = tl.full([SLICES, BLOCK_M], -float("inf"), tl.float32)
        acc = tl.zeros([SLICES, BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros_like(maximum)
    score_row = token_row * (KV_HEADS * GROUPS) + query_head
    if HAS_MAXIMA:
        score_row = score_row * num_blocks
    # a step ahead, in registers: the pipeline holds copies of keys and values alone, which wait for nothing
    block = tl.load(table + tl.minimum(first_key + step, last_key - 1) // BLOCK_SIZE)
    for begin in tl.range(first_key, last_key, BLOCK_N, num_stages=STAGES):
        key_index = begin + step
        readable = tl.minimum(key_index, last_key - 1)
        slot = block.to(tl.int64) * BLOCK_SIZE + readable % BLOCK_SIZE
        block = tl.load(table + tl.minimum(key_index + BLOCK_N, last_key - 1) // BLOCK_SIZE)
        entry = tl.expand_dims(slot * (KV_HEADS * HEAD_DIM), -1) + head_dims
        if HEAD_DIM == BLOCK_D:
            k = tl.load(key_cache + entry)
            v = tl.load(value_cache + entry)
        else:
            k = tl.load(key_cache + entry, mask=is_dim, other=0.0)
            v = tl.load(value_cache + entry, mask=is_dim, other=0.0)
        turned = tl.trans(k) if SLICES == 1 else tl.permute(k, (0, 2, 1))
        scores = tl.dot(q, turned, input_precision="ieee") * score_scale
        if HAS_SOFTCAP:
            # tanh x = 1 - 2 / (exp 2x + 1): right at both infinities
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
        if HAS_WINDOW or begin + BLOCK_N > tl.minimum(common_end, last_key):
            column = tl.expand_dims(key_index, -2)
            visible = column <= row_index
            if IS_TREE:
                node = tl.minimum(tl.maximum(column - first_node, 0), 63).to(tl.int64)
                on_path = ((row_bits >> node) & 1) != 0
                visible = tl.where(row_index < first_node, visible, (column < first_node) | on_path)
            if HAS_WINDOW:
                key_position = readable.to(tl.int64)
                if IS_TREE:
                    new = readable - context
                    written = tl.load(positions + first_token - first_index + readable, mask=new >= 0, other=0)
                    key_position = tl.where(new >= 0, written, key_position)
                visible = visible & (row_position - tl.expand_dims(key_position, -2) < window)
            visible = visible & (column < last_key)
            scores = tl.where(visible, scores, -float("inf"))
        if HAS_MAXIMA:
            largest = tl.max(tl.reshape(scores, (BLOCK_M, BLOCK_N // SELECT, SELECT)), axis=2)
            column = begin // SELECT + tl.arange(0, BLOCK_N // SELECT)
            exists = in_use[:, None] & (column < tl.minimum(tl.cdiv(last_key, SELECT), num_blocks))[None, :]
            tl.store(block_scores + score_row[:, None] + column[None, :], largest * LN_2, mask=exists)
        maximum, total, acc = absorb(scores, v, maximum, total, acc)
    if SLICES > 1:
        maximum, total, acc = merge_slices(maximum, total, acc, SLICES, BLOCK_M, BLOCK_D)
    if HAS_MAXIMA and chunk == num_chunks - 1:
        # what no chunk reaches
        for begin in range(tl.cdiv(last_key, SELECT), num_blocks, BLOCK_N):
            column = begin + tl.arange(0, BLOCK_N)
            unseen = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
            mask = in_use[:, None] & (column < num_blocks)[None, :]
            tl.store(block_scores + score_row[:, None] + column[None, :], unseen, mask=mask)
    finish(
        output, lse, arrived + tile * KV_HEADS + head, maxima, sums, partials, room, maximum, total, acc,
        first_token, num_tokens, chunk, num_chunks, first_partial * KV_HEADS + head, head, HAS_MAXIMA, KV_HEADS,
        MAY_SPLIT, FOLD, KV_HEADS, GROUPS, HEAD_DIM, BLOCK_M, BLOCK_D, MERGE_ROWS, MERGE_SPLITS,
    )  # fmt: skip

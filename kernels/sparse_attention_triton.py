# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Split-KV attention over listed blocks of a paged cache, for decode, verification and draft trees (Triton).

kernels/paged_attention.py over lists: a step reads the next BLOCK_N keys of a unit's list, part of a selection block or
several that are gathered. The loop has no branches: every step masks, by scores that stay finite, and the blocks of the
steps to come are in registers before their keys are asked for.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import PagedSequences
from kernels.attention_plan import Launch
from kernels.attention_steps import UNSEEN, absorb_finite, finish, settle_unseen
from kernels.linear_triton import overlaps
from kernels.select import BlockLists
from kernels.sparse_split import MIN_CHUNK, find_run, grid_of, program_of, room_for, steps_of

MAX_BLOCK_U = 1024  # units whose counts a program looks at together
MERGE_ROWS = 16  # rows that the last program of a unit merges at once


def sparse_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    lists: BlockLists,
    *,
    scale: float,
    launch: Launch | None = None,
    min_chunk: int = MIN_CHUNK,
) -> torch.Tensor:
    """kernels.sparse_attention.sparse_attention on the GPU, one launch.

    launch: None chooses by shape; it folds always. min_chunk: keys below which no further program takes part.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    groups = num_heads // num_kv_heads
    assert query.stride(2) == 1 and key_cache.is_contiguous() and value_cache.is_contiguous()
    assert lists.blocks.is_contiguous() and lists.counts.is_contiguous() and seqs.block_tables.stride(1) == 1
    max_count = lists.blocks.shape[2]
    grid = grid_of(
        seqs,
        groups=groups,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=query.dtype,
        max_list_keys=max_count * lists.select_block,
        launch=launch,
        min_chunk=min_chunk,
    )
    launch = grid.launch
    assert groups <= launch.block_m and launch.slices == 1 and launch.fold
    room = room_for(seqs, grid)
    output = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    is_tree = seqs.ancestors is not None
    block_d = max(16, triton.next_power_of_2(head_dim))
    merge_rows = min(triton.next_power_of_2(grid.rows), MERGE_ROWS)
    merged = min(16384, 4096 * launch.num_warps)  # of partials, at once: 128 registers a thread
    overlap = overlaps(query.device)
    _sparse_kernel[(grid.programs,)](
        query,
        key_cache,
        value_cache,
        output,
        lists.blocks,
        lists.counts,
        seqs.block_tables,
        seqs.cu_seqlens_q,
        seqs.context_lens,
        seqs.num_drafted if is_tree else seqs.context_lens,
        seqs.ancestors if is_tree else query,
        room.arrived,
        room.maxima,
        room.sums,
        room.partials,
        grid.rows,
        grid.units,
        grid.min_steps,
        max_count,
        seqs.block_tables.shape[1],
        query.stride(0),
        query.stride(1),
        seqs.block_tables.stride(0),
        scale * math.log2(math.e),
        IS_TREE=is_tree,
        KV_HEADS=num_kv_heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        TOKENS=grid.tokens,
        TILES=grid.tiles,
        BLOCK_SIZE=seqs.block_size,
        SELECT=lists.select_block,
        BLOCK_U=min(max(32, triton.next_power_of_2(grid.units)), MAX_BLOCK_U),
        ONCE=grid.units <= MAX_BLOCK_U,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_D=block_d,
        MERGE_ROWS=merge_rows,
        MERGE_SPLITS=max(1, merged // (merge_rows * block_d)),
        STAGES=launch.num_stages,
        HELD=lists.held,
        OVERLAP=overlap,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        launch_pdl=overlap,
    )
    return output


@triton.jit
def _entry(blocks, position, last_entry, SELECT: tl.constexpr):
    """The list's entry at a position, in keys; its last where it has ended."""
    return tl.load(blocks + tl.minimum(position // SELECT, last_entry))


@triton.jit
def _key(entry, position, last_block, SELECT: tl.constexpr):
    """The key that an entry stands for, by its index in the sequence; inside the table, whatever the entry."""
    return tl.minimum(tl.maximum(entry, 0), last_block) * SELECT + position % SELECT


# one compilation whatever the table's width, the lists' room and the batch
@triton.jit(do_not_specialize=["room", "num_units", "min_steps", "max_count", "table_width", "table_stride"])
def _sparse_kernel(
    query,
    key_cache,
    value_cache,
    output,
    lists,  # [B, KV_HEADS, max_count] int32
    counts,  # [B, KV_HEADS] int32
    block_tables,
    cu_seqlens,
    context_lens,
    num_drafted,
    ancestors,
    arrived,
    maxima,
    sums,
    partials,
    room,  # rows of a chunk in maxima, sums and partials
    num_units,
    min_steps,
    max_count,
    table_width,
    query_token_stride,
    query_head_stride,
    table_stride,
    score_scale,  # to the exponent of 2
    IS_TREE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SELECT: tl.constexpr,
    BLOCK_U: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not HELD:
        gdc_wait()
    total_steps, programs, position, end, unit, unit_begin = find_run(
        counts, num_units, max_count, min_steps, TILES, SELECT, BLOCK_N, BLOCK_U, ONCE
    )
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token = rows // GROUPS
    is_dim = dims < HEAD_DIM
    step = tl.arange(0, BLOCK_N)
    # a step inside one selection block has one address, and its keys lie end to end; else each key has its own
    inside: tl.constexpr = SELECT % BLOCK_N == 0
    spread = 0 if inside else step
    last_block = table_width * (BLOCK_SIZE // SELECT) - 1

    while position < end:
        steps = steps_of(counts, unit, unit < num_units, max_count, TILES, SELECT, BLOCK_N)
        pair = unit // TILES
        sequence = pair // KV_HEADS
        head = pair % KV_HEADS
        listed = tl.minimum(tl.load(counts + pair), max_count)
        context = tl.load(context_lens + sequence)
        start = tl.load(cu_seqlens + sequence)
        query_len = tl.load(cu_seqlens + sequence + 1) - start
        offset = (unit % TILES) * TOKENS
        first_token = start + offset
        num_tokens = tl.minimum(TOKENS, query_len - offset)
        low = position - unit_begin
        high = tl.minimum(end - unit_begin, steps)
        blocks = lists + pair.to(tl.int64) * max_count
        table = block_tables + sequence.to(tl.int64) * table_stride
        last_entry = tl.maximum(listed - 1, 0)
        # steps to come are in registers: the next one's block of the cache, and the list's entry of the one after
        at = low * BLOCK_N + spread
        key = _key(_entry(blocks, at, last_entry, SELECT), at, last_block, SELECT)
        block = tl.load(table + key // BLOCK_SIZE)
        listed_next = _entry(blocks, at + BLOCK_N, last_entry, SELECT)
        if OVERLAP and HELD:
            gdc_wait()  # for queries and the newest keys; what follows waits no more

        in_use = token < num_tokens
        token_row = (first_token + token).to(tl.int64)
        query_head = head * GROUPS + rows % GROUPS
        q = tl.load(
            query + (token_row * query_token_stride + query_head * query_head_stride)[:, None] + dims[None, :],
            mask=in_use[:, None] & is_dim[None, :],
            other=0.0,
        )
        # the last key that a row sees whatever the tree; a node sees those of its bits too
        last_seen = context + offset + token
        first_node = context + query_len
        bits = tl.zeros([BLOCK_M], tl.int64)
        if IS_TREE:
            first_node -= tl.load(num_drafted + sequence)
            bits = tl.load(ancestors + token_row, mask=in_use & (last_seen >= first_node), other=0)
            last_seen = tl.minimum(last_seen, first_node - 1)
        last_seen, bits = last_seen[:, None], bits[:, None]
        maximum = tl.full([BLOCK_M], UNSEEN, tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros_like(maximum)
        head_dims = head * HEAD_DIM + dims
        for index in tl.range(low, high, num_stages=STAGES):
            slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
            key_index = key
            if inside:
                slot, key_index = slot + step, key + step
            # entries past the list's end repeat its last, unseen
            key_index = tl.where(index * BLOCK_N + step < listed * SELECT, key_index, 1 << 30)
            at = index * BLOCK_N + spread
            key = _key(listed_next, at + BLOCK_N, last_block, SELECT)
            block = tl.load(table + key // BLOCK_SIZE)
            listed_next = _entry(blocks, at + 2 * BLOCK_N, last_entry, SELECT)
            entry = (slot * (KV_HEADS * HEAD_DIM))[:, None] + head_dims[None, :]
            if HEAD_DIM == BLOCK_D:
                k = tl.load(key_cache + entry)
                v = tl.load(value_cache + entry)
            else:
                k = tl.load(key_cache + entry, mask=is_dim, other=0.0)
                v = tl.load(value_cache + entry, mask=is_dim, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
            column = key_index[None, :]
            visible = column <= last_seen
            if IS_TREE:
                node = tl.minimum(tl.maximum(column - first_node, 0), 63).to(tl.int64)
                visible = visible | ((column >= first_node) & (((bits >> node) & 1) != 0))
            scores = tl.where(visible, scores, UNSEEN)
            maximum, total, acc = absorb_finite(scores, v, maximum, total, acc)
        if OVERLAP and unit_begin + high >= end:
            gdc_launch_dependents()  # not earlier: as in kernels/rope_attention_triton.py
        total, acc = settle_unseen(maximum, total, acc)
        first_program = program_of(unit_begin, total_steps, programs)
        finish(
            output, output, arrived + unit, maxima, sums, partials, room, maximum, total, acc,
            first_token, num_tokens, tl.program_id(0) - first_program,
            program_of(unit_begin + steps - 1, total_steps, programs) - first_program + 1, first_program + unit, head,
            False, 1, True, True,
            KV_HEADS, GROUPS, HEAD_DIM, BLOCK_M, BLOCK_D, MERGE_ROWS, MERGE_SPLITS,
        )  # fmt: skip
        position = unit_begin + high
        unit_begin += steps
        unit += 1

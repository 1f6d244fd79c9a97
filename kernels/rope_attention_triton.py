# mypy: allow-untyped-defs
# ruff: noqa: N803
"""rope_and_attend in one launch, for few new tokens (Triton); kernels/paged_attention.py is its longer form.

A tile holds all new tokens of a sequence, so of a key head exactly one program, that of the chunk a new key belongs to,
turns, caches and attends to it, from registers: no program reads a key from the cache that this launch writes there.
What is cached already needs no turning and is streamed; queries are turned by every chunk's program for itself.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import PagedSequences
from kernels.attention_combine import combine, merge_shape
from kernels.attention_plan import (
    ITEM_FIELDS,
    MIN_CHUNK,
    NO_WINDOW,
    Geometry,
    Launch,
    Plan,
    geometry_of,
    plan_for,
)
from kernels.attention_steps import absorb, finish, merge_slices
from kernels.cache_triton import norm_and_turn
from kernels.linear_triton import overlaps


def rope_and_attend_triton(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    scale: float,
    launch: Launch | None = None,
    min_chunk: int = MIN_CHUNK,
) -> torch.Tensor:
    """kernels.rope_attention.rope_and_attend on the GPU. launch: None chooses by shape.

    Where the plan is there already, the launch before this one is qkv's, which lets this one in only once all before it
    have ended: the plan and all else that qkv has no part in are read while qkv is still being computed.
    """
    num_tokens, head_dim = qkv.shape[0], key_cache.shape[3]
    groups = num_heads // num_kv_heads
    assert (q_norm is None) == (k_norm is None)
    assert qkv.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous() and seqs.block_tables.stride(1) == 1
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    geometry = _geometry(seqs, groups, num_kv_heads, head_dim, qkv.dtype, launch, min_chunk)
    launch, is_planned = geometry.launch, geometry in seqs.plans
    plan = plan_for(seqs, geometry, head_dim)
    assert seqs.max_seqlen_q <= plan.tokens and launch.slices in (1, launch.num_warps)
    output = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    merge_rows, merge_splits = merge_shape(plan, block_d)
    overlap = overlaps(qkv.device)
    _rope_and_attend_kernel[(plan.items.shape[0] * num_kv_heads,)](
        qkv,
        positions,
        cos,
        sin,
        seqs.slots,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        key_cache,
        value_cache,
        output,
        seqs.block_tables,
        positions if seqs.ancestors is None else seqs.ancestors,
        plan.items,
        plan.counts,
        plan.arrived,
        plan.maxima,
        plan.sums,
        plan.partials,
        plan.rows,
        qkv.stride(0),
        seqs.block_tables.stride(0),
        scale * math.log2(math.e),
        eps,
        HAS_NORM=q_norm is not None,
        IS_TREE=seqs.ancestors is not None,
        MAY_SPLIT=plan.may_split,
        FOLD=launch.fold,
        KV_HEADS=num_kv_heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos.shape[1],
        BLOCK_SIZE=seqs.block_size,
        FIELDS=ITEM_FIELDS,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_D=block_d,
        BLOCK_NEW=max(16, triton.next_power_of_2(seqs.max_seqlen_q)),
        MERGE_ROWS=merge_rows,
        MERGE_SPLITS=merge_splits,
        STAGES=launch.num_stages,
        SLICES=launch.slices,
        IS_PLANNED=is_planned,
        OVERLAP=overlap,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        launch_pdl=overlap,
    )
    combine(output, None, plan, block_d=block_d, merge_rows=merge_rows, merge_splits=merge_splits, overlap=overlap)
    return output


def plan_launch(seqs: PagedSequences, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Plan:
    """The plan that every layer's launch will find."""
    groups = num_heads // num_kv_heads
    return plan_for(seqs, _geometry(seqs, groups, num_kv_heads, head_dim, dtype, None, MIN_CHUNK), head_dim)


def _geometry(
    seqs: PagedSequences,
    groups: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    launch: Launch | None,
    min_chunk: int,
) -> Geometry:
    return geometry_of(
        seqs,
        groups=groups,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        window=NO_WINDOW,
        min_chunk=min_chunk,
        launch=launch,
    )


@triton.jit(do_not_specialize=["room", "table_stride"])
def _rope_and_attend_kernel(
    qkv,
    positions,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    key_cache,
    value_cache,
    output,
    block_tables,
    ancestors,
    items,
    counts,
    arrived,
    maxima,
    sums,
    partials,
    room,  # rows of a chunk in maxima, sums and partials
    token_stride,
    table_stride,
    score_scale,  # to the exponent of 2
    eps,
    HAS_NORM: tl.constexpr,
    IS_TREE: tl.constexpr,
    MAY_SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SLICES: tl.constexpr,
    IS_PLANNED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not IS_PLANNED:
        gdc_wait()
    item = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    field = items + item * FIELDS
    sequence = tl.load(field + 0)
    first_token = tl.load(field + 1)
    num_tokens = tl.load(field + 2)
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
    token_row = (first_token + token).to(tl.int64)
    new = tl.arange(0, BLOCK_NEW)
    new_key = context + new
    is_mine = (new < num_tokens) & (new_key >= first_key) & (new_key < last_key)
    new_row = (first_token + new).to(tl.int64)
    is_dim = dims < HEAD_DIM
    turns = dims < ROTARY_DIM
    # the dimension that a dimension turns with, and itself where it does not turn
    half: tl.constexpr = ROTARY_DIM // 2
    other = tl.where(turns, tl.where(dims < half, dims + half, dims - half), dims)

    # all that qkv has no part in, before waiting for it
    end = tl.minimum(last_key, context)  # of the cached keys
    table = block_tables + sequence.to(tl.int64) * table_stride
    step = tl.arange(0, BLOCK_N)
    if SLICES > 1:
        step = tl.reshape(step, (SLICES, BLOCK_N // SLICES))
    block = tl.load(table + tl.maximum(tl.minimum(first_key + step, end - 1), 0) // BLOCK_SIZE)
    slot = tl.load(slots + new_row, mask=is_mine, other=0)
    bits = tl.zeros([BLOCK_M], tl.int64)
    if IS_TREE:
        bits = tl.load(ancestors + token_row, mask=in_use, other=0)
    angle = tl.load(positions + token_row, mask=in_use, other=0)[:, None] * ROTARY_DIM + dims[None, :]
    new_angle = tl.load(positions + new_row, mask=is_mine, other=0)[:, None] * ROTARY_DIM + dims[None, :]
    cosine = tl.load(cos + angle, mask=turns[None, :], other=1.0)
    sine = tl.load(sin + angle, mask=turns[None, :], other=0.0)
    new_cosine = tl.load(cos + new_angle, mask=turns[None, :], other=1.0)
    new_sine = tl.load(sin + new_angle, mask=turns[None, :], other=0.0)
    q_weight, q_other, k_weight, k_other = cosine, cosine, cosine, cosine  # not read without a norm
    if HAS_NORM:
        # all four on their way before the first is spread over the rows, which takes barriers
        q_line = tl.load(q_norm + dims, mask=is_dim, other=0.0)
        q_line_other = tl.load(q_norm + other, mask=is_dim, other=0.0)
        k_line = tl.load(k_norm + dims, mask=is_dim, other=0.0)
        k_line_other = tl.load(k_norm + other, mask=is_dim, other=0.0)
        q_weight, q_other = q_line[None, :], q_line_other[None, :]
        k_weight, k_other = k_line[None, :], k_line_other[None, :]
    if OVERLAP and IS_PLANNED:
        gdc_wait()

    query_head = head * GROUPS + rows % GROUPS
    heads: tl.constexpr = KV_HEADS * GROUPS
    query_row = qkv + (token_row * token_stride + query_head * HEAD_DIM)[:, None]
    key_row = qkv + (new_row * token_stride + (heads + head) * HEAD_DIM)[:, None]
    mask = in_use[:, None] & is_dim[None, :]
    new_mask = is_mine[:, None] & is_dim[None, :]
    x = tl.load(query_row + dims[None, :], mask=mask, other=0.0)
    y = tl.load(query_row + other[None, :], mask=mask, other=0.0)
    new_x = tl.load(key_row + dims[None, :], mask=new_mask, other=0.0)
    new_y = tl.load(key_row + other[None, :], mask=new_mask, other=0.0)
    new_v = tl.load(key_row + KV_HEADS * HEAD_DIM + dims[None, :], mask=new_mask, other=0.0)
    turned = norm_and_turn(x, y, q_weight, q_other, cosine, sine, eps, HAS_NORM, HEAD_DIM, ROTARY_DIM, BLOCK_D)
    new_k = norm_and_turn(
        new_x, new_y, k_weight, k_other, new_cosine, new_sine, eps, HAS_NORM, HEAD_DIM, ROTARY_DIM, BLOCK_D
    )
    head_dims = head * HEAD_DIM + dims
    new_entry = slot[:, None] * (KV_HEADS * HEAD_DIM) + head_dims[None, :]
    tl.store(key_cache + new_entry, new_k, mask=new_mask)
    tl.store(value_cache + new_entry, new_v, mask=new_mask)

    # scored before the loop: nothing but the scores takes the place of keys on their way
    new_scores = tl.full([BLOCK_M, BLOCK_NEW], -float("inf"), tl.float32)
    if last_key > context:
        scores = tl.dot(turned, tl.trans(new_k), input_precision="ieee") * score_scale
        visible = new[None, :] <= token[:, None]
        if IS_TREE:
            node = new_key - first_node
            on_path = ((bits[:, None] >> tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)[None, :]) & 1) != 0
            is_ordinary = context + token < first_node
            visible = tl.where(is_ordinary[:, None], visible, (node < 0)[None, :] | on_path)
        new_scores = tl.where(visible & is_mine[None, :], scores, -float("inf"))

    q = turned
    if SLICES == 1:
        maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        # a product of its own for each warp: rows across warps would meet at nine barriers a step
        q = tl.broadcast_to(q[None, :, :], (SLICES, BLOCK_M, BLOCK_D))
        maximum = tl.full([SLICES, BLOCK_M], -float("inf"), tl.float32)
        acc = tl.zeros([SLICES, BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros_like(maximum)
    for begin in tl.range(first_key, end, BLOCK_N, num_stages=STAGES):
        key_index = begin + step
        cached = block.to(tl.int64) * BLOCK_SIZE + tl.minimum(key_index, end - 1) % BLOCK_SIZE
        # a step ahead, in registers: the pipeline holds copies of keys and values alone, which wait for nothing
        block = tl.load(table + tl.minimum(key_index + BLOCK_N, end - 1) // BLOCK_SIZE)
        entry = tl.expand_dims(cached * (KV_HEADS * HEAD_DIM), -1) + head_dims
        if HEAD_DIM == BLOCK_D:
            k = tl.load(key_cache + entry)
            v = tl.load(value_cache + entry)
        else:
            k = tl.load(key_cache + entry, mask=is_dim, other=0.0)
            v = tl.load(value_cache + entry, mask=is_dim, other=0.0)
        transposed = tl.trans(k) if SLICES == 1 else tl.permute(k, (0, 2, 1))
        scores = tl.dot(q, transposed, input_precision="ieee") * score_scale
        if begin + BLOCK_N > end:
            scores = tl.where(tl.expand_dims(key_index, -2) < end, scores, -float("inf"))
        maximum, total, acc = absorb(scores, v, maximum, total, acc)
    if SLICES > 1:
        maximum, total, acc = merge_slices(maximum, total, acc, SLICES, BLOCK_M, BLOCK_D)

    if last_key > context:
        new_v = tl.load(key_row + KV_HEADS * HEAD_DIM + dims[None, :], mask=new_mask, other=0.0)
        maximum, total, acc = absorb(new_scores, new_v, maximum, total, acc)
    if OVERLAP:
        # not earlier: these programs fill the machine, and the next kernel's would crowd where the first of them end
        gdc_launch_dependents()
    finish(
        output, output, arrived + tile * KV_HEADS + head, maxima, sums, partials, room, maximum, total, acc,
        first_token, num_tokens, chunk, num_chunks, first_partial * KV_HEADS + head, head, False, KV_HEADS,
        MAY_SPLIT, FOLD, KV_HEADS, GROUPS, HEAD_DIM, BLOCK_M, BLOCK_D, MERGE_ROWS, MERGE_SPLITS,
    )  # fmt: skip

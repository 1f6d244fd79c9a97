# mypy: allow-untyped-defs
# ruff: noqa: N803
"""A gate's scores and the lists they make, in two launches (Triton); kernels/gate.py defines them.

The first is kernels/gate_queries_triton.py's. A program of the second scores some blocks of one sequence and key head
for all of its new tokens; the last of them to be done makes the list.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import PagedSequences
from kernels.attention_plan import num_programs
from kernels.gate import GateWeights
from kernels.gate_queries_triton import MAX_TOKENS, asked_of_blocks, merge_queries
from kernels.linear_triton import overlaps
from kernels.select import BlockLists, Choice, list_room, num_selection_blocks
from kernels.select_triton import FEW_BLOCKS, MAX_BLOCKS, choose_list

PROGRAMS_PER_SM = 2
BLOCKS_PER_WARP = 256  # of a list: of 128 to 512 the best on an H100, where eight warps make lists of 128 Ki keys
LINE = 32  # scores of 128 bytes: no two lists share a line, of which a multiprocessor may keep an old copy
STAGES = 3
STEP_BYTES = 64 << 10  # of descriptors at most: shared memory holds STAGES steps beside the queries
PRODUCTS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float16,  # which holds all of FP8 and more of the query than bfloat16
}


def gate_scores_triton(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
) -> torch.Tensor:
    """kernels.gate.gate_scores on the GPU."""
    num_blocks = num_selection_blocks(seqs, seqs.block_size // descriptors.shape[1])
    scores, _ = _launch(weights, layer, query, positions, descriptors, seqs, None)
    return scores[:, :, :num_blocks]


def gate_choose_triton(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
    choice: Choice,
) -> BlockLists:
    """kernels.gate.gate_choose on the GPU."""
    _, lists = _launch(weights, layer, query, positions, descriptors, seqs, choice)
    assert lists is not None
    return lists


def _launch(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
    choice: Choice | None,
) -> tuple[torch.Tensor, BlockLists | None]:
    """Scores [B, Hkv, at least NB] and, given a choice, what it makes of them."""
    device, num_rows = query.device, len(seqs.context_lens)
    parts, num_kv_heads, gate_dim = descriptors.shape[1:]
    select_block = seqs.block_size // parts
    num_blocks = num_selection_blocks(seqs, select_block)
    assert descriptors.is_contiguous() and seqs.block_tables.stride(1) == 1 and positions.is_contiguous()
    row = triton.cdiv(num_blocks, LINE) * LINE
    scores = torch.empty(num_rows, num_kv_heads, row, dtype=torch.float32, device=device)
    arrived = torch.empty(num_rows * num_kv_heads, dtype=torch.int32, device=device)
    merged = merge_queries(weights, layer, query, positions, arrived)
    block_all = max(LINE, triton.next_power_of_2(num_blocks))
    block_h = max(16, triton.next_power_of_2(gate_dim // 2))
    most_warps = min(16, STEP_BYTES // (16 * 2 * block_h * descriptors.element_size()))
    num_warps = min(max(4, block_all // BLOCKS_PER_WARP), most_warps)
    block_n = 16 * num_warps
    wave = num_programs(device, PROGRAMS_PER_SM) // (num_rows * num_kv_heads)
    splits = max(1, min(wave, triton.cdiv(num_blocks, block_n)))
    lists = None
    if choice is not None:
        assert num_blocks <= MAX_BLOCKS, f"{num_blocks} selection blocks exceed {MAX_BLOCKS}; take larger ones"
        room = list_room(seqs, choice, select_block=select_block)
        lists = BlockLists(
            blocks=torch.empty(num_rows, num_kv_heads, room, dtype=torch.int32, device=device),
            counts=torch.empty(num_rows, num_kv_heads, dtype=torch.int32, device=device),
            select_block=select_block,
        )
    given = choice or Choice(max_blocks=0, budget_blocks=0)
    overlap = overlaps(device)
    _score_kernel[(num_rows * splits * num_kv_heads,)](
        merged,
        positions,
        weights.query_norm[layer],
        weights.gate_rotation.frequencies,
        descriptors,
        scores,
        seqs.cu_seqlens_q,
        seqs.context_lens,
        seqs.block_tables,
        arrived,
        arrived if lists is None else lists.blocks,
        arrived if lists is None else lists.counts,
        len(positions),
        num_blocks,
        splits,
        row,
        seqs.block_tables.stride(0),
        weights.gate_rotation.scaling,
        weights.eps,
        gate_dim**-0.5,
        0 if lists is None else lists.blocks.shape[2],
        given.max_blocks,
        given.budget_blocks,
        given.share_in_65536ths,
        math.log(given.threshold) if given.threshold is not None and given.threshold > 0 else -math.inf,
        given.sinks,
        given.recent,
        CHOOSE=lists is not None,
        HAS_THRESHOLD=given.threshold is not None,
        MANY=seqs.max_seqlen_q > MAX_TOKENS,
        KV_HEADS=num_kv_heads,
        GATE_DIM=gate_dim,
        SHARES=merged.shape[0],
        PARTS=parts,
        SELECT_BLOCK=select_block,
        BLOCK_Q=min(max(16, triton.next_power_of_2(seqs.max_seqlen_q)), MAX_TOKENS),
        BLOCK_H=block_h,
        BLOCK_N=block_n,
        BLOCK_ALL=block_all,
        FEW=min(FEW_BLOCKS, block_all),
        PRODUCT=PRODUCTS[descriptors.dtype],
        STAGES=STAGES,
        OVERLAP=overlap,
        num_warps=num_warps,
        num_stages=STAGES,
        launch_pdl=overlap,
    )
    return scores, lists


NUMBERS = [
    "num_tokens", "num_blocks", "splits", "score_stride", "table_stride", "room", "max_blocks", "budget_blocks",
    "share", "log_threshold", "sinks", "recent",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _score_kernel(
    merged,
    positions,
    norm,
    frequencies,
    descriptors,
    scores,
    cu_seqlens,
    context_lens,
    block_tables,
    arrived,
    blocks,
    counts,
    num_tokens,
    num_blocks,
    splits,  # programs that share out the blocks of a row and head
    score_stride,
    table_stride,
    scaling,
    eps,
    scale,
    room,
    max_blocks,
    budget_blocks,
    share,
    log_threshold,
    sinks,
    recent,
    CHOOSE: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    MANY: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GATE_DIM: tl.constexpr,
    SHARES: tl.constexpr,
    PARTS: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    FEW: tl.constexpr,
    PRODUCT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some blocks of a row for one key head; the last program of the row and head to be done makes the list."""
    if OVERLAP:
        gdc_launch_dependents()
    # all that the merged queries have no part in, before waiting for them: what came before their launch has ended
    head = tl.program_id(0) % KV_HEADS  # fastest: heads of one block lie side by side in memory
    split = tl.program_id(0) // KV_HEADS % splits
    row = tl.program_id(0) // KV_HEADS // splits
    context = tl.load(context_lens + row)
    complete = tl.minimum(context // SELECT_BLOCK, num_blocks)
    num_busy = tl.minimum(tl.maximum(tl.cdiv(complete, BLOCK_N), 1), splits)
    if split >= num_busy:
        return
    first_token = tl.load(cu_seqlens + row)
    num_new = tl.load(cu_seqlens + row + 1) - first_token
    table = block_tables + row.to(tl.int64) * table_stride
    each = split * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.load(table + tl.maximum(tl.minimum(each, complete - 1), 0) // PARTS)
    half: tl.constexpr = GATE_DIM // 2
    dim = tl.arange(0, BLOCK_H)
    is_dim = dim < half
    frequency = tl.load(frequencies + dim, mask=is_dim, other=0.0)
    gain = tl.load(norm + dim, mask=is_dim, other=0.0).to(tl.float32)
    other_gain = tl.load(norm + half + dim, mask=is_dim, other=0.0).to(tl.float32)
    # both halves of a descriptor, each padded
    column = tl.arange(0, 2 * BLOCK_H)
    is_column = column % BLOCK_H < half
    if half != BLOCK_H:
        column = column // BLOCK_H * half + column % BLOCK_H
    list_index = (row * KV_HEADS + head).to(tl.int64)
    scores += list_index * score_stride
    if OVERLAP:
        gdc_wait()
    # a row without new tokens stores what no block scores less than
    for first in range(0, tl.maximum(num_new, 1) if MANY else 1, BLOCK_Q):
        new = first + tl.arange(0, BLOCK_Q)
        is_new = new < num_new
        asked = asked_of_blocks(
            merged, positions, first_token + new, is_new, head, num_tokens, dim, is_dim, frequency, gain, other_gain,
            scaling, eps, KV_HEADS, GATE_DIM, SHARES, BLOCK_Q, BLOCK_H,
        )  # fmt: skip
        asked = tl.trans(asked.to(PRODUCT))
        for begin in tl.range(split * BLOCK_N, complete, splits * BLOCK_N, num_stages=STAGES):
            index = begin + tl.arange(0, BLOCK_N)
            part = tl.minimum(index, complete - 1) % PARTS
            place = ((block.to(tl.int64) * PARTS + part) * KV_HEADS + head) * GATE_DIM
            # a step ahead, in registers: the pipeline holds copies of descriptors alone, which wait for nothing
            block = tl.load(table + tl.minimum(index + splits * BLOCK_N, complete - 1) // PARTS)
            if half == BLOCK_H:
                described = tl.load(descriptors + place[:, None] + column[None, :])
            else:
                described = tl.load(descriptors + place[:, None] + column[None, :], mask=is_column[None, :], other=0.0)
            products = tl.dot(described.to(PRODUCT), asked, input_precision="ieee") * scale
            best = tl.max(tl.where(is_new[None, :], products, -float("inf")), axis=1)
            target = scores + index
            is_complete = index < complete
            if MANY:  # the tokens before these
                best = tl.maximum(best, tl.load(target, mask=is_complete & (first > 0), other=-float("inf")))
            tl.store(target, best, mask=is_complete)
        if MANY:
            block = tl.load(table + tl.maximum(tl.minimum(each, complete - 1), 0) // PARTS)
    if CHOOSE:
        tl.debug_barrier()  # every thread has stored its scores before one of them says so, or another reads them
        num_done = 0
        if num_busy > 1:
            num_done = tl.atomic_add(arrived + list_index, 1, sem="acq_rel", scope="gpu")
        if (num_busy == 1) | (num_done == num_busy - 1):
            limit = log_threshold
            if HAS_THRESHOLD & (complete > 0) & (num_new > 0):
                limit += _log_sum_exp(scores, complete, BLOCK_ALL)
            choose_list(
                scores, blocks + list_index * room, counts + list_index, context, num_new, complete, room, max_blocks,
                budget_blocks, share, limit, sinks, recent, HAS_THRESHOLD, 1, SELECT_BLOCK, BLOCK_ALL, FEW,
            )  # fmt: skip


@triton.jit
def _log_sum_exp(scores, count, BLOCK: tl.constexpr):
    """Of so many scores, at least one."""
    index = tl.arange(0, BLOCK)
    score = tl.load(scores + index, mask=index < count, other=-float("inf"))
    largest = tl.max(score, axis=0)
    return largest + tl.log(tl.sum(tl.exp(score - largest), axis=0))

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""The best blocks by score, without a sort (Triton).

Floats become integers of the same order. The smallest of the best is found by cutting the range of integers in four and
counting, at most sixteen times, and fewer where a cut happens to part the best from the rest; then a running count says
where in the ascending list each of them goes. All scores of a list stay in registers.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import PagedSequences
from kernels.linear_triton import overlaps
from kernels.select import BlockLists, Choice, list_room, num_selection_blocks

MAX_BLOCKS = 1 << 14  # of a sequence: two counts share an integer, and scores their program's registers
FEW_BLOCKS = 1024  # of a sequence that is far below the bound on it: a smaller search does
BLOCKS_PER_WARP = 256  # eight a thread: few enough warps that a count is soon summed


def choose_blocks_triton(
    scores: torch.Tensor, seqs: PagedSequences, choice: Choice, *, select_block: int
) -> BlockLists:
    """kernels.select.choose_blocks on the GPU."""
    num_rows, num_kv_heads, num_scores = scores.shape
    num_blocks = num_selection_blocks(seqs, select_block)
    assert scores.dtype == torch.float32 and scores.stride(2) in (0, 1)
    assert num_blocks <= MAX_BLOCKS, f"{num_blocks} selection blocks exceed {MAX_BLOCKS}; take larger ones"
    room = list_room(seqs, choice, select_block=select_block)
    blocks = torch.empty(num_rows, num_kv_heads, room, dtype=torch.int32, device=scores.device)
    counts = torch.empty(num_rows, num_kv_heads, dtype=torch.int32, device=scores.device)
    block_n = max(32, triton.next_power_of_2(num_blocks))
    overlap = overlaps(scores.device)
    _choose_kernel[(num_rows * num_kv_heads,)](
        scores,
        seqs.cu_seqlens_q,
        seqs.context_lens,
        blocks,
        counts,
        num_scores,
        room,
        scores.stride(0),
        scores.stride(1),
        choice.max_blocks,
        choice.budget_blocks,
        choice.share_in_65536ths,
        0.0 if choice.threshold is None else choice.threshold,
        choice.sinks,
        choice.recent,
        HAS_THRESHOLD=choice.threshold is not None,
        SCORE_STRIDE=scores.stride(2),
        KV_HEADS=num_kv_heads,
        SELECT_BLOCK=select_block,
        BLOCK_N=block_n,
        FEW=min(FEW_BLOCKS, block_n),
        OVERLAP=overlap,
        num_warps=min(max(1, block_n // BLOCKS_PER_WARP), 16),
        launch_pdl=overlap,
    )
    return BlockLists(blocks, counts, select_block)


NUMBERS = [
    "num_scores", "room", "row_stride", "head_stride", "max_blocks", "budget_blocks", "share", "threshold",
    "sinks", "recent",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _choose_kernel(
    scores,
    cu_seqlens,
    context_lens,
    blocks,
    counts,
    num_scores,
    room,
    row_stride,
    head_stride,
    max_blocks,
    budget_blocks,
    share,
    threshold,
    sinks,
    recent,
    HAS_THRESHOLD: tl.constexpr,
    SCORE_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One list."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    context = tl.load(context_lens + row)
    num_new = tl.load(cu_seqlens + row + 1) - tl.load(cu_seqlens + row)
    scores += row.to(tl.int64) * row_stride + head * head_stride
    blocks += tl.program_id(0).to(tl.int64) * room
    choose_list(
        scores, blocks, counts + tl.program_id(0), context, num_new, num_scores, room, max_blocks, budget_blocks, share,
        threshold, sinks, recent, HAS_THRESHOLD, SCORE_STRIDE, SELECT_BLOCK, BLOCK_N, FEW,
    )  # fmt: skip


@triton.jit
def choose_list(
    scores,
    blocks,
    counts,
    context,
    num_new,
    num_scores,
    room,
    max_blocks,
    budget_blocks,
    share,
    threshold,
    sinks,
    recent,
    HAS_THRESHOLD: tl.constexpr,
    SCORE_STRIDE: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEW: tl.constexpr,
):
    """The list of one sequence and key head, by its scores. BLOCK_N: no fewer than its blocks and a list's room."""
    total = tl.cdiv(context + num_new, SELECT_BLOCK)
    complete = context // SELECT_BLOCK
    wanted = ((total.to(tl.int64) * share + 32768) // 65536).to(tl.int32)
    wanted = tl.minimum(tl.maximum(wanted, budget_blocks), max_blocks)
    if (FEW < BLOCK_N) & (tl.maximum(total, room) <= FEW):
        _choose(
            scores, blocks, counts, total, complete, wanted, tl.minimum(num_scores, complete), room, threshold,
            sinks, recent, HAS_THRESHOLD, SCORE_STRIDE, FEW,
        )  # fmt: skip
    else:
        _choose(
            scores, blocks, counts, total, complete, wanted, tl.minimum(num_scores, complete), room, threshold,
            sinks, recent, HAS_THRESHOLD, SCORE_STRIDE, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _choose(
    scores,
    blocks,
    counts,
    total,
    complete,
    wanted,
    num_scored,
    room,
    threshold,
    sinks,
    recent,
    HAS_THRESHOLD: tl.constexpr,
    SCORE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    lowest: tl.constexpr = -2147483648  # of what does not exist
    highest: tl.constexpr = 2147483647  # of what is always read
    index = tl.arange(0, BLOCK_N)
    exists = index < total
    always = exists & ((index < sinks) | (index >= complete - recent))
    score = tl.load(scores + index * SCORE_STRIDE, mask=exists & (index < num_scored), other=-float("inf"))
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(exists, tl.where(always, highest, key), lowest)

    if HAS_THRESHOLD:
        # in one sum: no two of the counts reach 2^16
        sums = tl.sum(tl.where(always, 65536, 0) + tl.where(always | (exists & (score > threshold)), 1, 0), axis=0)
        num_always = sums >> 16
        wanted = tl.minimum(wanted, sums & 65535)
    else:
        num_always = tl.sum(always.to(tl.int32), axis=0)
    wanted = tl.minimum(tl.maximum(wanted, num_always), total)

    # low: as many keys as wanted or more are no less; high: fewer are. num_low: of the keys no less than low
    low, high = tl.cast(lowest + 1, tl.int64), tl.cast(highest + 1, tl.int64)
    num_low = total
    while (high - low > 1) & (num_low != wanted):
        step = tl.maximum((high - low) >> 2, 1)
        first, second, third = low + step, tl.minimum(low + 2 * step, high - 1), tl.minimum(low + 3 * step, high - 1)
        passed = tl.where(key >= first.to(tl.int32), 1, 0).to(tl.int64)
        passed += tl.where(key >= second.to(tl.int32), 1 << 20, 0).to(tl.int64)
        passed += tl.where(key >= third.to(tl.int32), 1, 0).to(tl.int64) << 40
        passed = tl.sum(passed, axis=0)
        num_first = (passed & 0xFFFFF).to(tl.int32)
        num_second = ((passed >> 20) & 0xFFFFF).to(tl.int32)
        num_third = (passed >> 40).to(tl.int32)
        high = tl.where(
            num_first < wanted, first, tl.where(num_second < wanted, second, tl.where(num_third < wanted, third, high))
        )
        num_low = tl.where(num_first >= wanted, num_first, num_low)
        low = tl.where(num_first >= wanted, first, low)
        num_low = tl.where(num_second >= wanted, num_second, num_low)
        low = tl.where(num_second >= wanted, second, low)
        num_low = tl.where(num_third >= wanted, num_third, num_low)
        low = tl.where(num_third >= wanted, third, low)

    # of the keys that equal low, the oldest are too many
    too_many = num_low - wanted
    is_low = key == low.to(tl.int32)
    is_above = key > low.to(tl.int32)
    running = tl.cumsum(tl.where(is_above, 1, 0) + tl.where(is_low, 65536, 0), axis=0)
    lows = running >> 16
    kept = (running & 65535) + tl.maximum(lows - too_many, 0)
    is_kept = is_above | (is_low & (lows > too_many))
    # the rest of the list takes the others' places, with a block that exists
    place = tl.where(is_kept, kept - 1, wanted + index - kept)
    tl.store(blocks + place, tl.where(is_kept, index, 0), mask=place < room)
    tl.store(counts, wanted)

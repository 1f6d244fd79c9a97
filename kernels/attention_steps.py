# mypy: allow-untyped-defs
# ruff: noqa: N803
"""What the attention kernels share: a step of the running softmax, and what becomes of a chunk after its last (Triton).

A program keeps for each of its M rows the largest score so far, the sum of exponentials and the weighted sum of values:
maximum and total [M], acc [M, D]. With slices each has a first dimension more, until they are merged.
"""

import triton
import triton.language as tl

from kernels.attention_combine import LN_2, combine_chunks

UNSEEN = tl.constexpr(-1e30)  # a score that is masked, where a step must stay finite


@triton.jit
def absorb(scores, v, maximum, total, acc):
    """Take in the values of some keys by their scores, exponents of 2; the new (maximum, total, acc)."""
    raised = tl.maximum(maximum, tl.max(scores, axis=-1))
    # a row that has seen nothing yet: -inf less -inf is not a number
    finite = tl.where(raised == -float("inf"), 0.0, raised)
    probs = tl.exp2(scores - tl.expand_dims(finite, -1))
    shrink = tl.exp2(maximum - finite)
    total = total * shrink + tl.sum(probs, axis=-1)
    acc = tl.dot(probs.to(v.dtype), v, acc * tl.expand_dims(shrink, -1), input_precision="ieee")
    return raised, total, acc


@triton.jit
def absorb_finite(scores, v, maximum, total, acc):
    """absorb, where masked scores are UNSEEN and maximum begins so: what came before the first seen key counts 0 then.

    A row that never sees one sums nonsense; settle_unseen makes it 0.
    """
    raised = tl.maximum(maximum, tl.max(scores, axis=-1))
    probs = tl.exp2(scores - tl.expand_dims(raised, -1))
    shrink = tl.exp2(maximum - raised)
    total = total * shrink + tl.sum(probs, axis=-1)
    acc = tl.dot(probs.to(v.dtype), v, acc * tl.expand_dims(shrink, -1), input_precision="ieee")
    return raised, total, acc


@triton.jit
def settle_unseen(maximum, total, acc):
    """The (total, acc) of rows, 0 where a row has seen nothing."""
    seen = maximum > 0.5 * UNSEEN
    return tl.where(seen, total, 0.0), tl.where(tl.expand_dims(seen, -1), acc, 0.0)


@triton.jit
def as_rows(values, SLICES: tl.constexpr):
    """One value a row, shaped to go with scores: [M, 1], or [1, M, 1] with slices."""
    return values[:, None] if SLICES == 1 else values[None, :, None]


@triton.jit
def merge_slices(maximum, total, acc, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The (maximum, total, acc) of all slices together."""
    highest = tl.max(maximum, axis=0)
    finite = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp2(maximum - finite[None, :])
    total = tl.sum(total * weight, axis=0)
    acc = _sum_slices(acc * weight[:, :, None], SLICES, BLOCK_M, BLOCK_D)
    return highest, total, acc


@triton.jit
def finish(
    output,
    lse,
    arrived,
    maxima,
    sums,
    partials,
    room,
    maximum,
    total,
    acc,
    first_token,
    num_tokens,
    chunk,
    num_chunks,
    first_part,
    head,
    HAS_LSE: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    MAY_SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
):
    """Store a tile's output where its one chunk is all; else leave the chunk's part, and merge all where it is last.

    arrived: the tile's and head's own count. Chunk i is part first_part + i PART_STRIDE of maxima, sums and partials.
    """
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token = rows // GROUPS
    in_use = token < num_tokens
    mask = in_use[:, None] & (dims < HEAD_DIM)[None, :]
    if not MAY_SPLIT or num_chunks == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        token_row = (first_token + token).to(tl.int64)
        query_head = head * GROUPS + rows % GROUPS
        place = token_row * (KV_HEADS * GROUPS) + query_head
        where = place[:, None] * HEAD_DIM + dims[None, :]
        tl.store(output + where, result.to(output.dtype.element_ty), mask=mask)
        if HAS_LSE:
            tl.store(lse + place, (maximum + tl.log2(total)) * LN_2, mask=in_use)
    else:
        part = (first_part + chunk * PART_STRIDE).to(tl.int64) * room + rows
        tl.store(maxima + part, maximum, mask=in_use)
        tl.store(sums + part, total, mask=in_use)
        tl.store(partials + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        if FOLD:
            tl.debug_barrier()  # every thread has stored before one of them says so
            done = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
            if done == num_chunks - 1:
                tl.store(arrived, 0)  # for the next layer
                for first_row in range(0, num_tokens * GROUPS, MERGE_ROWS):
                    combine_chunks(
                        output, lse, maxima, sums, partials, room, first_row, first_token, num_tokens, num_chunks,
                        first_part, head, HAS_LSE, PART_STRIDE, KV_HEADS, GROUPS, HEAD_DIM, BLOCK_D, MERGE_ROWS,
                        MERGE_SPLITS,
                    )  # fmt: skip


@triton.jit
def _sum_slices(parts, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """[SLICES, M, D] to [M, D] by halves: one pass through shared memory, where tl.sum takes one for each register."""
    if SLICES == 1:
        result = tl.reshape(parts, (BLOCK_M, BLOCK_D))
    else:
        halves = tl.permute(tl.reshape(parts, (2, SLICES // 2, BLOCK_M, BLOCK_D)), (1, 2, 3, 0))
        first, second = tl.split(halves)
        result = _sum_slices(first + second, SLICES // 2, BLOCK_M, BLOCK_D)
    return result

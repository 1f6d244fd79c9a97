# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Merging the chunks of a tile, by the last program to finish it or by a kernel after (Triton)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention_plan import TILE_FIELDS, Plan

COMBINE_ROWS = 4  # rows that a program of the combining kernel merges
LN_2 = tl.constexpr(0.6931471805599453)
FOLD_ROWS = 16  # rows that a folding program merges at once: it waits for them in turn


def merge_shape(plan: Plan, block_d: int) -> tuple[int, int]:
    """Rows and splits that the merge holds in registers at once: 64 a thread of 4 warps."""
    rows = min(triton.next_power_of_2(plan.rows), FOLD_ROWS if plan.geometry.launch.fold else COMBINE_ROWS)
    return rows, max(1, 8192 // (rows * block_d))


def combine(
    output: torch.Tensor,
    lse: torch.Tensor | None,
    plan: Plan,
    *,
    block_d: int,
    merge_rows: int,
    merge_splits: int,
    overlap: bool,
) -> None:
    """Merge the chunks of split tiles into output [T, Hq, D], where programs have not folded them already.

    lse [T, Hq] float32: the log-sum-exp of their scores, where it is asked for.
    """
    geometry = plan.geometry
    if not plan.may_split or geometry.launch.fold:
        return
    combine_kernel[(plan.tiles.shape[0], geometry.num_kv_heads, triton.cdiv(plan.rows, merge_rows))](
        output,
        output if lse is None else lse,
        plan.tiles,
        plan.counts,
        plan.maxima,
        plan.sums,
        plan.partials,
        plan.rows,
        HAS_LSE=lse is not None,
        KV_HEADS=geometry.num_kv_heads,
        GROUPS=geometry.groups,
        HEAD_DIM=output.shape[2],
        FIELDS=TILE_FIELDS,
        BLOCK_D=block_d,
        MERGE_ROWS=merge_rows,
        MERGE_SPLITS=merge_splits,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )


@triton.jit(do_not_specialize=["room"])
def combine_kernel(
    output,
    lse,
    tiles,
    counts,
    maxima,
    sums,
    partials,
    room,
    HAS_LSE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some rows of one tile; nothing to do where one chunk is all."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    field = tiles + tile * FIELDS
    first_token = tl.load(field + 0)
    num_tokens = tl.load(field + 1)
    num_chunks = tl.load(field + 2)
    first_partial = tl.load(field + 3)
    first_row = tl.program_id(2) * MERGE_ROWS
    if tile >= tl.load(counts + 1) or num_chunks == 1 or first_row >= num_tokens * GROUPS:
        return
    combine_chunks(
        output, lse, maxima, sums, partials, room, first_row, first_token, num_tokens, num_chunks,
        first_partial * KV_HEADS + tl.program_id(1), tl.program_id(1), HAS_LSE, KV_HEADS, KV_HEADS, GROUPS, HEAD_DIM,
        BLOCK_D, MERGE_ROWS, MERGE_SPLITS,
    )  # fmt: skip


@triton.jit
def combine_chunks(
    output,
    lse,
    maxima,
    sums,
    partials,
    room,
    first_row,
    first_token,
    num_tokens,
    num_chunks,
    first_part,
    head,
    HAS_LSE: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
):
    """Merge the chunks of MERGE_ROWS rows of a tile, MERGE_SPLITS at a time.

    Chunk i is part first_part + i PART_STRIDE of maxima, sums and partials.
    """
    rows = first_row + tl.arange(0, MERGE_ROWS)
    dims = tl.arange(0, BLOCK_D)
    in_use = rows < num_tokens * GROUPS
    is_dim = dims < HEAD_DIM
    maximum = tl.full([MERGE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([MERGE_ROWS], tl.float32)
    acc = tl.zeros([MERGE_ROWS, BLOCK_D], tl.float32)
    for begin in range(0, num_chunks, MERGE_SPLITS):
        chunk = begin + tl.arange(0, MERGE_SPLITS)
        exists = (chunk < num_chunks)[None, :] & in_use[:, None]
        slot = (first_part + chunk * PART_STRIDE).to(tl.int64)[None, :] * room + rows[:, None]
        # .cg: written by other multiprocessors, whose stores this one's first-level cache does not see
        chunk_max = tl.load(maxima + slot, mask=exists, other=-float("inf"), cache_modifier=".cg")
        chunk_sum = tl.load(sums + slot, mask=exists, other=0.0, cache_modifier=".cg")
        chunk_acc = tl.load(
            partials + slot[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=exists[:, :, None] & is_dim[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        raised = tl.maximum(maximum, tl.max(chunk_max, axis=1))
        finite = tl.where(raised == -float("inf"), 0.0, raised)
        weight = tl.exp2(chunk_max - finite[:, None])
        shrink = tl.exp2(maximum - finite)
        total = total * shrink + tl.sum(chunk_sum * weight, axis=1)
        acc = acc * shrink[:, None] + tl.sum(chunk_acc * weight[:, :, None], axis=1)
        maximum = raised
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token_row = (first_token + rows // GROUPS).to(tl.int64)
    place = token_row * (KV_HEADS * GROUPS) + head * GROUPS + rows % GROUPS
    where = place[:, None] * HEAD_DIM + dims[None, :]
    tl.store(output + where, result.to(output.dtype.element_ty), mask=in_use[:, None] & is_dim[None, :])
    if HAS_LSE:
        tl.store(lse + place, (maximum + tl.log2(total)) * LN_2, mask=in_use)

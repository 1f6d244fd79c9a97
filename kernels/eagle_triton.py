# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Laying out a head's steps and joining their inputs, as one Triton kernel each; kernels/eagle.py defines both."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cycle import Rows, Texts
from kernels.eagle import CatchUp, KvRings
from kernels.features import NUM_AUX, Rings
from kernels.linear import Norm
from kernels.linear_triton import overlaps

COLUMNS = 4096  # of the residual streams that one program copies


def catch_up_triton(
    texts: Texts,
    rows: Rows,
    rings: Rings,
    kv: KvRings,
    published: torch.Tensor,
    *,
    num_rows: int,
    num_positions: int,
    levels: int,
    top_k: int,
) -> CatchUp:
    """catch_up, in one launch."""
    ring_size = rings.states.shape[1]
    width = rings.states.shape[2] // (NUM_AUX + 2) * NUM_AUX
    assert num_positions <= ring_size and rings.states.is_contiguous()
    num_nodes = (levels - 1) * top_k
    device = texts.tokens.device
    # rows of a table begin where a kernel that is compiled for aligned pointers may read them
    known = torch.empty(3, _aligned(num_rows * num_positions), dtype=torch.int64, device=device)
    nodes = torch.empty(3, levels - 1, _aligned(num_rows * top_k), dtype=torch.int64, device=device)
    sample_positions = torch.empty(levels, _aligned(num_rows), dtype=torch.int64, device=device)
    contexts = torch.empty(levels, _aligned(num_rows), dtype=torch.int32, device=device)
    drafting = torch.empty(num_rows, dtype=torch.int32, device=device)
    block_tables = torch.empty(num_rows, kv.blocks_each, dtype=torch.int32, device=device)
    aux = rings.states.new_empty(num_rows * num_positions, width)
    _catch_up_kernel[(num_rows, num_positions + 1, triton.cdiv(width, COLUMNS))](
        texts.tokens,
        texts.lengths,
        rows.text,
        rows.active,
        rings.slot_of,
        rings.starts,
        rings.begun,
        rings.states,
        kv.origins,
        kv.digested,
        kv.begun,
        published,
        known,
        aux,
        nodes,
        sample_positions,
        contexts,
        block_tables,
        drafting,
        len(rings.starts) - 1,
        texts.tokens.stride(0),
        known.stride(0),
        nodes.stride(0),
        nodes.stride(1),
        sample_positions.stride(0),
        contexts.stride(0),
        width,
        rings.states.shape[2],
        kv.window,
        RING=ring_size,
        NUM_BLOCKS=kv.blocks_each,
        BLOCK_SIZE=kv.block_size,
        NUM_POSITIONS=num_positions,
        NUM_LEVELS=levels,
        TOP_K=top_k,
        POSITIONS=triton.next_power_of_2(num_positions),
        LEVELS=triton.next_power_of_2(levels),
        NODES=triton.next_power_of_2(max(1, num_nodes)),
        BLOCKS=triton.next_power_of_2(kv.blocks_each),
        COLUMNS=min(COLUMNS, triton.next_power_of_2(width)),
        num_warps=4,
    )
    token_ids, positions, slots = known[:, : num_rows * num_positions].unbind()
    node_positions, node_slots, node_indices = nodes[:, :, : num_rows * top_k].unbind()
    return CatchUp(
        token_ids=token_ids,
        aux=aux,
        positions=positions,
        slots=slots,
        block_tables=block_tables,
        contexts=contexts[:, :num_rows],
        node_positions=node_positions,
        node_slots=node_slots,
        node_indices=node_indices,
        sample_positions=sample_positions[:, :num_rows],
        drafting=drafting,
    )


def join_inputs_triton(
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    states: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    embed_norm: Norm,
    state_norm: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """join_inputs, one program a token and half."""
    num_tokens, width = len(token_ids), states.shape[1]
    assert embed_norm.eps == state_norm.eps
    joined = states.new_empty(num_tokens, 2 * width)
    taken = states if rows is None else states.new_empty(num_tokens, width)
    block = triton.next_power_of_2(width)
    overlap = overlaps(states.device)
    _join_inputs_kernel[(num_tokens, 2)](
        token_ids,
        embedding,
        states,
        token_ids if rows is None else rows,
        embed_norm.weight,
        state_norm.weight,
        joined,
        taken,
        width,
        embedding.stride(0),
        states.stride(0),
        embed_norm.eps,
        TAKE=rows is not None,
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=min(max(block // 512, 1), 8),
        launch_pdl=overlap,
    )
    return joined, taken


def _aligned(num_elements: int) -> int:
    return triton.cdiv(num_elements, 16) * 16


@triton.jit(do_not_specialize=["nobody"])
def _catch_up_kernel(
    tokens_ptr,
    lengths_ptr,
    text_ptr,
    active_ptr,
    slot_of_ptr,
    starts_ptr,
    begun_ptr,
    states_ptr,
    origins_ptr,
    digested_ptr,
    kv_begun_ptr,
    published_ptr,
    known_ptr,  # [3, >= B * C] int64: token_ids, positions, slots
    aux_ptr,
    nodes_ptr,  # [3, L - 1, >= B * k] int64: node_positions, node_slots, node_indices
    sample_positions_ptr,
    contexts_ptr,
    block_tables_ptr,
    drafting_ptr,
    nobody,
    tokens_stride,
    known_stride,
    nodes_stride,
    level_stride,
    sample_stride,
    contexts_stride,
    width,
    state_stride,
    window,
    RING: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_POSITIONS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    TOP_K: tl.constexpr,
    POSITIONS: tl.constexpr,
    LEVELS: tl.constexpr,
    NODES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The residual streams of one position, some columns; or, in a row's last program, all the rest of it."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    chunk = tl.program_id(2)
    text = tl.load(text_ptr + row).to(tl.int64)
    slot = tl.load(slot_of_ptr + text)
    start = tl.load(starts_ptr + slot)
    newest = tl.load(lengths_ptr + text) - 2
    drafting = (tl.load(active_ptr + row) != 0) & (slot < nobody) & (newest >= start)
    drafting &= tl.load(published_ptr) != 0
    slot = tl.where(drafting, slot, nobody).to(tl.int64)
    if index < NUM_POSITIONS:
        # what the last program changes is not read here
        position = newest - (NUM_POSITIONS - 1) + index
        known = drafting & (position >= start)
        source = tl.where(known, slot, nobody) * RING + tl.where(known, position % RING, 0)
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        aux = tl.load(states_ptr + source * state_stride + column, mask=column < width)
        tl.store(aux_ptr + (row * NUM_POSITIONS + index) * width + column, aux, mask=column < width)
    elif chunk == 0:
        first = tl.maximum(newest - (NUM_POSITIONS - 1), start)
        begun = tl.load(begun_ptr + slot)
        is_new = (tl.load(kv_begun_ptr + slot) != begun) | (tl.load(digested_ptr + slot) < first)
        origin = tl.where(is_new, first, tl.load(origins_ptr + slot))
        # every warp reads them for itself: none may still be about to when the first one writes
        tl.debug_barrier()
        tl.store(origins_ptr + slot, origin, mask=drafting)
        tl.store(digested_ptr + slot, newest + 1, mask=drafting)
        tl.store(kv_begun_ptr + slot, begun, mask=drafting)
        newest = tl.where(drafting, newest, 0)
        origin = tl.where(drafting, origin, 0)
        tl.store(drafting_ptr + row, drafting.to(tl.int32))
        ring = slot * (NUM_BLOCKS * BLOCK_SIZE)

        place = tl.arange(0, POSITIONS)
        position = newest - (NUM_POSITIONS - 1) + place
        known = drafting & (position >= start) & (place < NUM_POSITIONS)
        token = tl.load(tokens_ptr + text * tokens_stride + position + 1, mask=known, other=0)
        entry = tl.where(drafting & (position >= origin), position - origin, 0) % (NUM_BLOCKS * BLOCK_SIZE)
        nobodys = nobody.to(tl.int64) * (NUM_BLOCKS * BLOCK_SIZE)
        slots = tl.where(drafting & (position >= origin), ring, nobodys) + entry
        out = known_ptr + row * NUM_POSITIONS + place
        tl.store(out, token.to(tl.int64), mask=place < NUM_POSITIONS)
        tl.store(out + known_stride, tl.where(known, position, 0).to(tl.int64), mask=place < NUM_POSITIONS)
        tl.store(out + 2 * known_stride, slots, mask=place < NUM_POSITIONS)

        entry = newest - origin
        first_block = tl.maximum(entry - window + 1, 0) // BLOCK_SIZE
        context = entry - first_block * BLOCK_SIZE
        block = tl.arange(0, BLOCKS)
        blocks = slot.to(tl.int32) * NUM_BLOCKS + (first_block + block) % NUM_BLOCKS
        tl.store(block_tables_ptr + row * NUM_BLOCKS + block, blocks, mask=block < NUM_BLOCKS)
        level = tl.arange(0, LEVELS)
        contexts = context + tl.where(level == 0, 0, 1 + (level - 1) * TOP_K)
        tl.store(contexts_ptr + level * contexts_stride + row, contexts, mask=level < NUM_LEVELS)
        sampled = (newest + 2 + level).to(tl.int64)
        tl.store(sample_positions_ptr + level * sample_stride + row, sampled, mask=level < NUM_LEVELS)
        node = tl.arange(0, NODES)
        depth = 1 + node // TOP_K
        exists = node < (NUM_LEVELS - 1) * TOP_K
        out = nodes_ptr + (depth - 1) * level_stride + row * TOP_K + node % TOP_K
        node_slots = ring + (entry + 1 + node) % (NUM_BLOCKS * BLOCK_SIZE)
        tl.store(out, (newest + depth).to(tl.int64), mask=exists)
        tl.store(out + nodes_stride, node_slots, mask=exists)
        tl.store(out + 2 * nodes_stride, (context + depth).to(tl.int64), mask=exists)


@triton.jit
def _join_inputs_kernel(
    token_ids_ptr,
    embedding_ptr,
    states_ptr,
    rows_ptr,
    embed_norm_ptr,
    state_norm_ptr,
    joined_ptr,
    taken_ptr,
    width,
    embedding_stride,
    states_stride,
    eps,
    TAKE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The embedding of one token, or its state."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if tl.program_id(1) == 0:
        source = embedding_ptr + tl.load(token_ids_ptr + token) * embedding_stride
        weight = tl.load(embed_norm_ptr + column, mask=inside, other=0.0)
    else:
        row = token
        if TAKE:
            row = tl.load(rows_ptr + token)
        source = states_ptr + row * states_stride
        weight = tl.load(state_norm_ptr + column, mask=inside, other=0.0)
    x = tl.load(source + column, mask=inside, other=0.0)
    if TAKE and tl.program_id(1) == 1:
        tl.store(taken_ptr + token * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * rstd).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    target = joined_ptr + token * (2 * width) + tl.program_id(1) * width + column
    tl.store(target, normed.to(x.dtype), mask=inside)

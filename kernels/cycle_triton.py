# mypy: allow-untyped-defs
# ruff: noqa: N803
"""The two ends of a cycle as one Triton kernel each, one program a row; kernels/cycle.py defines what they compute.

A tree is a vector: its nodes' parents are followed by gathers in log2(M) rounds, and which nodes are kept follows
from two bit masks, so no program walks node by node.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cycle import MAX_NODES, CycleInputs, CycleResult, Drafts, Rows, Texts
from kernels.linear_triton import overlaps


def prepare_triton(
    texts: Texts, rows: Rows, drafts: Drafts | None, *, num_rows: int, block_size: int, dummy_slot: int
) -> CycleInputs:
    """prepare, in one launch."""
    num_nodes = _num_nodes(drafts)
    num_tokens = 1 + num_nodes
    long = texts.tokens.new_empty(6, _aligned(num_rows * num_tokens), dtype=torch.int64)
    short = texts.tokens.new_empty(3, _aligned(num_rows), dtype=torch.int32)
    token_ids, positions, slots, ancestors, keys, sample_positions = long[:, : num_rows * num_tokens].unbind()
    context_lens, num_drafted, num_valid = short[:, :num_rows].unbind()
    # without drafts the kernel reads none of their pointers
    trees = drafts or Drafts(texts.tokens, texts.tokens, texts.lengths)
    _prepare_kernel[(num_rows,)](
        texts.tokens,
        texts.lengths,
        rows.text,
        rows.keys,
        rows.max_lengths,
        rows.active,
        rows.block_tables,
        trees.token_ids,
        trees.parents,
        trees.num_nodes,
        long,
        short,
        long.shape[1],
        short.shape[1],
        dummy_slot,
        texts.tokens.stride(0),
        rows.block_tables.stride(0),
        trees.token_ids.stride(0),
        trees.parents.stride(0),
        NUM_NODES=num_nodes,
        ROUNDS=max(num_nodes - 1, 0).bit_length(),
        BLOCK_SIZE=block_size,
        TOKENS=triton.next_power_of_2(num_tokens),
        num_warps=1,
    )
    return CycleInputs(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        context_lens=context_lens,
        ancestors=ancestors,
        num_drafted=num_drafted,
        keys=keys,
        sample_positions=sample_positions,
        num_valid=num_valid,
    )


def commit_triton(
    texts: Texts,
    rows: Rows,
    drafts: Drafts | None,
    inputs: CycleInputs,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    num_rows: int,
    block_size: int,
    stop_ids: torch.Tensor,
    out: torch.Tensor | None = None,
) -> CycleResult:
    """commit, in one launch."""
    num_nodes = _num_nodes(drafts)
    host = texts.tokens.new_empty(num_rows, 6 + 3 * num_nodes) if out is None else out
    assert host.is_contiguous()
    moves = texts.tokens.new_empty(2, _aligned(num_rows * num_nodes), dtype=torch.int64)
    src_slots, dst_slots = moves[:, : num_rows * num_nodes].unflatten(1, (num_rows, num_nodes)).unbind()
    path = texts.tokens.new_empty(num_rows, 1 + num_nodes)
    trees = drafts or Drafts(texts.tokens, texts.tokens, texts.lengths)
    overlap = overlaps(texts.tokens.device)
    _commit_kernel[(num_rows,)](
        texts.tokens,
        texts.lengths,
        rows.text,
        rows.max_lengths,
        rows.active,
        rows.block_tables,
        trees.token_ids,
        trees.parents,
        inputs.positions,
        inputs.ancestors,
        inputs.num_valid,
        token_ids,
        logprobs,
        stop_ids,
        host,
        moves,
        path,
        moves.shape[1],
        texts.tokens.stride(0),
        rows.block_tables.stride(0),
        trees.token_ids.stride(0),
        trees.parents.stride(0),
        NUM_NODES=num_nodes,
        NUM_STOPS=stop_ids.shape[0],
        BLOCK_SIZE=block_size,
        TOKENS=triton.next_power_of_2(1 + num_nodes),
        OVERLAP=overlap,
        num_warps=1 if num_nodes < 32 else 4,
        launch_pdl=overlap,
    )
    return CycleResult(host, src_slots, dst_slots, path)


@triton.jit
def _prepare_kernel(
    tokens_ptr,
    lengths_ptr,
    text_ptr,
    keys_ptr,
    max_lengths_ptr,
    active_ptr,
    block_tables_ptr,
    draft_ids_ptr,
    parents_ptr,
    num_nodes_ptr,
    long_ptr,  # [6, >= B * Q] int64: token_ids, positions, slots, ancestors, keys, sample_positions
    short_ptr,  # [3, >= B] int32: context_lens, num_drafted, num_valid
    long_stride,
    short_stride,
    dummy_slot,
    tokens_stride,
    block_tables_stride,
    draft_ids_stride,
    parents_stride,
    NUM_NODES: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    text = tl.load(text_ptr + row).to(tl.int64)
    active = tl.load(active_ptr + row) != 0
    length = tl.where(active, tl.load(lengths_ptr + text), 1)
    pending = tl.load(tokens_ptr + text * tokens_stride + length - 1)
    key = tl.load(keys_ptr + row)
    column = tl.arange(0, TOKENS)  # 0 is the pending token, 1 + j is node j
    token = tl.where(column == 0, pending, 0)
    ancestors = tl.where(column == 0, 0, tl.full([TOKENS], 1, tl.int64) << (tl.maximum(column - 1, 0)))
    depth = tl.where(column == 0, 0, 1)
    num_valid = 0
    if NUM_NODES > 0:
        room = tl.maximum(tl.load(max_lengths_ptr + row) - length, 0)
        num_valid = tl.where(active, tl.minimum(tl.load(num_nodes_ptr + row), room), 0)
        is_node = (column > 0) & (column <= num_valid)
        token += tl.load(draft_ids_ptr + row * draft_ids_stride + column - 1, mask=is_node, other=0)
        parent = tl.load(parents_ptr + row * parents_stride + column - 1, mask=is_node, other=-1) + 1
        # each round doubles the stretch of ancestors known; the pending token is its own parent and adds nothing
        for _ in tl.static_range(ROUNDS):
            ancestors |= tl.gather(ancestors, parent, 0)
            depth += tl.gather(depth, parent, 0)
            parent = tl.gather(parent, parent, 0)
    valid = active & (column <= num_valid)
    index = length - 1 + column
    block = tl.load(block_tables_ptr + row * block_tables_stride + index // BLOCK_SIZE, mask=valid, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + index % BLOCK_SIZE
    position = tl.where(valid, length - 1 + depth, 0)

    num_tokens = 1 + NUM_NODES
    stored = column < num_tokens
    out_ptr = long_ptr + row * num_tokens + column
    tl.store(out_ptr, tl.where(valid, token, 0).to(tl.int64), mask=stored)
    tl.store(out_ptr + long_stride, position.to(tl.int64), mask=stored)
    tl.store(out_ptr + 2 * long_stride, tl.where(valid, slot, dummy_slot), mask=stored)
    tl.store(out_ptr + 3 * long_stride, ancestors, mask=stored)
    tl.store(out_ptr + 4 * long_stride, tl.zeros([TOKENS], tl.int64) + key, mask=stored)
    tl.store(out_ptr + 5 * long_stride, (position + 1).to(tl.int64), mask=stored)
    tl.store(short_ptr + row, tl.where(active, length - 1, 0))
    tl.store(short_ptr + short_stride + row, NUM_NODES)
    tl.store(short_ptr + 2 * short_stride + row, num_valid)


@triton.jit
def _commit_kernel(
    tokens_ptr,
    lengths_ptr,
    text_ptr,
    max_lengths_ptr,
    active_ptr,
    block_tables_ptr,
    draft_ids_ptr,
    parents_ptr,
    positions_ptr,
    ancestors_ptr,
    num_valid_ptr,
    sampled_ptr,
    logprobs_ptr,
    stop_ids_ptr,
    host_ptr,  # [B, 3 + 3 Q] int32: CycleResult.host
    moves_ptr,  # [2, >= B * M] int64: sources, destinations
    path_ptr,  # [B, Q] int32
    moves_stride,
    tokens_stride,
    block_tables_stride,
    draft_ids_stride,
    parents_stride,
    NUM_NODES: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    text = tl.load(text_ptr + row).to(tl.int64)
    active = tl.load(active_ptr + row) != 0
    length = tl.load(lengths_ptr + text)
    max_length = tl.load(max_lengths_ptr + row)
    num_tokens = 1 + NUM_NODES
    column = tl.arange(0, TOKENS)
    stored = column < num_tokens
    sampled_ptr += row * num_tokens
    token = tl.load(sampled_ptr + column, mask=stored, other=0).to(tl.int32)
    logprob = tl.load(logprobs_ptr + row * num_tokens + column, mask=stored, other=0.0)

    # a node is kept when it and all its ancestors are what was sampled after their parents; its depth is its place
    kept = column == 0
    place = tl.zeros([TOKENS], tl.int32)
    is_node = column < 0
    if NUM_NODES > 0:
        is_node = (column > 0) & (column <= tl.load(num_valid_ptr + row))
        node = tl.maximum(column - 1, 0)
        ancestors = tl.load(ancestors_ptr + row * num_tokens + column, mask=is_node, other=0)
        place = tl.load(positions_ptr + row * num_tokens + column, mask=is_node, other=0).to(tl.int32) - (length - 1)
        place = tl.where(is_node, place, 0)
        parent = tl.load(parents_ptr + row * parents_stride + column - 1, mask=is_node, other=-1) + 1
        wanted = tl.load(sampled_ptr + parent, mask=is_node, other=-1).to(tl.int32)
        drafted = tl.load(draft_ids_ptr + row * draft_ids_stride + column - 1, mask=is_node, other=-2)
        agrees = tl.sum(tl.where(is_node & (drafted == wanted), tl.full([TOKENS], 1, tl.int64) << node, 0), 0)
        kept |= is_node & ((ancestors & ~agrees) == 0)
    num_kept = tl.max(tl.where(kept, place, 0), 0)  # nodes; the pending token's successor comes on top

    count = tl.where(active, tl.minimum(num_kept + 1, tl.maximum(max_length - length, 0)), 0)
    is_stop = column < 0
    for stop in range(NUM_STOPS):
        is_stop |= token == tl.load(stop_ids_ptr + stop)
    first_stop = tl.min(tl.where(kept & is_stop & (place < count), place, TOKENS), 0)
    count = tl.minimum(count, first_stop + 1)
    finish = tl.where(first_stop < TOKENS, 1, tl.where(active & (length + count == max_length), 2, 0))
    accepted = tl.minimum(num_kept, count)
    committed = kept & (place < count)

    # every warp reads lengths and active for itself: none may still be about to when the first one writes them
    tl.debug_barrier()
    tl.store(tokens_ptr + text * tokens_stride + length + place, token, mask=committed)
    # other inactive rows may share the text: they leave it alone
    tl.store(lengths_ptr + text, length + count, mask=active)
    tl.store(active_ptr + row, (active & (finish == 0)).to(tl.int32))

    host_ptr += row * (3 + 3 * num_tokens)
    tl.store(host_ptr, count)
    tl.store(host_ptr + 1, finish)
    tl.store(host_ptr + 2, accepted)
    past = stored & (column >= count)
    tl.store(host_ptr + 3 + place, token, mask=committed)
    tl.store(host_ptr + 3 + column, 0, mask=past)
    tl.store(host_ptr + 3 + num_tokens + place, logprob.to(tl.int32, bitcast=True), mask=committed)
    tl.store(host_ptr + 3 + num_tokens + column, 0, mask=past)
    path_ptr += row * num_tokens
    tl.store(path_ptr + place, column, mask=kept)
    tl.store(path_ptr + column, 0, mask=stored & (column > num_kept))
    if NUM_NODES == 0:
        tl.store(host_ptr + 5, 0)
    else:
        at_depth = (place[None, :] == column[:, None] + 1) & is_node[None, :]
        proposed = tl.sum(at_depth.to(tl.int32), 1)
        tl.store(host_ptr + 3 + 2 * num_tokens + column, proposed, mask=stored)

        # the node kept at a place moves to the index of the token it has become
        moved = is_node & kept & (place <= accepted) & (place != column)
        table_ptr = block_tables_ptr + row * block_tables_stride
        source, target = length + column - 1, length + place - 1
        source_block = tl.load(table_ptr + source // BLOCK_SIZE, mask=moved, other=0).to(tl.int64)
        target_block = tl.load(table_ptr + target // BLOCK_SIZE, mask=moved, other=0).to(tl.int64)
        source_slot = tl.where(moved, source_block * BLOCK_SIZE + source % BLOCK_SIZE, -1)
        target_slot = tl.where(moved, target_block * BLOCK_SIZE + target % BLOCK_SIZE, -1)
        moves_ptr += row * NUM_NODES
        targets_ptr = moves_ptr + moves_stride
        at = is_node & kept & (place <= accepted)
        tl.store(moves_ptr + place - 1, source_slot, mask=at)
        tl.store(targets_ptr + place - 1, target_slot, mask=at)
        rest = (column >= accepted) & (column < NUM_NODES)
        tl.store(moves_ptr + column, -1, mask=rest)
        tl.store(targets_ptr + column, -1, mask=rest)


def _num_nodes(drafts: Drafts | None) -> int:
    num_nodes = 0 if drafts is None else drafts.token_ids.shape[1]
    assert num_nodes <= MAX_NODES, f"{num_nodes} nodes exceed the {MAX_NODES} an ancestor mask has bits for"
    return num_nodes


def _aligned(num_elements: int) -> int:
    """Room for a field, so that the next begins where a kernel that is compiled for aligned pointers may read it."""
    return triton.cdiv(num_elements, 16) * 16

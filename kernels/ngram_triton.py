# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Entering n-grams and drafting from them, as one Triton kernel each; kernels/ngram.py defines what they compute.

Drafting is one program a row: a lane for each match, tiles of matches by matches for what they agree on, and a sort
instead of a queue for the nodes, since a node's probability needs nothing but its matches. Two kernels, because every
row looks up what all rows have entered.
"""

import torch
import triton
import triton.language as tl

from kernels.cycle import Drafts, Rows, Texts
from kernels.ngram import CATCH_UP, ESCAPE, MAX_MATCH, WAYS, NgramIndex

PLACES = 64  # a program enters
LOOK_UP_WARPS = 4


def insert_triton(index: NgramIndex, texts: Texts, text_ids: torch.Tensor, *, max_places: int) -> None:
    """insert, in one launch."""
    num_texts, num_sizes = text_ids.shape[0], len(index.sizes)
    if num_texts == 0 or max_places <= 0:
        return
    _insert_kernel[(num_texts, triton.cdiv(max_places, PLACES))](
        texts.tokens,
        texts.lengths,
        texts.groups,
        text_ids,
        index.indexed,
        index.clock,
        index.table,
        texts.tokens.shape[1],
        max_places,
        MIN_MATCH=index.sizes[0],
        LONGEST=index.sizes[-1],
        NUM_SIZES=num_sizes,
        SIZES=triton.next_power_of_2(num_sizes),
        BUCKETS=len(index.table) // WAYS,
        WAYS=WAYS,
        PLACES=PLACES,
        num_warps=2,
    )


def look_up_triton(index: NgramIndex, texts: Texts, rows: Rows, out: Drafts, *, depth: int, top_k: int) -> None:
    """look_up_reference, in one launch."""
    num_rows, num_nodes = out.token_ids.shape
    assert texts.tokens.is_contiguous() and out.token_ids.is_contiguous() and out.parents.is_contiguous()
    assert depth <= 64
    candidates = triton.next_power_of_2(len(index.sizes) * WAYS)
    keys = index.table.new_empty(num_rows, depth, candidates)
    scratch = texts.tokens.new_empty(num_rows, 3, depth, candidates)
    _look_up_kernel[(num_rows,)](
        texts.tokens,
        texts.lengths,
        texts.groups,
        rows.text,
        rows.max_lengths,
        rows.active,
        index.indexed,
        index.clock,
        index.table,
        out.token_ids,
        out.parents,
        out.num_nodes,
        keys,
        scratch,
        texts.tokens.shape[1],
        DEPTH=depth,
        LEVELS=triton.next_power_of_2(depth),
        TOP_K=top_k,
        NUM_NODES=num_nodes,
        MIN_MATCH=index.sizes[0],
        LONGEST=index.sizes[-1],
        NUM_MATCHES=len(index.sizes) * WAYS,
        MATCHES=candidates,
        BUCKETS=len(index.table) // WAYS,
        WAYS=WAYS,
        MAX_MATCH=MAX_MATCH,
        ESCAPE=ESCAPE,
        CATCH_UP=CATCH_UP,
        num_warps=LOOK_UP_WARPS,
    )


@triton.jit
def _bucket(end_ptr, group, sizes, known, BUCKETS: tl.constexpr, LONGEST: tl.constexpr):
    """Buckets of the n-grams of these sizes that end before end_ptr, where known."""
    state = group.to(tl.uint32) * 0x3C6EF373 + sizes.to(tl.uint32) * 0x61C88647
    for back in tl.static_range(1, 1 + LONGEST):
        token = tl.load(end_ptr - back, mask=known & (back <= sizes), other=0)
        state = tl.where(back <= sizes, (state ^ token.to(tl.uint32)) * 0x01000193, state)
    state = (state ^ (state >> 15)) * 0x2C1B3C6D
    state = (state ^ (state >> 12)) * 0x297A2D39
    return ((state ^ (state >> 15)) % BUCKETS).to(tl.int32)


# one compilation whatever slice of texts and however many places
@triton.jit(do_not_specialize=["max_places"], do_not_specialize_on_alignment=["text_ids_ptr"])
def _insert_kernel(
    tokens_ptr,
    lengths_ptr,
    groups_ptr,
    text_ids_ptr,
    indexed_ptr,
    clock_ptr,
    table_ptr,
    max_length,
    max_places,
    MIN_MATCH: tl.constexpr,
    LONGEST: tl.constexpr,
    NUM_SIZES: tl.constexpr,
    SIZES: tl.constexpr,
    BUCKETS: tl.constexpr,
    WAYS: tl.constexpr,
    PLACES: tl.constexpr,
):
    text = tl.load(text_ids_ptr + tl.program_id(0))
    group = tl.load(groups_ptr + text)
    length = tl.load(lengths_ptr + text)
    offset = tl.program_id(1) * PLACES + tl.arange(0, PLACES)[:, None]
    after = tl.load(indexed_ptr + text) + 1 + offset
    order = tl.arange(0, SIZES)[None, :]
    sizes = MIN_MATCH << order
    entered = (group >= 0) & (offset < max_places) & (after < length) & (after >= sizes) & (order < NUM_SIZES)
    place = text * max_length + after
    bucket = _bucket(tokens_ptr + place, group, sizes, entered, BUCKETS, LONGEST)
    entry = (tl.load(clock_ptr) << 32) + place.to(tl.int64) + tl.zeros([PLACES, SIZES], tl.int64)
    tl.atomic_max(table_ptr + bucket * WAYS + text % WAYS, entry, mask=entered)


@triton.jit
def _look_up_kernel(
    tokens_ptr,
    lengths_ptr,
    groups_ptr,
    text_ptr,
    max_lengths_ptr,
    active_ptr,
    indexed_ptr,
    clock_ptr,
    table_ptr,
    token_ids_ptr,
    parents_ptr,
    num_nodes_ptr,
    keys_ptr,  # [B, DEPTH, MATCHES] int64
    scratch_ptr,  # [B, 3, DEPTH, MATCHES] int32: first, tokens, numbers
    max_length,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_NODES: tl.constexpr,
    MIN_MATCH: tl.constexpr,
    LONGEST: tl.constexpr,
    NUM_MATCHES: tl.constexpr,
    MATCHES: tl.constexpr,
    BUCKETS: tl.constexpr,
    WAYS: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    ESCAPE: tl.constexpr,
    CATCH_UP: tl.constexpr,
):
    row = tl.program_id(0)
    text = tl.load(text_ptr + row)
    group = tl.load(groups_ptr + text)
    length = tl.load(lengths_ptr + text)
    drafting = (tl.load(active_ptr + row) != 0) & (group >= 0)
    indexed = tl.load(indexed_ptr + text)
    end_ptr = tokens_ptr + text * max_length + length

    # one match for each size and way
    match = tl.arange(0, MATCHES)
    sizes = MIN_MATCH << (match // WAYS)
    sought = drafting & (match < NUM_MATCHES) & (sizes <= length)
    bucket = _bucket(end_ptr + tl.zeros([MATCHES], tl.int32), group, sizes, sought, BUCKETS, LONGEST)
    entry = tl.load(table_ptr + bucket * WAYS + match % WAYS, mask=sought, other=0)
    place = entry.to(tl.int32)
    other, after = place // max_length, place % max_length
    valid = entry != 0
    end = tl.load(lengths_ptr + other, mask=valid, other=0)
    valid &= (tl.load(groups_ptr + other, mask=valid, other=-1) == group) & (after < end)
    back = tl.arange(0, MAX_MATCH)
    mine = tl.load(end_ptr - 1 - back, mask=back < length, other=-1)
    theirs_known = valid[:, None] & (back[None, :] < after[:, None])
    theirs = tl.load(tokens_ptr + place[:, None] - 1 - back[None, :], mask=theirs_known, other=-2)
    agreement = tl.min(tl.where(mine[None, :] == theirs, MAX_MATCH, back[None, :]), 1)
    valid &= agreement >= MIN_MATCH
    repeats = (place[None, :] == place[:, None]) & valid[None, :] & (match[None, :] < match[:, None])
    valid &= tl.sum(repeats.to(tl.int32), 1) == 0
    newer = valid[None, :] & (entry[None, :] > entry[:, None])
    rank = tl.sum(newer.to(tl.int32), 1)

    # what follows them, level by level
    first_ptr = scratch_ptr + row * (3 * DEPTH * MATCHES)
    drafted_ptr = first_ptr + DEPTH * MATCHES
    numbers_ptr = drafted_ptr + DEPTH * MATCHES
    keys_ptr += row * (DEPTH * MATCHES)
    max_depth = tl.load(max_lengths_ptr + row) - length - 1
    period = tl.where(other == text, tl.maximum(length - after, 1), max_length)
    pairs = valid[:, None] & valid[None, :]
    probability = tl.full([MATCHES], 1.0, tl.float32)
    kept = valid
    for level in range(DEPTH):
        offset = level % period
        exists = valid & (level < max_depth) & (after + offset < end)
        token = tl.load(tokens_ptr + place + offset, mask=exists, other=-1)
        weight = tl.where(exists, agreement + level, 0)
        total = tl.sum(tl.where(pairs, weight[None, :], 0), 1)
        rivals = pairs
        pairs = pairs & exists[:, None] & (token[:, None] == token[None, :])
        votes = tl.sum(tl.where(pairs, weight[None, :], 0), 1)
        first = tl.min(tl.where(pairs, rank[None, :], MATCHES), 1)
        is_first = exists & (first == rank)
        more = votes[None, :] > votes[:, None]
        as_many = votes[None, :] == votes[:, None]
        ahead = rivals & is_first[None, :] & (more | (as_many & (rank[None, :] < first[:, None])))
        kept = kept & exists & (tl.sum(ahead.to(tl.int32), 1) < TOP_K)
        # rounded as the reference rounds it: the order of nodes hangs on it
        probability = probability * tl.div_rn(votes.to(tl.float32), ESCAPE + total.to(tl.float32))
        order = ((DEPTH - 1 - level) << 10) + ((MATCHES - 1 - rank) << 5) + match
        key = (probability.to(tl.int32, bitcast=True).to(tl.int64) << 32) + order
        at = level * MATCHES + match
        tl.store(keys_ptr + at, tl.where(kept & is_first, key, 0))
        tl.store(first_ptr + at, first)
        tl.store(drafted_ptr + at, token)

    # the most probable of all levels: a node stands before its less probable children
    tl.debug_barrier()
    node = tl.arange(0, LEVELS * MATCHES)
    keys = tl.sort(tl.load(keys_ptr + node, mask=node < DEPTH * MATCHES, other=0), descending=True)
    is_node = (keys > 0) & (node < NUM_NODES)
    order = keys.to(tl.int32)
    level = DEPTH - 1 - (order >> 10)
    chosen = order & 31
    tl.store(numbers_ptr + level * MATCHES + MATCHES - 1 - ((order >> 5) & 31), node, mask=is_node)
    tl.debug_barrier()
    above = (level - 1) * MATCHES
    first_above = tl.load(first_ptr + above + chosen, mask=is_node & (level > 0), other=0)
    parent = tl.load(numbers_ptr + above + first_above, mask=is_node & (level > 0), other=-1)
    token = tl.load(drafted_ptr + level * MATCHES + chosen, mask=is_node, other=0)
    tl.store(token_ids_ptr + row * NUM_NODES + node, token, mask=is_node)
    tl.store(parents_ptr + row * NUM_NODES + node, parent, mask=is_node)
    tl.store(num_nodes_ptr + row, tl.sum(is_node.to(tl.int32), 0))

    tl.store(indexed_ptr + text, tl.minimum(indexed + CATCH_UP, length - 1), mask=group >= 0)
    if row == 0:
        tl.store(clock_ptr, tl.load(clock_ptr) + 1)

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Growing a draft tree level by level and ranking it, as Triton kernels; kernels/eagle.py defines what they compute.

A candidate is an int64: its score's bits in the order of floats, and below them its number, so that one maximum tells
both and no two are equal.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cycle import Drafts
from kernels.eagle import Beams, Candidates, num_candidates
from kernels.linear_triton import overlaps
from kernels.sample_triton import log2_exponential, row_words, uniforms

TILE = 1024  # columns of a program; more where a row would take more than MAX_TILES
MAX_TILES = 32
NEVER = tl.constexpr(-(1 << 63))  # below every candidate


def grow_triton(
    logits: torch.Tensor,
    keys: torch.Tensor,
    sample_positions: torch.Tensor,
    vocabulary: torch.Tensor,
    transform: torch.Tensor,
    beams: Beams | None,
    out: Candidates,
    *,
    level: int,
    top_k: int,
) -> Beams:
    """grow, in two launches."""
    num_rows, (num_logits, vocab_size) = len(sample_positions), logits.shape
    num_beams = num_logits // num_rows
    assert num_beams * num_rows == num_logits and num_beams == (1 if beams is None else top_k)
    assert logits.stride(1) == 1 and top_k <= min(vocab_size, TILE)
    tile = max(TILE, triton.next_power_of_2(triton.cdiv(vocab_size, MAX_TILES)))
    num_tiles = triton.cdiv(vocab_size, tile)
    best = out.keys.new_empty(num_logits, num_tiles, top_k)
    totals = torch.empty(2, num_logits, num_tiles, dtype=torch.float32, device=logits.device)
    overlap = overlaps(logits.device)
    _tile_kernel[(num_logits, num_tiles)](
        logits,
        keys,
        sample_positions,
        vocabulary,
        transform,
        best,
        totals,
        logits.stride(0),
        vocab_size,
        num_tiles,
        totals.stride(0),
        BEAMS=num_beams,
        TOP_K=top_k,
        TILE=tile,
        OVERLAP=overlap,
        num_warps=4 if tile == TILE else 8,
        launch_pdl=overlap,
    )
    token_ids, rows, ancestors = (out.keys.new_empty(num_rows * top_k) for _ in range(3))
    scores = torch.empty(num_rows * top_k, dtype=torch.float32, device=logits.device)
    numbers = out.token_ids.new_empty(num_rows * top_k)
    grown = Beams(token_ids=token_ids, rows=rows, scores=scores, numbers=numbers, ancestors=ancestors)
    above = beams or grown  # not read at level 0
    _join_tiles_kernel[(num_rows,)](
        best,
        totals,
        vocabulary,
        above.scores,
        above.numbers,
        above.ancestors,
        out.keys,
        out.token_ids,
        out.parents,
        token_ids,
        rows,
        scores,
        numbers,
        ancestors,
        num_tiles,
        totals.stride(0),
        out.keys.stride(0),
        0 if level == 0 else num_candidates(level, top_k),
        level * top_k,
        FIRST=level == 0,
        BEAMS=num_beams,
        BEAM_LANES=triton.next_power_of_2(num_beams),
        TOP_K=top_k,
        LANES=triton.next_power_of_2(top_k),
        TILES=triton.next_power_of_2(num_tiles),
        OVERLAP=overlap,
        num_warps=4 if num_beams > 1 else 1,
        launch_pdl=overlap,
    )
    return grown


def rank_triton(candidates: Candidates, drafting: torch.Tensor, out: Drafts) -> None:
    """rank, in one launch."""
    num_rows, num_nodes = out.token_ids.shape
    total = candidates.keys.shape[1]
    places = torch.empty_like(candidates.token_ids)
    overlap = overlaps(drafting.device)
    _rank_kernel[(num_rows,)](
        candidates.keys,
        candidates.token_ids,
        candidates.parents,
        drafting,
        places,
        out.token_ids,
        out.parents,
        out.num_nodes,
        out.token_ids.stride(0),
        out.parents.stride(0),
        TOTAL=total,
        NUM_NODES=min(num_nodes, total),
        LANES=triton.next_power_of_2(total),
        OVERLAP=overlap,
        num_warps=1 if total <= 64 else 4,
        launch_pdl=overlap,
    )


@triton.jit
def _key(score, number):
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0xFFFFFFFF - number.to(tl.int64))


@triton.jit
def _number_of(key):
    return (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _score_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_tiles", "totals_stride"])
def _tile_kernel(
    logits_ptr,
    keys_ptr,
    positions_ptr,
    vocabulary_ptr,
    transform_ptr,
    best_ptr,  # [rows of logits, tiles, TOP_K] int64
    totals_ptr,  # [2, rows of logits, tiles] float32: largest score, sum of powers of 2 below it
    stride,
    vocab_size,
    num_tiles,
    totals_stride,
    BEAMS: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The TOP_K best tokens of a tile of a row."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    low, high = row_words(tl.load(keys_ptr + row // BEAMS), tl.load(positions_ptr + row // BEAMS))
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < vocab_size
    token = tl.load(vocabulary_ptr + column, mask=inside, other=0)
    x = tl.load(logits_ptr + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    noise = log2_exponential(uniforms(token, low, high))
    score = x * tl.load(transform_ptr) - tl.load(transform_ptr + 1) * noise
    largest = tl.max(score)
    at = row * num_tiles + tile
    tl.store(totals_ptr + at, largest)
    tl.store(totals_ptr + totals_stride + at, tl.sum(tl.exp2(score - largest)))
    keys = _key(score, column)
    for place in tl.static_range(TOP_K):
        key = tl.max(keys)
        keys = tl.where(keys == key, NEVER, keys)
        tl.store(best_ptr + at * TOP_K + place, key)


@triton.jit(do_not_specialize=["num_tiles", "totals_stride", "first", "first_node"])
def _join_tiles_kernel(
    best_ptr,
    totals_ptr,
    vocabulary_ptr,
    above_scores_ptr,
    above_numbers_ptr,
    above_ancestors_ptr,
    keys_ptr,
    token_ids_ptr,
    parents_ptr,
    beam_tokens_ptr,
    beam_rows_ptr,
    beam_scores_ptr,
    beam_numbers_ptr,
    beam_ancestors_ptr,
    num_tiles,
    totals_stride,
    candidates_stride,
    first,  # number of the level's first candidate
    first_node,  # and of the first node it steps
    FIRST: tl.constexpr,
    BEAMS: tl.constexpr,
    BEAM_LANES: tl.constexpr,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The TOP_K best children of each beam of a row, then the TOP_K best of these."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, BEAM_LANES)
    is_beam = beam < BEAMS
    line = row * BEAMS + beam

    tile = tl.arange(0, TILES)
    here = is_beam[:, None] & (tile < num_tiles)[None, :]
    at = line[:, None] * num_tiles + tile[None, :]
    peaks = tl.load(totals_ptr + at, mask=here, other=float("-inf"))
    sums = tl.load(totals_ptr + totals_stride + at, mask=here, other=0.0)
    largest = tl.max(peaks, 1)
    origin = tl.where(is_beam, largest, 0.0)
    total = tl.sum(sums * tl.exp2(peaks - origin[:, None]), 1)
    total = tl.log2(tl.where(is_beam, total, 1.0))
    above = tl.zeros([BEAM_LANES], tl.float32)
    parent = tl.full([BEAM_LANES], -1, tl.int32)
    if not FIRST:
        above = tl.load(above_scores_ptr + line, mask=is_beam, other=0.0)
        parent = tl.load(above_numbers_ptr + line, mask=is_beam, other=-1)

    choice = tl.arange(0, TILES * LANES)
    child = choice % LANES
    offered = is_beam[:, None] & ((choice // LANES < num_tiles) & (child < TOP_K))[None, :]
    offer = line[:, None] * (num_tiles * TOP_K) + (choice // LANES * TOP_K + child)[None, :]
    offers = tl.load(best_ptr + offer, mask=offered, other=NEVER)
    lane = tl.arange(0, LANES)
    entered = tl.full([BEAM_LANES, LANES], NEVER, tl.int64)
    tokens = tl.zeros([BEAM_LANES, LANES], tl.int32)
    candidates = row * candidates_stride
    for place in tl.static_range(TOP_K):
        best = tl.max(offers, 1)
        offers = tl.where(offers == best[:, None], NEVER, offers)
        token = tl.load(vocabulary_ptr + _number_of(best), mask=is_beam, other=0)
        joint = above + tl.minimum(_score_of(best) - origin - total, 0.0)
        number = first + beam * TOP_K + place
        key = tl.where(is_beam, _key(joint, number), NEVER)
        tl.store(keys_ptr + candidates + number, key, mask=is_beam)
        tl.store(token_ids_ptr + candidates + number, token, mask=is_beam)
        tl.store(parents_ptr + candidates + number, parent, mask=is_beam)
        entered = tl.where(lane[None, :] == place, key[:, None], entered)
        tokens = tl.where(lane[None, :] == place, token[:, None], tokens)

    chosen = tl.full([LANES], NEVER, tl.int64)
    chosen_tokens = tl.zeros([LANES], tl.int32)
    for place in tl.static_range(TOP_K):
        best = tl.max(tl.max(entered, 1), 0)
        token = tl.sum(tl.sum(tl.where(entered == best, tokens, 0), 1), 0)
        entered = tl.where(entered == best, NEVER, entered)
        chosen = tl.where(lane == place, best, chosen)
        chosen_tokens = tl.where(lane == place, token, chosen_tokens)
    is_chosen = lane < TOP_K
    number = _number_of(chosen)
    source = row * BEAMS + (number - first) // TOP_K
    ancestors = tl.full([LANES], 1, tl.int64) << ((first_node + lane) % 64).to(tl.int64)
    if not FIRST:
        ancestors |= tl.load(above_ancestors_ptr + source, mask=is_chosen, other=0)
    out = row * TOP_K + lane
    tl.store(beam_tokens_ptr + out, chosen_tokens.to(tl.int64), mask=is_chosen)
    tl.store(beam_rows_ptr + out, source, mask=is_chosen)
    tl.store(beam_scores_ptr + out, _score_of(chosen), mask=is_chosen)
    tl.store(beam_numbers_ptr + out, number, mask=is_chosen)
    tl.store(beam_ancestors_ptr + out, ancestors, mask=is_chosen)


@triton.jit
def _rank_kernel(
    keys_ptr,
    token_ids_ptr,
    parents_ptr,
    drafting_ptr,
    places_ptr,  # [B, N] int32
    out_tokens_ptr,
    out_parents_ptr,
    num_nodes_ptr,
    tokens_stride,
    parents_stride,
    TOTAL: tl.constexpr,
    NUM_NODES: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    keys = tl.load(keys_ptr + row * TOTAL + lane, mask=lane < TOTAL, other=NEVER)
    if LANES > 1:
        keys = tl.sort(keys, descending=True)
    is_node = lane < NUM_NODES
    number = tl.where(is_node, _number_of(keys), 0)
    places_ptr += row * TOTAL
    tl.store(places_ptr + number, lane, mask=is_node)
    token = tl.load(token_ids_ptr + row * TOTAL + number, mask=is_node, other=0)
    parent = tl.load(parents_ptr + row * TOTAL + number, mask=is_node, other=-1)
    tl.debug_barrier()
    place = tl.load(places_ptr + tl.maximum(parent, 0), mask=is_node & (parent >= 0), other=-1)
    tl.store(out_tokens_ptr + row * tokens_stride + lane, token, mask=is_node)
    tl.store(out_parents_ptr + row * parents_stride + lane, place, mask=is_node)
    tl.store(num_nodes_ptr + row, tl.where(tl.load(drafting_ptr + row) != 0, NUM_NODES, 0))

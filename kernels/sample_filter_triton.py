# mypy: allow-untyped-defs
# ruff: noqa: N803
"""The smallest logit of a row that top_k, top_p and min_p keep, found by Triton kernels without a sort.

A float's bits, reordered, are an integer key in the order of the floats. Each pass over the logits narrows the range
of keys that holds the threshold by a factor of PIVOTS: programs total, over their tiles, how many logits (top_k) or how
much mass (top_p) lie at or above evenly spaced pivots; the next pass replays those totals and goes on between the
last pivot that reached the target and the one after. Tiles whose largest logit lies below the range are not read.

Tiles are added up as integers, so neither the order of additions nor the batch shows in a threshold.
"""

import math

import torch
import triton
import triton.language as tl

PIVOTS = tl.constexpr(16)  # a power of 2
MASS_UNIT = tl.constexpr(2.0**40)  # masses as integers: the largest probability counts 2^40, a row at most 2^58
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # low bits that are 0 once such logits are float32

# as arguments change from call to call, no kernel is compiled for a value of theirs
_RUNTIME = ["tiles_per_program", "num_rows", "done", "count_passes", "top_k"]


def tile_maxima(logits: torch.Tensor, *, grid: tuple[int, int], tile: int, tiles_per_program: int) -> torch.Tensor:
    """The largest logit of every tile, NaN counting as +inf. logits [N, V]. Returns [N, ceil(V / tile)] float32."""
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, tile)
    maxima = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    _maxima_kernel[grid](
        logits, maxima, logits.stride(0), vocab_size, num_tiles, tiles_per_program, TILE=tile, num_warps=1
    )
    return maxima


def thresholds(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    grid: tuple[int, int],
    tile: int,
    tiles_per_program: int,
) -> torch.Tensor:
    """The logit at and above which a row's tokens are kept. logits [N, V], maxima of its tiles. Returns [N] float32."""
    num_rows, vocab_size = logits.shape
    unused_bits = UNUSED_BITS.get(logits.dtype, 0)
    digits = -(-(32 - unused_bits) // int(math.log2(PIVOTS.value)))
    count_passes = digits if 0 < top_k < vocab_size else 0
    passes = count_passes + (digits if top_p < 1 else 0)
    totals = torch.zeros(passes, num_rows, PIVOTS.value, dtype=torch.int64, device=logits.device)
    num_tiles = maxima.shape[1]
    found = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    search = {"UNUSED_BITS": unused_bits, "TILES": triton.next_power_of_2(num_tiles), "num_warps": 1}
    for done in range(passes):
        _search_kernel[grid](
            logits,
            maxima,
            totals,
            logits.stride(0),
            num_rows,
            vocab_size,
            num_tiles,
            tiles_per_program,
            done,
            count_passes,
            top_k,
            top_p,
            math.log2(math.e) / temperature,
            BY_MASS=done >= count_passes,
            TILE=tile,
            **search,
        )
    _threshold_kernel[(num_rows,)](
        maxima,
        totals,
        found,
        num_rows,
        num_tiles,
        passes,
        count_passes,
        top_k,
        top_p,
        temperature * math.log(min_p) if min_p > 0 else -math.inf,
        **search,
    )
    return found


@triton.jit(do_not_specialize=_RUNTIME)
def _maxima_kernel(logits, maxima, stride, vocab_size, num_tiles, tiles_per_program, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * tiles_per_program
    for index in range(first, tl.minimum(first + tiles_per_program, num_tiles)):
        token = index * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        tl.store(maxima + row * num_tiles + index, tl.max(tl.where(x != x, float("inf"), x)))


@triton.jit(do_not_specialize=_RUNTIME)
def _search_kernel(
    logits,
    maxima,
    totals,
    stride,
    num_rows,
    vocab_size,
    num_tiles,
    tiles_per_program,
    done,
    count_passes,
    top_k,
    top_p,
    scale,
    BY_MASS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Pass `done` of the search: add the program's tiles to the totals [passes, N, PIVOTS] of its row."""
    row = tl.program_id(0).to(tl.int64)
    largest = _row_maximum(maxima, row, num_tiles, TILES)
    low, high = _replay(totals, row, num_rows, done, count_passes, top_k, top_p, largest, UNUSED_BITS)
    if low < high:
        step = (high - low) // PIVOTS + 1
        lowest = _value_of(low.to(tl.int32), UNUSED_BITS)
        slot = tl.arange(0, PIVOTS)
        # past the range there is nothing to count, and a key might not fit 32 bits
        pivot = tl.minimum(low + slot * step, high + 1).to(tl.int32)
        found = tl.zeros([PIVOTS], tl.int64)
        first = tl.program_id(1) * tiles_per_program
        for index in range(first, tl.minimum(first + tiles_per_program, num_tiles)):
            if tl.load(maxima + row * num_tiles + index) >= lowest:
                token = index * TILE + tl.arange(0, TILE)
                x = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
                key = _key_of(x, UNUSED_BITS)
                weight = tl.exp2((x - largest) * scale) if BY_MASS else tl.full([TILE], 1.0, tl.float32)
                total = tl.sum(tl.where(key[None, :] >= pivot[:, None], weight[None, :], 0.0), axis=1)
                if BY_MASS:
                    total *= MASS_UNIT
                found += total.to(tl.int64)
        tl.atomic_add(totals + (done * num_rows + row) * PIVOTS + slot, found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=_RUNTIME)
def _threshold_kernel(
    maxima,
    totals,
    found,
    num_rows,
    num_tiles,
    done,
    count_passes,
    top_k,
    top_p,
    log_min_p,
    UNUSED_BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = _row_maximum(maxima, row, num_tiles, TILES)
    low, _ = _replay(totals, row, num_rows, done, count_passes, top_k, top_p, largest, UNUSED_BITS)
    tl.store(found + row, tl.maximum(_value_of(low.to(tl.int32), UNUSED_BITS), largest + log_min_p))


@triton.jit
def _row_maximum(maxima, row, num_tiles, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    return tl.max(tl.load(maxima + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf")))


@triton.jit
def _replay(totals, row, num_rows, done, count_passes, top_k, top_p, largest, UNUSED_BITS: tl.constexpr):
    """The lowest and highest key, int64, that the threshold may have after `done` passes.

    top_k takes the first count_passes: the largest key that top_k logits reach. What it drops has no part in the mass
    that top_p then shares out: the largest key at or above which lies top_p of what the first pivot, the lowest key,
    saw.
    """
    highest = _key_of(largest, UNUSED_BITS).to(tl.int64)
    low = _key_of(tl.full([], float("-inf"), tl.float32), UNUSED_BITS).to(tl.int64)
    high = highest
    target = top_k.to(tl.int64)
    slot = tl.arange(0, PIVOTS)
    for index in range(done):
        total = tl.load(totals + (index * num_rows + row) * PIVOTS + slot)
        if index == count_passes:
            high = highest
            target = tl.maximum(tl.ceil(tl.max(total).to(tl.float64) * top_p).to(tl.int64), 1)
        step = (high - low) // PIVOTS + 1
        # a range of one key is not totalled any more
        reached = tl.maximum(tl.sum((total >= target).to(tl.int64)) - 1, 0)
        low += reached * step
        high = tl.minimum(high, low + step - 1)
    if done == count_passes:
        high = highest
    return low, high


@triton.jit
def _key_of(x, UNUSED_BITS: tl.constexpr):
    """int32 in the order of the float32 x, less the bits that are always 0. Both zeros have key 0."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == 0, 0, ordered >> UNUSED_BITS)


@triton.jit
def _value_of(key, UNUSED_BITS: tl.constexpr):
    """The float32 whose key this is."""
    # a negative float's unused zeros are ones in its key's order
    ordered = (key << UNUSED_BITS) | ((key >> 31) & ((1 << UNUSED_BITS) - 1))
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

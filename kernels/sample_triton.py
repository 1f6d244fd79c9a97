# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Sampling as Triton kernels; kernels/sample.py defines what they compute.

A row is cut into tiles. What a tile yields (its largest logit, its sum of exponentials, the scores of its tokens)
depends on nothing outside it, and a second kernel joins the tiles in a fixed order: a row's token and log-prob are the
same to the bit in any batch, and yet a single row can keep the whole machine busy.

Few tokens can win, and that is cheap to see: E >= u for E = -log(1 - u), so p / E > b needs p > b u. Only a tile with
a token that passes pays for logarithms; of t tiles in a row about log t do.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear_triton import overlaps
from kernels.sample_filter_triton import thresholds, tile_maxima

TILE = 1024
RACE_WARPS = 2
PROGRAMS = 4096  # of one launch, about, or one a row: they fill the largest GPUs twice


def sample_triton(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sample, in two launches; filters add two, and top_k and top_p 4 to 8 each."""
    num_rows, vocab_size = logits.shape
    drawn = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return drawn, logprobs
    mapped = token_ids is not None
    vocabulary = token_ids if token_ids is not None else drawn  # not read unless mapped
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_tiles = triton.cdiv(vocab_size, TILE)
    tiles_per_program = min(num_tiles, triton.cdiv(num_rows * num_tiles, PROGRAMS))
    num_groups = triton.cdiv(num_tiles, tiles_per_program)
    grid = (num_rows, num_groups)
    tiles = triton.next_power_of_2(num_tiles)
    if temperature == 0:
        maxima = tile_maxima(logits, grid=grid, tile=TILE, tiles_per_program=tiles_per_program)
        _greedy_kernel[(num_rows,)](
            logits,
            maxima,
            vocabulary,
            drawn,
            logprobs,
            logits.stride(0),
            vocab_size,
            num_tiles,
            MAPPED=mapped,
            TILE=TILE,
            TILES=tiles,
        )
        return drawn, logprobs
    filtered = 0 < top_k < vocab_size or top_p < 1 or min_p > 0
    if filtered:
        tiling = {"grid": grid, "tile": TILE, "tiles_per_program": tiles_per_program}
        maxima = tile_maxima(logits, **tiling)
        least = thresholds(logits, maxima, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **tiling)
    else:
        maxima = logprobs.new_empty(num_rows, num_tiles)
        least = maxima  # not read
    sums = logprobs.new_empty(num_rows, num_tiles)
    scores = logprobs.new_empty(num_rows, num_groups)
    winners = logprobs.new_empty(num_rows, num_groups, dtype=torch.int32)
    # exponentials are powers of 2 on the device
    scale = math.log2(math.e) / temperature
    overlap = overlaps(logits.device)
    _race_kernel[grid](
        logits,
        keys,
        positions,
        vocabulary,
        least,
        maxima,
        sums,
        scores,
        winners,
        logits.stride(0),
        vocab_size,
        num_tiles,
        num_groups,
        tiles_per_program,
        scale,
        FILTERED=filtered,
        MAPPED=mapped,
        TILE=TILE,
        OVERLAP=overlap,
        num_warps=RACE_WARPS,
        launch_pdl=overlap,
    )
    _finish_kernel[(num_rows,)](
        logits,
        maxima,
        sums,
        scores,
        winners,
        vocabulary,
        drawn,
        logprobs,
        logits.stride(0),
        num_tiles,
        num_groups,
        scale,
        MAPPED=mapped,
        TILES=tiles,
        OVERLAP=overlap,
        num_warps=1,
        launch_pdl=overlap,
    )
    return drawn, logprobs


@triton.jit(do_not_specialize=["num_groups", "tiles_per_program"])
def _race_kernel(
    logits,
    keys,
    positions,
    vocabulary,
    least,
    maxima,
    sums,
    scores,
    winners,
    stride,
    vocab_size,
    num_tiles,
    num_groups,
    tiles_per_program,
    scale,
    FILTERED: tl.constexpr,
    MAPPED: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Largest logit and sum of exponentials of each tile, and the best score of the program's tiles.

    A token's score is log2 p - log2 E up to a constant of the row. Filtered tiles' maxima are given and kept: what is
    dropped lies below them. maxima, sums [N, tiles]; scores, winners [N, groups of tiles].
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    low, high = row_words(tl.load(keys + row), tl.load(positions + row))
    threshold = float("-inf")
    if FILTERED:
        threshold = tl.load(least + row)
    first = group * tiles_per_program
    best = float("-inf")
    winner = first * TILE
    for index in range(first, tl.minimum(first + tiles_per_program, num_tiles)):
        if FILTERED:
            alive = tl.load(maxima + row * num_tiles + index) >= threshold
            tl.store(sums + row * num_tiles + index, 0.0)
        else:
            alive = True
        if alive:
            token = index * TILE + tl.arange(0, TILE)
            x = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            if FILTERED:
                x = tl.where(x < threshold, float("-inf"), x)  # keeps NaN, which must show in the sum
            largest = tl.max(x)
            # a tile without a finite logit must add 0, not NaN
            origin = tl.where(largest == float("-inf"), 0.0, largest)
            weight = tl.exp2((x - origin) * scale)
            tl.store(maxima + row * num_tiles + index, largest)
            tl.store(sums + row * num_tiles + index, tl.sum(weight))
            identity = token
            if MAPPED:
                identity = tl.load(vocabulary + token, mask=token < vocab_size, other=0)
            uniform = uniforms(identity, low, high)
            # scores are rounded, so a token may be ahead by as much and still lose; never the reverse
            bar = tl.exp2(best - origin * scale - 0.01 - 1e-6 * tl.abs(best))
            if tl.max((weight > bar * uniform).to(tl.int32)) > 0:
                score = x * scale - log2_exponential(uniform)
                score, place = tl.max(score, axis=0, return_indices=True)
                if score > best:
                    best = score
                    winner = index * TILE + place
    tl.store(scores + row * num_groups + group, best)
    tl.store(winners + row * num_groups + group, winner)


@triton.jit(do_not_specialize=["num_groups"])
def _finish_kernel(
    logits,
    maxima,
    sums,
    scores,
    winners,
    vocabulary,
    drawn,
    logprobs,
    stride,
    num_tiles,
    num_groups,
    scale,
    MAPPED: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    peaks = tl.load(maxima + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    weights = tl.load(sums + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    largest = tl.max(peaks)
    # NaN where there is a NaN, a +inf or nothing but -inf: the engine raises on such a log-prob
    total = tl.sum(weights * tl.exp2((peaks - largest) * scale))
    score = tl.load(scores + row * num_groups + tile, mask=tile < num_groups, other=float("-inf"))
    _, group = tl.max(score, axis=0, return_indices=True)
    token = tl.load(winners + row * num_groups + group)
    x = tl.load(logits + row * stride + token).to(tl.float32)
    if MAPPED:
        token = tl.load(vocabulary + token)
    tl.store(drawn + row, token.to(tl.int64))
    tl.store(logprobs + row, ((x - largest) * scale - tl.log2(total)) * 0.6931471805599453)


@triton.jit
def _greedy_kernel(
    logits,
    maxima,
    vocabulary,
    drawn,
    logprobs,
    stride,
    vocab_size,
    num_tiles,
    MAPPED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The first token with the row's largest logit: in the first tile with that maximum. maxima [N, tiles]."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    peaks = tl.load(maxima + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    largest, index = tl.max(peaks, axis=0, return_indices=True)
    token = index * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    _, place = tl.max(tl.where(x != x, float("inf"), x), axis=0, return_indices=True)
    winner = index * TILE + place
    if MAPPED:
        winner = tl.load(vocabulary + winner)
    tl.store(drawn + row, winner.to(tl.int64))
    tl.store(logprobs + row, largest * 0)  # NaN where the largest is not a number


@triton.jit
def row_words(key, position):
    """The two uint32 words that tell the noise of this key and position from any other's."""
    mixed = _mix64(_mix64(key.to(tl.uint64)) + position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def noise_words(token, low, high):
    """31 uniform bits of each token, int32: bit for bit those of kernels/sample.py."""
    bits = token.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = (bits ^ (bits >> 16) ^ low) * 0xED5AD4BB
    bits = (bits ^ (bits >> 17) ^ high) * 0xAC4C1B51
    bits = (bits ^ (bits >> 11)) * 0x31848BAB
    signed = bits.to(tl.int32, bitcast=True)
    return signed ^ (signed >> 14)


@triton.jit
def uniforms(token, low, high):
    """The uniform in (0, 1) that each token's noise is made from."""
    return noise_words(token, low, high).to(tl.float32) * ((1 - 2.0**-24) * 2.0**-31) + 2.0**-32


@triton.jit
def log2_exponential(uniform):
    """log2 E of the exponential noise E = -log(1 - uniform)."""
    noise = -_log(1 - uniform, -uniform)
    return _log(noise, noise - 1) * 1.4426950408889634


@triton.jit
def _log(y, less_one):
    """log y of normal float32 y > 0; less_one is y - 1, whose last digits y may have lost.

    With y = 2^e m and m within a factor of sqrt 2 from 1: e log 2 + 2 atanh((m - 1) / (m + 1)), as a series.
    """
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    ratio = tl.where(exponent == 0, less_one, mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
    return exponent.to(tl.float32) * 0.6931471805599453 + 2 * ratio * series


@triton.jit
def _mix64(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)

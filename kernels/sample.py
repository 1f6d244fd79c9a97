"""Sampling as a pure function: noise from a counter, not from a generator with a state.

The token at a position is argmax(log p + G) with G = -log E Gumbel noise and E exponential (DESIGN.md, idea 2). E is
a hash of (key, position, token), so no batch, device, draft or restart can change what is sampled.
"""

import hashlib
import math
from functools import lru_cache

import torch

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}  # of each float32 temporary: what caches hold, and 256 MB


def noise_key(*, seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key, as a signed integer, of all noise of one rollout."""
    identity = f"{seed}:{step}:{sample}:{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little", signed=True)


def gumbel_noise(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of (key, position, token).

    Shapes: keys, positions [N] int64. Returns [N, vocab_size] float32.
    """
    return _exponential_noise(keys, positions, vocab_size).log_().neg_()


def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row, by the noise of its key and position.

    A filter keeps what lies at or above a threshold, so equal logits stay or go together and nothing depends on the
    order of a sort. top_k keeps the k largest; top_p, of what is left, the largest tokens whose predecessors hold less
    than top_p of the mass; min_p those of at least min_p times the largest probability.
    Shapes: logits [N, V] of any float dtype; keys, positions [N] int64.
    Returns: token_ids [N] int64; logprobs [N] float32 under temperature and filters, renormalised. Temperature 0 takes
    the largest logit, with log-prob 0.
    """
    if temperature == 0:
        token_ids = logits.argmax(dim=1)
        return token_ids, torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    chunk = max(1, CHUNK_ELEMENTS[logits.device.type] // vocab_size)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        scaled = logits[rows].to(torch.float32, copy=True)
        scaled.div_(temperature).sub_(scaled.amax(dim=1, keepdim=True))
        if top_k > 0 or top_p < 1 or min_p > 0:
            _filter(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
        weights = scaled.exp()
        total = weights.sum(dim=1)
        # p / E and log p + G have the same argmax; the quotient spares two logarithms an element
        chosen = weights.div_(_exponential_noise(keys[rows], positions[rows], vocab_size)).argmax(dim=1)
        token_ids[rows] = chosen
        logprobs[rows] = scaled.gather(1, chosen[:, None]).squeeze(1) - total.log()
    return token_ids, logprobs


def _filter(scaled: torch.Tensor, *, top_k: int, top_p: float, min_p: float) -> None:
    """Set what the filters drop to -inf, in place. scaled [N, V]: logits over temperature, their maximum 0."""
    vocab_size = scaled.shape[1]
    largest = None
    if 0 < top_k < vocab_size:
        largest = scaled.topk(top_k, dim=1).values
        scaled.masked_fill_(scaled < largest[:, -1:], -torch.inf)
    if top_p < 1:
        if largest is None:
            largest = scaled.sort(dim=1, descending=True).values
        # tokens tied with the k-th are in the total, though not among the k values
        mass = scaled.exp().sum(dim=1, keepdim=True)
        before = largest.exp().cumsum(dim=1).roll(1, dims=1)
        before[:, 0] = 0
        threshold = largest.masked_fill(before >= top_p * mass, torch.inf).amin(dim=1, keepdim=True)
        scaled.masked_fill_(scaled < threshold, -torch.inf)
    if min_p > 0:
        scaled.masked_fill_(scaled < math.log(min_p), -torch.inf)


def _exponential_noise(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exponential noise of rate 1. keys, positions [N] int64. Returns [N, vocab_size] float32 in (0, 16.7).

    Each row's 64 mixed bits enter the hash as two words between multiplications that finish like murmur3's.
    """
    row = _mix64(_mix64(keys) + positions * _signed(0x9E3779B97F4A7C15, 64))
    low, high = row.to(torch.int32)[:, None], (row >> 32).to(torch.int32)[:, None]
    bits = _token_hash(vocab_size, keys.device) ^ low
    shifted = torch.empty_like(bits)
    bits.mul_(_signed(0x21F0AAAD, 32))
    _xor_shift(bits, 16, shifted)
    bits.bitwise_xor_(high).mul_(_signed(0xD35A2D97, 32))
    _xor_shift(bits, 15, shifted)
    bits.mul_(_signed(0x735A2D97, 32))
    # an arithmetic shift clears the sign bit here, and maps 32 uniform bits two to one on 31
    bits.bitwise_xor_(torch.bitwise_right_shift(bits, 16, out=shifted))
    # u = (bits + 1/2) 2^-31, kept below 1 where float32 would round it up; small u, the likely winners, stay exact
    uniform = bits.to(torch.float32).mul_((1 - 2.0**-24) * 2.0**-31).add_(2.0**-32)
    return uniform.neg_().log1p_().neg_()


@lru_cache(maxsize=8)
def _token_hash(vocab_size: int, device: torch.device) -> torch.Tensor:
    """A mixed word for each token, all different. Returns [vocab_size] int32."""
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=device)
    shifted = torch.empty_like(tokens)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        _xor_shift(tokens, shift, shifted)
        tokens.mul_(_signed(factor, 32))
    _xor_shift(tokens, 16, shifted)
    return tokens


def _mix64(words: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on [N] int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ _logical_shift64(words, shift)) * _signed(factor, 64)
    return words ^ _logical_shift64(words, 31)


def _logical_shift64(words: torch.Tensor, shift: int) -> torch.Tensor:
    return (words >> shift) & ((1 << (64 - shift)) - 1)


def _xor_shift(words: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """words ^= words >>> shift on int32, in place. torch shifts arithmetically, hence the mask."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    words.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _signed(word: int, bits: int) -> int:
    """The two's complement reading of an unsigned word."""
    return word - (1 << bits) if word >> (bits - 1) else word

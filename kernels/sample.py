"""Sampling as a pure function: noise from a counter, not from a generator with a state.

The token at a position is argmax(log p + G) with G = -log E Gumbel noise and E exponential (DESIGN.md, idea 2). E is
a hash of (key, position, token), so no batch, device, draft or restart can change what is sampled.
"""

import hashlib
import math
from functools import lru_cache
from typing import Any

import torch

# of the reference on either device
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # of each float32 temporary: what caches hold, and 256 MB


def noise_key(*, seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key, as a signed integer, of all noise of one rollout."""
    identity = f"{seed}:{step}:{sample}:{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little", signed=True)


def gumbel_noise(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of (key, position, token).

    The uniform it is made from has the same bits on every device; logarithms may differ in the last place.
    Shapes: keys, positions [N] int64. Returns [N, vocab_size] float32.
    """
    return _negative_exponential(keys, positions, _token_hash(vocab_size, keys.device)).neg_().log_().neg_()


def sample(
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
    """Draw one token a row, by the noise of its key and position: in Triton on CUDA, by the reference elsewhere.

    A filter keeps what lies at or above a threshold, so equal logits stay or go together and nothing depends on the
    order of a sort. top_k keeps the k largest; top_p, of what is left, the largest tokens whose predecessors hold less
    than top_p of the mass; min_p those of at least min_p times the largest probability.
    Shapes: logits [N, V] of any float dtype; keys, positions [N] int64; token_ids [V] int32: the tokens that the logits
    of a reduced vocabulary stand for, whose noise is then that of the whole one; None where column is token.
    Returns: token_ids [N] int64; logprobs [N] float32 under temperature and filters, renormalised. Temperature 0 takes
    the largest logit, the first of equals, with log-prob 0. A row with NaN or +inf, or nothing but -inf, gets a
    log-prob that is not finite.
    """
    transform: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if not logits.is_cuda:
        return sample_reference(logits, keys, positions, token_ids=token_ids, **transform)
    from kernels.sample_triton import sample_triton  # triton is slow to import, and no CPU process needs it

    return sample_triton(logits, keys, positions, token_ids=token_ids, **transform)


def sample_reference(
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
    """sample, in torch: the definition. It keeps some float32 chunks, CHUNK_ELEMENTS long, beside the logits."""
    if temperature == 0:
        largest, chosen = logits.max(dim=1)
        drawn = chosen if token_ids is None else token_ids[chosen].long()
        return drawn, largest.float() * 0  # 0, and NaN where the logits are not numbers
    num_rows, vocab_size = logits.shape
    hashes = _token_hash(vocab_size, logits.device) if token_ids is None else hash_tokens(token_ids)
    drawn = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    chunk = max(1, CHUNK_ELEMENTS[logits.device.type] // vocab_size)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        scaled = logits[rows].float() / temperature
        if top_k > 0 or top_p < 1 or min_p > 0:
            _filter(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
        probs = torch.softmax(scaled, dim=1)
        # p / E has the argmax of log p + G and spares two logarithms an element
        race = probs / _negative_exponential(keys[rows], positions[rows], hashes)
        chosen = race.argmin(dim=1)
        drawn[rows] = chosen if token_ids is None else token_ids[chosen]
        logprobs[rows] = probs.gather(1, chosen[:, None]).squeeze(1).log()
    return drawn, logprobs


def _filter(scaled: torch.Tensor, *, top_k: int, top_p: float, min_p: float) -> None:
    """Set what the filters drop to -inf, in place. scaled [N, V] float32: logits over temperature."""
    largest = None
    if 0 < top_k < scaled.shape[1]:
        largest = scaled.topk(top_k, dim=1).values
        scaled.masked_fill_(scaled < largest[:, -1:], -torch.inf)
    if top_p < 1:
        if largest is None:
            largest = scaled.sort(dim=1, descending=True).values
        # over all that is left: tokens tied with the k-th count, though they are not among the k values
        probs = (largest - scaled.logsumexp(dim=1, keepdim=True)).exp_()
        preceding = probs.cumsum(dim=1).roll(1, dims=1)
        preceding[:, 0] = 0
        threshold = largest.masked_fill(preceding >= top_p, torch.inf).amin(dim=1, keepdim=True)
        scaled.masked_fill_(scaled < threshold, -torch.inf)
    if min_p > 0:
        threshold = scaled.amax(dim=1, keepdim=True) + math.log(min_p)
        scaled.masked_fill_(scaled < threshold, -torch.inf)


def log_exponential_noise(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """log E of the noise of these tokens. keys, positions [N] int64; token_ids [V] int32. Returns [N, V] float32."""
    return _negative_exponential(keys, positions, hash_tokens(token_ids)).neg_().log_()


def _negative_exponential(keys: torch.Tensor, positions: torch.Tensor, hashes: torch.Tensor) -> torch.Tensor:
    """-E of exponential noise E with rate 1 of tokens with these hashes [V].

    keys, positions [N] int64. Returns [N, V] float32 > -16.7.
    """
    bits = _noise_bits(keys, positions, hashes)
    # -u = -(bits + 1/2) 2^-31, kept above -1 where float32 would round; small u, the likely winners, keep every bit
    negative_uniform = bits.to(torch.float32).mul_(-(1 - 2.0**-24) * 2.0**-31).sub_(2.0**-32)
    return negative_uniform.log1p_()


def noise_words(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """31 uniform bits for each (key, position, token): what all noise is made from, on every device.

    The two words of a row's mixed 64 bits enter a hash of the token before its first and second multiplication of
    three; shifts and multiplications are those of a murmur3-like finaliser.
    Shapes: keys, positions [N] int64. Returns [N, vocab_size] int32, none negative.
    """
    return _noise_bits(keys, positions, _token_hash(vocab_size, keys.device))


def _noise_bits(keys: torch.Tensor, positions: torch.Tensor, hashes: torch.Tensor) -> torch.Tensor:
    """noise_words of the tokens with these hashes [V]."""
    row = _mix64(_mix64(keys) + positions * _signed(0x9E3779B97F4A7C15, 64))
    low, high = row.to(torch.int32)[:, None], (row >> 32).to(torch.int32)[:, None]
    bits = hashes ^ low
    shifted = torch.empty_like(bits)
    bits.mul_(_signed(0xED5AD4BB, 32))
    _xor_shift(bits, 17, shifted)
    bits.bitwise_xor_(high).mul_(_signed(0xAC4C1B51, 32))
    _xor_shift(bits, 11, shifted)
    bits.mul_(_signed(0x31848BAB, 32))
    # unmasked: an arithmetic shift clears the sign bit here and maps 32 uniform bits two to one on 31
    return bits.bitwise_xor_(torch.bitwise_right_shift(bits, 14, out=shifted))


@lru_cache(maxsize=8)
def _token_hash(vocab_size: int, device: torch.device) -> torch.Tensor:
    """hash_tokens of the whole vocabulary."""
    return hash_tokens(torch.arange(vocab_size, dtype=torch.int32, device=device))


def hash_tokens(token_ids: torch.Tensor) -> torch.Tensor:
    """A mixed word for each token, all different. token_ids [V] int32; returns [V] int32."""
    words = token_ids.clone()
    shifted = torch.empty_like(words)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        _xor_shift(words, shift, shifted)
        words.mul_(_signed(factor, 32))
    _xor_shift(words, 16, shifted)
    return words


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

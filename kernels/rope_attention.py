"""Attention straight from a layer's projections: queries and keys are normed and turned, and keys cached, on the way.

What rope_and_write and paged_attention do one after the other; a GPU does it in one launch where few tokens are new.
"""

import torch

from kernels.attention import PagedSequences, paged_attention, paged_attention_reference
from kernels.cache import rope_and_write, rope_and_write_reference

MAX_NEW = 32  # tokens of one sequence
MAX_ROWS = {2: 64, 4: 32}  # new tokens times query heads a key head, by bytes of an element: one tile of a program
MAX_HEAD_DIM = 128
# Measured on an H100, captured, a layer: heads of 64 gain 0.3 to 3 us at up to 128 sequences, drafts or not. Of 128,
# 4 query heads a key head gain 1 to 3.5 us while few programs run and one token is new, 2 lose as much as they gain.
FREE_HEAD_DIM = 64
FREE_GROUPS, FREE_PROGRAMS = 4, 256


def rope_and_attend(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    scale: float,
) -> torch.Tensor:
    """rope_and_write at seqs.slots, then paged_attention without window or softcap; the caches are mutated.

    Arguments and shapes are theirs. Keys are rounded before they are attended to: what is cached is what is seen.
    Returns [T, Hq, D].
    """
    head_dim = key_cache.shape[3]
    if qkv.is_cuda and pays_in_one_launch(seqs, num_heads, num_kv_heads, head_dim, qkv.dtype):
        # only where it runs: importing triton settles whether kernels are interpreted
        from kernels.rope_attention_triton import rope_and_attend_triton

        return rope_and_attend_triton(
            qkv,
            positions,
            cos,
            sin,
            key_cache,
            value_cache,
            seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            scale=scale,
        )
    query = rope_and_write(
        qkv,
        positions,
        cos,
        sin,
        seqs.slots,
        key_cache,
        value_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
    return paged_attention(query, key_cache, value_cache, seqs, scale=scale, sliding_window=None, softcap=None)


def rope_and_attend_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    scale: float,
) -> torch.Tensor:
    """rope_and_attend in torch."""
    query = rope_and_write_reference(
        qkv,
        positions,
        cos,
        sin,
        seqs.slots,
        key_cache,
        value_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
    return paged_attention_reference(
        query, key_cache, value_cache, seqs, scale=scale, sliding_window=None, softcap=None
    )


def plan_rope_and_attend(
    seqs: PagedSequences, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Make what rope_and_attend's launches share, before the first layer's projection.

    Then a launch may begin while the projection before it drains; without this the first one makes it, and waits.
    """
    if seqs.slots.is_cuda and pays_in_one_launch(seqs, num_heads, num_kv_heads, head_dim, dtype):
        from kernels.rope_attention_triton import plan_launch

        plan_launch(seqs, num_heads, num_kv_heads, head_dim, dtype)


def in_one_launch(seqs: PagedSequences, groups: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether one program holds all new tokens of a sequence, so that each new key has one that writes it."""
    few = seqs.max_seqlen_q <= MAX_NEW and seqs.max_seqlen_q * groups <= MAX_ROWS[dtype.itemsize]
    return few and head_dim <= MAX_HEAD_DIM


def pays_in_one_launch(
    seqs: PagedSequences, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> bool:
    """Whether one launch can do it, and is faster than two."""
    groups = num_heads // num_kv_heads
    if not in_one_launch(seqs, groups, head_dim, dtype):
        return False
    num_programs = seqs.context_lens.shape[0] * num_kv_heads
    alone = seqs.max_seqlen_q == 1 and groups >= FREE_GROUPS and num_programs <= FREE_PROGRAMS
    return head_dim <= FREE_HEAD_DIM or alone

"""Paged attention under the clock: decoding and verifying, against torch's SDPA over the same keys laid out whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels.attention import PagedSequences, paged_attention, paged_sequences
from launch.bench_clock import compare, copies_for, row, times_us
from rollout.speculate import depths

BLOCK_SIZE = 16
NUM_DRAFTED, DEPTH = 15, 8
DECODE_LIMIT = 1.0  # our time over SDPA's (issue 3)
VERIFY_LIMIT = 1.25  # verification of 16 tokens over that of one (issue 3)


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, key heads and their dimension."""

    query: int
    key: int
    dim: int


@dataclass(frozen=True, slots=True)
class Operands:
    """One forward's attention in one layer: B sequences of L keys, Q of them new, in blocks strewn over the cache."""

    length: int
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    tables: torch.Tensor
    seqs: PagedSequences

    def ours(self, scale: float) -> torch.Tensor:
        """[B * Q, Hq, D]."""
        return paged_attention(
            self.query, self.key_cache, self.value_cache, self.seqs, scale=scale, sliding_window=None, softcap=None
        )

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in order, [B, Hkv, L, D] each, contiguous: what SDPA is given."""
        return in_order(self.key_cache, self.tables, self.length), in_order(self.value_cache, self.tables, self.length)


def rows(
    heads: Heads, sizes: list[tuple[int, int]], *, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A result for decoding and one for verifying 16 tokens, at every (batch, keys). Raises WrongResultError."""
    scale = heads.dim**-0.5
    ours = partial(Operands.ours, scale=scale)
    sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    for batch, length in sizes:
        kv_bytes = batch * length * 2 * heads.key * heads.dim * dtype.itemsize
        size, copies = f"{batch} x {length}", copies_for(kv_bytes, device)
        given = [(operands(heads, batch, length, 1, dtype=dtype, device=device),) for _ in range(copies)]
        decode = times_us(ours, given, device)
        whole = [(o.query.view(batch, heads.query, 1, heads.dim), *o.whole()) for (o,) in given]
        compare(ours(*given[0]), sdpa(*whole[0]).transpose(1, 2), f"decoding, {size}")
        baseline = times_us(sdpa, whole, device)
        del given, whole
        yield row("attention, decode", size, kv_bytes, decode, baseline, "sdpa") | {"limit": DECODE_LIMIT}
        given = [(operands(heads, batch, length, 1 + NUM_DRAFTED, dtype=dtype, device=device),) for _ in range(copies)]
        compare(ours(*given[0]), _masked(*given[0], heads, scale), f"verifying, {size}")
        verify = times_us(ours, given, device)
        del given
        yield row("attention, verify 16", size, kv_bytes, verify, decode, "ours, decode") | {"limit": VERIFY_LIMIT}


def operands(
    heads: Heads, batch: int, length: int, num_new: int, *, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Random ones. New tokens past the first are a tree of two chains, as the drafter's are trees."""
    blocks_each = -(-length // BLOCK_SIZE)
    num_blocks = batch * blocks_each
    tables = torch.randperm(num_blocks, device=device, dtype=torch.int32).view(batch, blocks_each)
    context = length - num_new
    index = torch.arange(context, length, device=device)
    slots = tables[:, index // BLOCK_SIZE].long() * BLOCK_SIZE + index % BLOCK_SIZE
    trees: dict[str, torch.Tensor] = {}
    if num_new > 1:
        parents = two_chains(num_new - 1, depth=DEPTH)
        trees = {
            "positions": (context + torch.tensor([0, *depths(parents)], device=device)).repeat(batch),
            "ancestors": torch.tensor([0, *ancestor_bits(parents)], device=device).repeat(batch),
            "num_drafted": torch.full((batch,), num_new - 1, dtype=torch.int32, device=device),
        }
    seqs = paged_sequences(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device) * num_new,
        max_seqlen_q=num_new,
        context_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        max_context=context,
        block_tables=tables,
        slots=slots.flatten(),
        block_size=BLOCK_SIZE,
        **trees,
    )
    query = torch.randn(batch * num_new, heads.query, heads.dim, dtype=dtype, device=device)
    keys, values = (
        torch.randn(num_blocks, BLOCK_SIZE, heads.key, heads.dim, dtype=dtype, device=device) for _ in range(2)
    )
    return Operands(length, query, keys, values, tables, seqs)


def in_order(cache: torch.Tensor, tables: torch.Tensor, length: int) -> torch.Tensor:
    """The first tokens of rows of blocks [B, W] of a cache [num_blocks, block_size, Hkv, D]: [B, Hkv, L, D]."""
    rows = cache[tables.long()].view(len(tables), -1, *cache.shape[2:])
    return rows[:, :length].transpose(1, 2).contiguous()


def two_chains(num_nodes: int, *, depth: int) -> list[int]:
    """Parents of a draft tree of two chains below the pending token, the first one depth nodes deep."""
    first = min(depth, num_nodes)
    return [*range(-1, first - 1), *(-1 if node == first else node - 1 for node in range(first, num_nodes))]


def ancestor_bits(parents: Sequence[int]) -> list[int]:
    """For each node a bit for itself and every ancestor."""
    bits: list[int] = []
    for node, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << node)
    return bits


def _masked(given: Operands, heads: Heads, scale: float) -> torch.Tensor:
    """What the tree sees, through SDPA and a mask that is written out. Returns [B, Q, Hq, D]."""
    keys, values = given.whole()
    batch, length, num_new = len(given.tables), given.length, given.seqs.max_seqlen_q
    sees = torch.ones(num_new, length, dtype=torch.bool, device=keys.device)
    sees[:, length - num_new + 1 :] = False
    for node, bits in enumerate(ancestor_bits(two_chains(num_new - 1, depth=DEPTH))):
        for other in range(num_new - 1):
            sees[1 + node, length - num_new + 1 + other] = bool(bits >> other & 1)
    query = given.query.view(batch, num_new, heads.query, heads.dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=sees, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)

"""One layer's decode over long contexts, laid out for sparse kernels, and what SDPA makes of it under a mask."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels.attention import PagedSequences, paged_attention, paged_sequences
from kernels.describe import describe, empty_descriptors
from kernels.gate import GateWeights, Rotation, gate_choose
from kernels.select import BlockLists, Choice, bound_scores, choose_blocks, mean_scores
from kernels.sparse_attention import sparse_attention
from launch.bench_attention import Heads, in_order
from launch.bench_options import BY_GATES, GATE_FP8

BLOCK_SIZE = 64
SELECT_BLOCK = {"gate": 64, GATE_FP8: 64, "quest": 16, "mean": 64}


@dataclass(frozen=True, slots=True)
class Operands:
    """One layer's decode: B sequences of L keys, the last one new. storage [1, 2, num_blocks, 64, Hkv, D]."""

    length: int
    query: torch.Tensor
    storage: torch.Tensor
    tables: torch.Tensor
    seqs: PagedSequences
    described: torch.Tensor
    gates: GateWeights | None

    def dense(self, scale: float) -> torch.Tensor:
        """Our own dense decode, [B, Hq, D]."""
        keys, values = self.storage[0]
        return paged_attention(self.query, keys, values, self.seqs, scale=scale, sliding_window=None, softcap=None)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in order, [B, Hkv, L, D] each, contiguous: what SDPA is given."""
        keys, values = (in_order(cache, self.tables, self.length) for cache in self.storage[0])
        return keys, values

    def lists(self, choice: Choice, select_block: int) -> BlockLists:
        """The blocks that are picked: by gate, or by the kind that the descriptors are of."""
        if self.gates is not None:
            assert self.seqs.positions is not None
            positions = self.seqs.positions
            return gate_choose(self.gates, 0, self.query, positions, self.described[0], self.seqs, choice)
        score = bound_scores if self.described.shape[4] == 2 * self.query.shape[2] else mean_scores
        scores = score(self.query, self.described[0], self.seqs)
        return choose_blocks(scores, self.seqs, choice, select_block=select_block)

    def sparse(self, choice: Choice, select_block: int, scale: float) -> torch.Tensor:
        """Pick, then attend, [B, Hq, D]."""
        keys, values = self.storage[0]
        return sparse_attention(self.query, keys, values, self.seqs, self.lists(choice, select_block), scale=scale)


def operands(
    heads: Heads, batch: int, length: int, selector: str, *, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Random ones, their blocks strewn over the cache and described for a selector."""
    blocks_each = -(-length // BLOCK_SIZE)
    num_blocks = batch * blocks_each
    tables = torch.randperm(num_blocks, device=device, dtype=torch.int32).view(batch, blocks_each)
    last = length - 1
    context = torch.full((batch,), last, dtype=torch.int32, device=device)
    seqs = paged_sequences(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device),
        max_seqlen_q=1,
        context_lens=context,
        max_context=last,
        block_tables=tables,
        slots=tables[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        positions=torch.full((batch,), last, dtype=torch.int64, device=device),
    )
    storage = torch.randn(1, 2, num_blocks, BLOCK_SIZE, heads.key, heads.dim, dtype=dtype, device=device)
    query = torch.randn(batch, heads.query, heads.dim, dtype=dtype, device=device)
    if selector in BY_GATES:
        gates = random_gates(heads, dtype=dtype, device=device)
        described = torch.randn(1, num_blocks, 1, heads.key, heads.dim, dtype=dtype, device=device)
        if selector == GATE_FP8:
            described = described.to(torch.float8_e4m3fn)
        return Operands(length, query, storage, tables, seqs, described, gates)
    kind: Any = {"quest": "minmax", "mean": "mean"}[selector]
    described = empty_descriptors(kind, storage, select_block=SELECT_BLOCK[selector])
    describe(
        kind,
        storage,
        described,
        block_tables=tables,
        begins=torch.zeros_like(context),
        ends=context,
        max_tokens=length,
    )
    return Operands(length, query, storage, tables, seqs, described, None)


def random_gates(heads: Heads, *, dtype: torch.dtype, device: torch.device) -> GateWeights:
    """One layer's gates, as wide as the heads: they take as long as trained ones."""
    new = partial(torch.randn, dtype=dtype, device=device)
    groups, width = heads.query // heads.key, heads.dim
    rotation = Rotation(1e6 ** -(torch.arange(0, width, 2, device=device) / width), scaling=1.0)
    return GateWeights(
        query_weight=new(1, heads.key, groups, width, width) * (groups * width) ** -0.5,
        key_weight=new(1, heads.key, 3 * width, width) * (3 * width) ** -0.5,
        query_norm=torch.ones(1, width, dtype=dtype, device=device),
        key_norm=torch.ones(1, width, dtype=dtype, device=device),
        rotation=rotation,
        gate_rotation=rotation,
        eps=1e-6,
    )


def masked(given: Operands, lists: BlockLists, scale: float) -> torch.Tensor:
    """Decoding over the listed blocks through SDPA and a mask that is written out. Returns [B, 1, Hq, D]."""
    keys, values = given.whole()
    batch, num_kv_heads, length = keys.shape[:3]
    num_heads = given.query.shape[1]
    listed = lists.listed(-(-length // lists.select_block))
    sees = listed.repeat_interleave(lists.select_block, dim=2)[:, :, None, :length]
    sees = sees.repeat_interleave(num_heads // num_kv_heads, dim=1)
    query = given.query.view(batch, num_heads, 1, -1)
    # under a mask torch may widen grouped keys to every query head, in float32: that fits one sequence at a time
    rows = [
        F.scaled_dot_product_attention(
            query[row], keys[row], values[row], attn_mask=sees[row], scale=scale, enable_gqa=True
        )
        for row in (slice(index, index + 1) for index in range(batch))
    ]
    return torch.cat(rows).transpose(1, 2)

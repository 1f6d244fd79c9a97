"""Scores of blocks by SeerAttention-R's gates, from the cache: a small network for queries, another for blocks of keys.

The query side merges the query heads of a key head by one linear map, the key side the elementwise maximum, minimum and
mean of a block's keys by another. Both end in an RMSNorm and a rotary embedding, the key side's at the position of the
block's first key; a block's score is their scaled product. What enters is as it was before the policy's own rotary
embedding, which is undone here: a descriptor is a pure function of the keys that are committed to its block.
It is kept in the gates' dtype or, for scoring to read half as much, in FP8; products are in FP16 then, which holds FP8.
Source: SeerAttention-R (arXiv 2506.08889) sec. 3.
"""

from dataclasses import dataclass, replace

import torch

from kernels.attention import PagedSequences
from kernels.describe import touched_blocks
from kernels.select import BlockLists, Choice, by_sequence, choose_blocks, largest_over_tokens


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary embedding: dimensions (d, d + R / 2) turn by position * frequencies[d] and grow by scaling.

    frequencies [R / 2] float32.
    """

    frequencies: torch.Tensor
    scaling: float

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [..., 1, R / 2] float32, at positions [...]: one value for all heads."""
        angles = positions[..., None, None].float() * self.frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling


@dataclass(frozen=True, slots=True)
class GateWeights:
    """The gates of all layers as they are served.

    query_weight [L, Hkv, G, D, Dg], key_weight [L, Hkv, 3 D, Dg] (of maximum, minimum and mean), query_norm and
    key_norm [L, Dg]: of one dtype, contiguous. rotation: the policy's, of D dimensions; gate_rotation: of Dg.
    """

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    rotation: Rotation
    gate_rotation: Rotation
    eps: float

    @property
    def gate_dim(self) -> int:
        return self.query_norm.shape[1]

    def of(self, layers: range) -> "GateWeights":
        """Neighbouring layers' alone, which share the storage."""
        own = slice(layers.start, layers.stop)
        return replace(
            self,
            query_weight=self.query_weight[own],
            key_weight=self.key_weight[own],
            query_norm=self.query_norm[own],
            key_norm=self.key_norm[own],
        )


def gate_scores(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
) -> torch.Tensor:
    """How much a sequence's new tokens want each block, the largest over them; a softmax over blocks gives weights.

    Only complete blocks are scored; the others' entries hold anything. query: after the policy's rotary embedding;
    descriptors: one layer's of compress.
    Shapes: query [T, Hq, D]; positions [T] int64; descriptors [num_blocks, block_size / select_block, Hkv, Dg].
    Returns [B, Hkv, NB] float32. On CUDA two launches.
    """
    if not query.is_cuda:
        return gate_scores_reference(weights, layer, query, positions, descriptors, seqs)
    # only where it runs: importing triton settles whether kernels are interpreted
    from kernels.gate_triton import gate_scores_triton

    return gate_scores_triton(weights, layer, query, positions, descriptors, seqs)


def gate_choose(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
    choice: Choice,
) -> BlockLists:
    """What choose_blocks makes of gate_scores; a threshold is one of their softmax over complete blocks.

    Arguments are theirs. On CUDA two launches, without synchronisation.
    """
    if not query.is_cuda:
        return gate_choose_reference(weights, layer, query, positions, descriptors, seqs, choice)
    from kernels.gate_triton import gate_choose_triton

    return gate_choose_triton(weights, layer, query, positions, descriptors, seqs, choice)


def empty_compressed(
    weights: GateWeights, storage: torch.Tensor, *, select_block: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Room for descriptors of all keys in the storage of a cache, zeros, in the gates' dtype or FP8.

    Shapes: storage [L, 2, num_blocks, block_size, Hkv, D]; returns
    [L, num_blocks, block_size / select_block, Hkv, Dg].
    """
    layers, _, num_blocks, block_size, num_kv_heads, _ = storage.shape
    assert block_size % select_block == 0, f"blocks of {select_block} do not divide the cache's of {block_size}"
    shape = (layers, num_blocks, block_size // select_block, num_kv_heads, weights.gate_dim)
    return weights.key_weight.new_zeros(shape, dtype=dtype)


def compress(
    weights: GateWeights,
    storage: torch.Tensor,
    out: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> None:
    """Compress anew, in all layers, the selection blocks that token indices [begin, end) of a sequence touch.

    From the keys of indices below end: the last block may be partial. Arguments as kernels.describe.describe's; out,
    made by empty_compressed, is mutated. On CUDA one launch, without synchronisation.
    """
    if storage.is_cuda:
        # only where it runs: importing triton settles whether kernels are interpreted
        from kernels.gate_compress_triton import compress_triton as compress_on_device
    else:
        compress_on_device = compress_reference
    compress_on_device(
        weights, storage, out, block_tables=block_tables, begins=begins, ends=ends, max_tokens=max_tokens
    )


def gate_scores_reference(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
) -> torch.Tensor:
    """gate_scores in torch."""
    asked = gate_queries(weights, layer, query, positions).float()
    pairs = by_sequence(asked, descriptors, seqs)
    scores = [largest_over_tokens(torch.einsum("thd,nhd->thn", q, described)) for q, described in pairs]
    return torch.stack(scores) * weights.gate_dim**-0.5


def gate_choose_reference(
    weights: GateWeights,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    descriptors: torch.Tensor,
    seqs: PagedSequences,
    choice: Choice,
) -> BlockLists:
    """gate_choose in torch."""
    select_block = seqs.block_size // descriptors.shape[1]
    scores = gate_scores_reference(weights, layer, query, positions, descriptors, seqs)
    if choice.threshold is not None:
        complete = torch.arange(scores.shape[2], device=query.device) < (seqs.context_lens // select_block)[:, None]
        # a row without a complete block has nothing to choose
        scores = scores.masked_fill(~complete[:, None], -torch.inf).softmax(dim=2).nan_to_num(0.0)
    return choose_blocks(scores, seqs, choice, select_block=select_block)


def compress_reference(
    weights: GateWeights,
    storage: torch.Tensor,
    out: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> None:
    """compress in torch."""
    touched = touched_blocks(
        storage, parts=out.shape[2], block_tables=block_tables, begins=begins, ends=ends, max_tokens=max_tokens
    )
    pooled = pool_keys(touched.keys, touched.starts, touched.num_keys, weights.rotation).to(weights.key_weight.dtype)
    merged = torch.einsum("lnhi,lhio->lnho", pooled, weights.key_weight)
    compressed = finish(merged, weights.key_norm[:, None, None], touched.starts, weights.gate_rotation, weights.eps)
    largest = torch.finfo(out.dtype).max
    out[:, touched.blocks, touched.part] = compressed.clamp(-largest, largest).to(out.dtype)


def gate_queries(weights: GateWeights, layer: int, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A layer's queries as its gate compares them. query [T, Hq, D] after the policy's rotary embedding; positions [T];
    returns [T, Hkv, Dg] in the weights' dtype."""
    weight = weights.query_weight[layer]
    plain = unrotate(query.float(), *weights.rotation.at(positions)).to(weight.dtype)
    merged = torch.einsum("tkgi,kgio->tko", plain.unflatten(1, weight.shape[:2]), weight)
    return finish(merged, weights.query_norm[layer], positions, weights.gate_rotation, weights.eps)


def pool_keys(keys: torch.Tensor, starts: torch.Tensor, num_valid: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Maximum, minimum and mean of each block's plain keys, side by side, float32.

    Shapes: keys [..., P, Hkv, D] after rotation; starts [...] int64: each block's first key's position; num_valid
    [...]: how many of its keys count, one at least. Returns [..., Hkv, 3 D].
    """
    index = torch.arange(keys.shape[-3], device=keys.device)
    plain = unrotate(keys.float(), *rotation.at(starts[..., None] + index))
    count = num_valid[..., None, None]
    out = (index[:, None, None] >= count[..., None]).expand(plain.shape)
    largest = plain.masked_fill(out, -torch.inf).amax(dim=-3)
    smallest = plain.masked_fill(out, torch.inf).amin(dim=-3)
    return torch.cat([largest, smallest, plain.masked_fill(out, 0.0).sum(dim=-3) / count], dim=-1)


def finish(
    merged: torch.Tensor, norm: torch.Tensor, positions: torch.Tensor, rotation: Rotation, eps: float
) -> torch.Tensor:
    """Norm and rotate [..., heads, Dg] at positions [...], in float32; returns the norm's dtype."""
    wide = merged.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * norm.float()
    return rotate(normed, *rotation.at(positions)).to(norm.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D / 2) of x [..., heads, D], as Llama lays them out. cos, sin [..., 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What rotate made x of, whatever scaling or rounding the cosines and sines carry: rotate's inverse."""
    first, second = x.chunk(2, dim=-1)
    size = cos.square() + sin.square()
    return torch.cat([(first * cos + second * sin) / size, (second * cos - first * sin) / size], dim=-1)

"""Attention of new tokens over listed blocks of a paged cache: decode, verification and draft trees, sparse."""

import torch

from kernels.attention import PagedSequences, attend
from kernels.select import BlockLists


def sparse_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    lists: BlockLists,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of new tokens, whose keys and values are already written, to the listed selection blocks alone.

    Inside them a token sees what it sees in paged_attention, to which lists of all blocks are equal; a token that sees
    nothing gets 0. Rows without a sequence may list anything in range: nothing outside the tables is read.
    Shapes: query [T, Hq, D]; key_cache, value_cache [num_blocks, block_size, Hkv, D], finite everywhere.
    Returns [T, Hq, D].
    """
    assert seqs.block_size % lists.select_block == 0, (seqs.block_size, lists.select_block)
    if not query.is_cuda:
        return sparse_attention_reference(query, key_cache, value_cache, seqs, lists, scale=scale)
    # only where it runs: importing triton settles whether kernels are interpreted
    from kernels.sparse_attention_triton import sparse_attention_triton

    return sparse_attention_triton(query, key_cache, value_cache, seqs, lists, scale=scale)


def sparse_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    lists: BlockLists,
    *,
    scale: float,
) -> torch.Tensor:
    """sparse_attention in torch, over the padded batch and all of its keys."""
    masks = seqs.masks
    assert masks is not None
    num_kv_heads = key_cache.shape[2]
    num_keys = masks.visible.shape[3]
    listed_keys = lists.listed(num_keys // lists.select_block).repeat_interleave(lists.select_block, dim=2)
    mask = (masks.visible & listed_keys[:, :, None]).repeat(1, 1, query.shape[1] // num_kv_heads, 1)
    rows, keys, values = masks.rows(query, num_kv_heads), masks.cached(key_cache), masks.cached(value_cache)
    output = attend(rows, keys, values, mask, scale=scale, softcap=None)
    # torch's own kernels disagree on rows that see nothing
    return masks.tokens(output.masked_fill(~mask.any(dim=3, keepdim=True), 0.0))

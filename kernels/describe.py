"""Descriptors of cached keys, one for each selection block and key head: what kernels/select.py scores blocks by.

They lie beside the cache, addressed as it is: block of the cache, then part of that block. So a prefix that sequences
share is described once, and a descriptor is a pure function of the keys that are committed to its block.
"""

from typing import Literal

import torch

Kind = Literal["minmax", "mean"]
PLANES: dict[Kind, int] = {"minmax": 2, "mean": 1}  # vectors of a head's dimension in one descriptor


def empty_descriptors(kind: Kind, storage: torch.Tensor, *, select_block: int) -> torch.Tensor:
    """Room for descriptors of all keys in the storage of a cache, in its dtype, zeros.

    Shapes: storage [layers, 2, num_blocks, block_size, Hkv, D]; returns
    [layers, num_blocks, block_size / select_block, Hkv, planes * D]: of minmax the minima, then the maxima.
    """
    layers, _, num_blocks, block_size, num_kv_heads, head_dim = storage.shape
    assert block_size % select_block == 0, f"blocks of {select_block} do not divide the cache's of {block_size}"
    return storage.new_zeros(layers, num_blocks, block_size // select_block, num_kv_heads, PLANES[kind] * head_dim)


def describe(
    kind: Kind,
    storage: torch.Tensor,
    out: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> None:
    """Describe anew, in all layers, the selection blocks that token indices [begin, end) of a sequence touch.

    From the keys of indices below end: the last block may be partial. A row whose range is empty does nothing, and rows
    that share a block of the cache agree on its keys. Means are taken in float32. On CUDA one launch, without
    synchronisation. out, made by empty_descriptors, is mutated.
    Shapes: storage [layers, 2, num_blocks, block_size, Hkv, D], contiguous; block_tables [B, W] int32, rows may be
    strided; begins, ends [B] int32, at most max_tokens apart.
    """
    assert out.shape[4] == PLANES[kind] * storage.shape[5], f"{out.shape} is no room for {kind}"
    if storage.is_cuda:
        # only where it runs: importing triton settles whether kernels are interpreted
        from kernels.describe_triton import describe_triton as describe_on_device
    else:
        describe_on_device = describe_reference
    describe_on_device(kind, storage, out, block_tables=block_tables, begins=begins, ends=ends, max_tokens=max_tokens)


def describe_reference(
    kind: Kind,
    storage: torch.Tensor,
    out: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> None:
    """describe in torch."""
    block_size, parts = storage.shape[3], out.shape[2]
    select_block = block_size // parts
    first = begins // select_block
    touched = first[:, None] + torch.arange(most_touched(max_tokens, select_block), device=storage.device)
    rows, column = ((touched * select_block < ends[:, None]) & (begins < ends)[:, None]).nonzero(as_tuple=True)
    selected = touched[rows, column].long()
    blocks = block_tables[rows, selected // parts].long()
    index = selected[:, None] * select_block + torch.arange(select_block, device=storage.device)
    slots = blocks[:, None] * block_size + index % block_size
    keys = storage[:, 0].flatten(1, 2)[:, slots].float()  # [layers, N, select_block, Hkv, D]
    is_key = (index < ends[rows, None])[:, :, None, None]
    if kind == "minmax":
        low = torch.where(is_key, keys, torch.inf).amin(dim=2)
        high = torch.where(is_key, keys, -torch.inf).amax(dim=2)
        described = torch.cat([low, high], dim=3)
    else:
        described = torch.where(is_key, keys, 0).sum(dim=2) / is_key.sum(dim=1)
    out[:, blocks, selected % parts] = described.to(out.dtype)


def most_touched(max_tokens: int, select_block: int) -> int:
    """Selection blocks that so many neighbouring tokens touch at most."""
    return (max_tokens + select_block - 2) // select_block + 1

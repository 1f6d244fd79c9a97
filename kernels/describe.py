"""Descriptors of cached keys, one for each selection block and key head: what kernels/select.py scores blocks by.

They lie beside the cache, addressed as it is: block of the cache, then part of that block. So a prefix that sequences
share is described once, and a descriptor is a pure function of the keys that are committed to its block.
"""

from dataclasses import dataclass
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
    touched = touched_blocks(
        storage, parts=out.shape[2], block_tables=block_tables, begins=begins, ends=ends, max_tokens=max_tokens
    )
    keys = touched.keys.float()
    index = torch.arange(keys.shape[2], device=keys.device)
    is_key = (index < touched.num_keys[:, None])[:, :, None, None]
    if kind == "minmax":
        low = torch.where(is_key, keys, torch.inf).amin(dim=2)
        high = torch.where(is_key, keys, -torch.inf).amax(dim=2)
        described = torch.cat([low, high], dim=3)
    else:
        described = torch.where(is_key, keys, 0).sum(dim=2) / is_key.sum(dim=1)
    out[:, touched.blocks, touched.part] = described.to(out.dtype)


@dataclass(frozen=True, slots=True)
class Touched:
    """N selection blocks that ranges of tokens touch: part [N] of blocks [N] of the cache, from token starts [N] on.

    keys [layers, N, select_block, Hkv, D], of which the first num_keys [N] stand below the range's end.
    """

    blocks: torch.Tensor
    part: torch.Tensor
    starts: torch.Tensor
    keys: torch.Tensor
    num_keys: torch.Tensor


def touched_blocks(
    storage: torch.Tensor,
    *,
    parts: int,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> Touched:
    """What describe describes, in torch. parts: selection blocks of a block of the cache."""
    block_size = storage.shape[3]
    select_block = block_size // parts
    touched = begins[:, None] // select_block
    touched = touched + torch.arange(most_touched(max_tokens, select_block), device=storage.device)
    rows, column = ((touched * select_block < ends[:, None]) & (begins < ends)[:, None]).nonzero(as_tuple=True)
    selected = touched[rows, column].long()
    blocks = block_tables[rows, selected // parts].long()
    starts = selected * select_block
    index = starts[:, None] + torch.arange(select_block, device=storage.device)
    slots = blocks[:, None] * block_size + index % block_size
    return Touched(
        blocks=blocks,
        part=selected % parts,
        starts=starts,
        keys=storage[:, 0].flatten(1, 2)[:, slots],
        num_keys=(ends[rows] - starts).clamp(max=select_block),
    )


def most_touched(max_tokens: int, select_block: int) -> int:
    """Selection blocks that so many neighbouring tokens touch at most."""
    return (max_tokens + select_block - 2) // select_block + 1

"""Writing to the paged KV cache. A slot is block * block_size + offset: one token's place in every layer's cache."""

import torch


def write_kv(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store each token's key and value at its slot; the caches are mutated.

    Shapes: key, value [T, Hkv, D]; key_cache, value_cache [num_blocks, block_size, Hkv, D]; slots [T] int64, distinct.
    """
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)


def move_kv(
    key_cache: torch.Tensor, value_cache: torch.Tensor, src_slots: torch.Tensor, dst_slots: torch.Tensor
) -> None:
    """Copy the entries at src_slots to dst_slots; the caches are mutated.

    Every read comes before the first write, so sources and destinations may overlap.
    Shapes: key_cache, value_cache [num_blocks, block_size, Hkv, D]; src_slots, dst_slots [M] int64, dst_slots distinct.
    """
    for cache in (key_cache, value_cache):
        entries = cache.flatten(0, 1)
        entries.index_copy_(0, dst_slots, entries.index_select(0, src_slots))

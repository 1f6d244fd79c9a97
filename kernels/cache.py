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


def move_kv(storage: torch.Tensor, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
    """Copy the entries at src_slots to dst_slots in every layer; the storage is mutated.

    Every read comes before the first write, so sources and destinations may overlap.
    Shapes: storage [layers, 2, num_blocks, block_size, Hkv, D], contiguous; src_slots, dst_slots [M] int64, dst_slots
    distinct.
    """
    entries = storage.flatten(2, 3)
    entries.index_copy_(2, dst_slots, entries.index_select(2, src_slots))

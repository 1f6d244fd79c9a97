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


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Norm and turn queries and keys, and store each token's key and value at its slot; the caches are mutated.

    q_norm, k_norm [D]: weights of an RMS norm over each head, as in Qwen3; None for none. cos, sin [P, R], in the
    model's dtype, are made by its own rotary embedding, for each position; the first R of a head's D dimensions turn,
    dimension d with d + R / 2. Rounds where transformers rounds.
    Shapes: qkv [T, (Hq + 2 Hkv) D], rows may be strided; positions, slots [T] int64; key_cache, value_cache
    [num_blocks, block_size, Hkv, D]. Tokens that share a slot leave one of their entries there. Returns: query
    [T, Hq, D].
    """
    if qkv.is_cuda:
        # only where it runs: importing triton settles whether kernels are interpreted
        from kernels.cache_triton import rope_and_write_triton

        write = rope_and_write_triton
    else:
        write = rope_and_write_reference
    return write(
        qkv,
        positions,
        cos,
        sin,
        slots,
        key_cache,
        value_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )


def rope_and_write_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """rope_and_write in torch."""
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, key_cache.shape[3])
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cosine, sine = cos[positions][:, None], sin[positions][:, None]
    query = _rotate(_norm(query, q_norm, eps), cosine, sine)
    key = _rotate(_norm(key, k_norm, eps), cosine, sine)
    write_kv(key, value, key_cache, value_cache, slots)
    return query


def _norm(heads: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMS norm of each head in float32, rounded before its weight. heads [T, H, D]."""
    if weight is None:
        return heads
    exact = heads.float()
    normed = exact * torch.rsqrt(exact.pow(2).mean(dim=2, keepdim=True) + eps)
    return weight * normed.to(heads.dtype)


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn the first R dimensions of each head. heads [T, H, D]; cosine, sine [T, 1, R]."""
    turning, rest = heads.split([cosine.shape[2], heads.shape[2] - cosine.shape[2]], dim=2)
    first, second = turning.chunk(2, dim=2)
    turned = turning * cosine + torch.cat((-second, first), dim=2) * sine
    return torch.cat((turned, rest), dim=2)


def move_kv(storage: torch.Tensor, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
    """Copy the entries at src_slots to dst_slots in every layer; the storage is mutated.

    Every read comes before the first write, so sources and destinations may overlap.
    Shapes: storage [layers, 2, num_blocks, block_size, Hkv, D], contiguous; src_slots, dst_slots [M] int64, dst_slots
    distinct.
    """
    entries = storage.flatten(2, 3)
    entries.index_copy_(2, dst_slots, entries.index_select(2, src_slots))


def compact(storage: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy the entries at src to dst in every layer, where a draft's accepted path closes up; the storage is mutated.

    A negative slot or src == dst is nothing to do. Within a row every read comes before the first write; rows touch
    slots of their own. On CUDA nothing synchronises.
    Shapes: storage [layers, 2, num_blocks, block_size, Hkv, D], contiguous; src, dst [B, M] int64, the rest of a row's
    dst distinct.
    """
    if storage.is_cuda:
        from kernels.cache_triton import compact_triton

        compact_triton(storage, src, dst)
    else:
        compact_reference(storage, src, dst)


def compact_reference(storage: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """compact in torch."""
    moves = (src != dst) & (src >= 0) & (dst >= 0)
    move_kv(storage, src[moves], dst[moves])

"""Attention over packed sequences (training) and over a paged cache (prefill, decode, verification of draft trees)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

# without cuDNN's: it plans every new shape anew, a millisecond of the host's time a layer, and every cycle's is new
SDPA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """N sequences end to end. cu_seqlens [N + 1] int32: where each begins, and the total."""

    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """B sequences whose new tokens, packed end to end, attend to a paged cache and to one another.

    Made by paged_sequences, once a forward; all layers share it. T new tokens, at most Q of one sequence. Keys stand in
    block-table order ("slot order"): the context, then the new tokens.
    context_lens [B] int32: tokens in the cache before this forward; slots [T] int64: where each new token's key and
    value are written.
    blocks [B * K] int64: the block of every run of block_size keys. pad [B * Q] and unpad [T] int64: packed index of
    each padded row and back; None where no sequence is padded. visible [B, 1, Q, K * block_size] bool, without any
    window. query_positions [B, 1, Q, 1] and key_positions [B, 1, 1, K * block_size] int32: distances in the sequence,
    by depth inside a tree, so that a window cuts a drafted path where it cuts the same tokens decoded one by one.
    """

    max_seqlen_q: int
    context_lens: torch.Tensor
    max_context: int
    slots: torch.Tensor
    blocks: torch.Tensor
    pad: torch.Tensor | None
    unpad: torch.Tensor | None
    visible: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor


def paged_sequences(
    *,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    context_lens: torch.Tensor,
    max_context: int,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    tree_mask: torch.Tensor | None = None,
) -> PagedSequences:
    """Compute what all layers share. Entries of block_tables past a sequence's last block may hold anything.

    tree_mask: which new tokens of its sequence each new token sees, itself included; None is causal.
    Shapes: cu_seqlens_q [B + 1] int32; block_tables [B, max_blocks] int32; tree_mask [B, Q, Q] bool; the rest as in
    PagedSequences.
    """
    device = slots.device
    num_sequences, num_tokens = context_lens.shape[0], slots.shape[0]
    # the longest context and the most new tokens may be of different sequences: at most this many keys
    num_blocks = min(-(-(max_context + max_seqlen_q) // block_size), block_tables.shape[1])
    query_lens = cu_seqlens_q.diff()
    context = context_lens[:, None, None]
    query_index = torch.arange(max_seqlen_q, dtype=torch.int32, device=device)
    key_index = torch.arange(num_blocks * block_size, dtype=torch.int32, device=device)
    new_index = key_index - context  # [B, 1, L]: index among the new tokens, negative in the context
    if tree_mask is None:
        visible = new_index <= query_index[:, None]
        query_positions = context + query_index[:, None]
        key_positions = key_index.expand(num_sequences, 1, -1)
    else:
        depth = tree_mask.sum(dim=2, dtype=torch.int32) - 1
        clamped = new_index.clamp(0, max_seqlen_q - 1).long()
        is_new = (new_index >= 0) & (new_index < query_lens[:, None, None])
        seen = tree_mask.gather(2, clamped.expand(-1, max_seqlen_q, -1))
        visible = (new_index < 0) | (is_new & seen)
        query_positions = context + depth[:, :, None]
        key_depth = depth[:, None, :].gather(2, clamped)
        key_positions = torch.where(is_new, context + key_depth, key_index)
    pad = unpad = None
    if num_tokens != num_sequences * max_seqlen_q:
        starts = cu_seqlens_q[:-1, None].long()
        pad = (starts + query_index).clamp(max=num_tokens - 1).flatten()
        sequence = torch.repeat_interleave(
            torch.arange(num_sequences, device=device), query_lens, output_size=num_tokens
        )
        offset = torch.arange(num_tokens, device=device) - cu_seqlens_q[:-1].long()[sequence]
        unpad = sequence * max_seqlen_q + offset
    used = torch.arange(num_blocks, device=device) * block_size < (context_lens + query_lens)[:, None]
    blocks = torch.where(used, block_tables[:, :num_blocks], 0).long().flatten()
    return PagedSequences(
        max_seqlen_q=max_seqlen_q,
        context_lens=context_lens,
        max_context=max_context,
        slots=slots,
        blocks=blocks,
        pad=pad,
        unpad=unpad,
        visible=visible[:, None],
        query_positions=query_positions[:, None],
        key_positions=key_positions[:, None],
    )


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqs: PackedSequences,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention inside each sequence, with gradients.

    sliding_window w lets a token see itself and the w - 1 before it. softcap c bends the scores to c tanh(score / c).
    Shapes: query [T, Hq, D]; key, value [T, Hkv, D]. Returns [T, Hq, D].
    """
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        groups = query.shape[1] // key.shape[1]
        output = varlen_attn(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            seqs.cu_seqlens,
            seqs.cu_seqlens,
            seqs.max_seqlen,
            seqs.max_seqlen,
            scale=scale,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        )
        assert isinstance(output, torch.Tensor)  # a tuple only where auxiliary outputs are asked for
        return output
    # one sequence at a time: no padding, whatever the mixture of lengths
    lengths = seqs.cu_seqlens.diff().tolist()
    pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    outputs = []
    for q, k, v in pieces:
        mask = None
        if softcap is not None or (sliding_window is not None and len(q) > sliding_window):
            index = torch.arange(len(q), device=q.device)
            distance = index[:, None] - index
            mask = distance >= 0
            if sliding_window is not None:
                mask &= distance < sliding_window
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(_attend(q, k, v, mask, scale=scale, softcap=softcap)[0].transpose(0, 1))
    return torch.cat(outputs)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of new tokens, whose keys and values are already written, to their sequences' cached ones.

    Shapes: query [T, Hq, D]; key_cache, value_cache [num_blocks, block_size, Hkv, D], finite everywhere.
    Returns [T, Hq, D].
    """
    num_sequences, max_query = seqs.context_lens.shape[0], seqs.max_seqlen_q
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_cache.shape[2]
    groups = num_heads // num_kv_heads
    mask = seqs.visible
    if sliding_window is not None and seqs.max_context + max_query > sliding_window:
        mask = mask & (seqs.query_positions - seqs.key_positions < sliding_window)
    padded = query if seqs.pad is None else query.index_select(0, seqs.pad)
    # the query heads that share a key head stand as rows beside one another: keys are never expanded
    rows = padded.view(num_sequences, max_query, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(num_sequences, num_kv_heads, groups * max_query, head_dim)
    if max_query > 1:
        mask = mask.repeat(1, 1, groups, 1)
    keys, values = (
        cache.index_select(0, seqs.blocks).view(num_sequences, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    output = _attend(rows, keys, values, mask, scale=scale, softcap=softcap)
    output = output.view(num_sequences, num_kv_heads, groups, max_query, head_dim).permute(0, 3, 1, 2, 4)
    output = output.reshape(num_sequences * max_query, num_heads, head_dim)
    return output if seqs.unpad is None else output.index_select(0, seqs.unpad)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention under a mask (True is visible), causal without one. query [B, Hq, Q, D]; key, value [B, Hkv, L, D]."""
    if softcap is None:
        # some of torch's kernels refuse the flag even where it changes nothing
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel(SDPA_KERNELS):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
    assert mask is not None
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    probs = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=3, dtype=torch.float32)
    return probs.to(value.dtype) @ value.repeat_interleave(groups, dim=1)

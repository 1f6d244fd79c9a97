"""Attention over packed sequences (training) and over a paged cache (prefill, decode, verification of draft trees)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

if TYPE_CHECKING:
    from kernels.attention_plan import Geometry, Plan

# without cuDNN's: it plans every new shape anew, a millisecond of the host's time a layer, and every cycle's is new
SDPA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """N sequences end to end. cu_seqlens [N + 1] int32: where each begins, and the total."""

    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class DenseMasks:
    """Who sees whom, written out over the padded batch: what the reference works on.

    blocks [B * K] int64: the block of every run of block_size keys. pad [B * Q] and unpad [T] int64: packed index of
    each padded row and back; None where no sequence is padded. visible [B, 1, Q, K * block_size] bool, without any
    window. query_positions [B, 1, Q, 1] and key_positions [B, 1, 1, K * block_size] int32 or int64.
    """

    blocks: torch.Tensor
    pad: torch.Tensor | None
    unpad: torch.Tensor | None
    visible: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """B sequences whose new tokens, packed end to end, attend to a paged cache and to one another.

    Made by paged_sequences, once a forward; all layers share it. T new tokens, at most Q of one sequence. Keys stand in
    block-table order ("slot order"): the context, then the new tokens.
    cu_seqlens_q [B + 1] int32: where each sequence's new tokens begin, and T; context_lens [B] int32: tokens in the
    cache before this forward, at most max_context; block_tables [B, W] int32, rows may be strided; slots [T] int64:
    where each new token's key and value are written.
    ancestors [T] int64, num_drafted [B] int32, positions [T] int64: trees, see paged_sequences.
    masks: on the CPU. plans: the GPU's work lists, one a geometry of heads and window, made by its first layer.
    """

    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    context_lens: torch.Tensor
    max_context: int
    block_tables: torch.Tensor
    slots: torch.Tensor
    block_size: int
    ancestors: torch.Tensor | None
    num_drafted: torch.Tensor | None
    positions: torch.Tensor | None
    masks: DenseMasks | None
    plans: "dict[Geometry, Plan]" = field(default_factory=dict)


def paged_sequences(
    *,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    context_lens: torch.Tensor,
    max_context: int,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    ancestors: torch.Tensor | None = None,
    num_drafted: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> PagedSequences:
    """Compute what all layers share. Entries of block_tables past a sequence's last block may hold any block.

    New tokens are causal, except that the last num_drafted of a sequence are draft nodes: node j sees everything before
    the first node, and the nodes whose bit is set in its ancestors, j itself included and none after it. Distances of a
    sliding window are differences of positions, so that it cuts a drafted path where it cuts the same tokens decoded
    one by one. Without trees ancestors and num_drafted are None, and positions need not be given.
    Where num_drafted exceeds the new tokens, the first nodes are in the cache already: context_lens counts them, and a
    window takes their indices for their positions.
    On CUDA nothing synchronises and no shape depends on data, so it may be captured; max_context may be any bound.
    Shapes: as in PagedSequences. A sequence drafts at most 63 nodes.
    """
    assert (ancestors is None) == (num_drafted is None)
    assert ancestors is None or positions is not None
    masks = None
    if not slots.is_cuda:
        masks = _dense_masks(
            cu_seqlens_q, max_seqlen_q, context_lens, max_context, block_tables, block_size,
            num_tokens=slots.shape[0], ancestors=ancestors, num_drafted=num_drafted, positions=positions,
        )  # fmt: skip
    return PagedSequences(
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        context_lens=context_lens,
        max_context=max_context,
        block_tables=block_tables,
        slots=slots,
        block_size=block_size,
        ancestors=ancestors,
        num_drafted=num_drafted,
        positions=positions,
        masks=masks,
    )


def _dense_masks(
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    context_lens: torch.Tensor,
    max_context: int,
    block_tables: torch.Tensor,
    block_size: int,
    *,
    num_tokens: int,
    ancestors: torch.Tensor | None,
    num_drafted: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> DenseMasks:
    device = context_lens.device
    num_sequences = context_lens.shape[0]
    # the longest context and the most new tokens may be of different sequences: at most this many keys
    num_blocks = min(-(-(max_context + max_seqlen_q) // block_size), block_tables.shape[1])
    query_lens = cu_seqlens_q.diff()
    context = context_lens[:, None, None]
    query_index = torch.arange(max_seqlen_q, dtype=torch.int32, device=device)
    key_index = torch.arange(num_blocks * block_size, dtype=torch.int32, device=device)
    new_index = key_index - context  # [B, 1, L]: index among the new tokens, negative in the context
    pad = unpad = None
    if num_tokens != num_sequences * max_seqlen_q:
        starts = cu_seqlens_q[:-1, None].long()
        pad = (starts + query_index).clamp(max=num_tokens - 1).flatten()
        sequence = torch.repeat_interleave(
            torch.arange(num_sequences, device=device), query_lens, output_size=num_tokens
        )
        offset = torch.arange(num_tokens, device=device) - cu_seqlens_q[:-1].long()[sequence]
        unpad = sequence * max_seqlen_q + offset
    if ancestors is None or num_drafted is None or positions is None:
        visible = new_index <= query_index[:, None]
        query_positions = context + query_index[:, None]
        key_positions = key_index.expand(num_sequences, 1, -1)
    else:
        if pad is not None:
            ancestors, positions = ancestors[pad], positions[pad]
        ancestors, positions = (x.view(num_sequences, max_seqlen_q, 1) for x in (ancestors, positions))
        first_node = (query_lens - num_drafted)[:, None, None]
        is_ancestor = (ancestors >> (query_index - first_node).clamp(0, 63)) & 1 > 0
        causal = query_index <= query_index[:, None]
        tree = torch.where(query_index[:, None] < first_node, causal, (query_index < first_node) | is_ancestor)
        clamped = new_index.clamp(0, max_seqlen_q - 1).long()
        is_new = (new_index >= 0) & (new_index < query_lens[:, None, None])
        visible = (new_index < 0) | (is_new & tree.gather(2, clamped.expand(-1, max_seqlen_q, -1)))
        if bool((num_drafted > query_lens).any()):
            on_path = (ancestors >> (new_index - first_node).clamp(0, 63)) & 1 > 0
            visible &= on_path | (new_index >= 0) | (new_index < first_node)
        query_positions = positions
        key_positions = torch.where(is_new, positions.transpose(1, 2).gather(2, clamped), key_index)
    used = torch.arange(num_blocks, device=device) * block_size < (context_lens + query_lens)[:, None]
    blocks = torch.where(used, block_tables[:, :num_blocks], 0).long().flatten()
    return DenseMasks(
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
    if not query.is_cuda:
        return paged_attention_reference(
            query, key_cache, value_cache, seqs, scale=scale, sliding_window=sliding_window, softcap=softcap
        )
    # only where it runs: importing triton settles whether kernels are interpreted
    from kernels.paged_attention import paged_attention_triton

    return paged_attention_triton(
        query, key_cache, value_cache, seqs, scale=scale, sliding_window=sliding_window, softcap=softcap
    )


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """paged_attention in torch, over the padded batch."""
    masks = seqs.masks
    assert masks is not None
    num_sequences, max_query = seqs.context_lens.shape[0], seqs.max_seqlen_q
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_cache.shape[2]
    groups = num_heads // num_kv_heads
    mask = masks.visible
    if sliding_window is not None and seqs.max_context + max_query > sliding_window:
        mask = mask & (masks.query_positions - masks.key_positions < sliding_window)
    padded = query if masks.pad is None else query.index_select(0, masks.pad)
    # the query heads that share a key head stand as rows beside one another: keys are never expanded
    rows = padded.view(num_sequences, max_query, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(num_sequences, num_kv_heads, groups * max_query, head_dim)
    if max_query > 1:
        mask = mask.repeat(1, 1, groups, 1)
    keys, values = (
        cache.index_select(0, masks.blocks).view(num_sequences, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    output = _attend(rows, keys, values, mask, scale=scale, softcap=softcap)
    output = output.view(num_sequences, num_kv_heads, groups, max_query, head_dim).permute(0, 3, 1, 2, 4)
    output = output.reshape(num_sequences * max_query, num_heads, head_dim)
    return output if masks.unpad is None else output.index_select(0, masks.unpad)


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

"""Attention over packed sequences (training) and over a paged cache (prefill, decode, verification of draft trees)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from kernels.attention_masks import DenseMasks, dense_masks

if TYPE_CHECKING:
    from kernels.attention_plan import Geometry, Plan
    from kernels.sparse_split import Grid, Room

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
    cu_seqlens_q [B + 1] int32: where each sequence's new tokens begin, and T; context_lens [B] int32: tokens in the
    cache before this forward, at most max_context; block_tables [B, W] int32, rows may be strided; slots [T] int64:
    where each new token's key and value are written.
    ancestors [T] int64, num_drafted [B] int32, positions [T] int64: trees, see paged_sequences.
    masks: on the CPU. plans: the GPU's work lists, one a geometry of heads and window, made by its first layer.
    rooms: likewise what launches over block lists leave one another.
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
    rooms: "dict[Grid, Room]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockMaxima:
    """What paged_attention leaves behind of its scores, scaled and capped as its softmax takes them; overwritten whole.

    scores [T, Hq, NB] float32: the largest score of each selection block (select_block keys in slot order; it divides
    the cache's block size, and on a GPU is a power of two up to 128), -inf where nothing in it is visible; no key past
    the NB blocks may be visible. lse [T, Hq] float32: the logarithm of the sum of the exponentials of all scores.
    exp(scores - lse): a block's largest weight.
    """

    scores: torch.Tensor
    lse: torch.Tensor
    select_block: int


def most_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Rows (new tokens times query heads a key head) that the GPU's attention over a cache computes together, at most.

    A token's query heads of one key head are never parted: more of them it cannot serve.
    """
    if dtype.itemsize == 4:
        return 32  # exact float32 products take no tensor cores; small steps keep them in registers
    return 64 if head_dim > 128 else 128


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
        masks = dense_masks(
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
        outputs.append(attend(q, k, v, mask, scale=scale, softcap=softcap)[0].transpose(0, 1))
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
    maxima: BlockMaxima | None = None,
) -> torch.Tensor:
    """Attention of new tokens, whose keys and values are already written, to their sequences' cached ones.

    maxima: written too, where given; not with a sliding window.
    Shapes: query [T, Hq, D]; key_cache, value_cache [num_blocks, block_size, Hkv, D], finite everywhere.
    Returns [T, Hq, D].
    """
    if not query.is_cuda:
        return paged_attention_reference(
            query, key_cache, value_cache, seqs,
            scale=scale, sliding_window=sliding_window, softcap=softcap, maxima=maxima,
        )  # fmt: skip
    # only where it runs: importing triton settles whether kernels are interpreted
    from kernels.paged_attention import paged_attention_triton

    return paged_attention_triton(
        query, key_cache, value_cache, seqs,
        scale=scale, sliding_window=sliding_window, softcap=softcap, maxima=maxima,
    )  # fmt: skip


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    maxima: BlockMaxima | None = None,
) -> torch.Tensor:
    """paged_attention in torch, over the padded batch."""
    masks = seqs.masks
    assert masks is not None
    num_kv_heads = key_cache.shape[2]
    mask = masks.visible
    if sliding_window is not None and seqs.max_context + seqs.max_seqlen_q > sliding_window:
        mask = mask & (masks.query_positions - masks.key_positions < sliding_window)
    if seqs.max_seqlen_q > 1:
        mask = mask.repeat(1, 1, query.shape[1] // num_kv_heads, 1)
    rows, keys, values = masks.rows(query, num_kv_heads), masks.cached(key_cache), masks.cached(value_cache)
    if maxima is not None:
        assert sliding_window is None
        _write_maxima(rows, keys, mask, masks, maxima, scale=scale, softcap=softcap)
    return masks.tokens(attend(rows, keys, values, mask, scale=scale, softcap=softcap))


def _write_maxima(
    rows: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor,
    masks: DenseMasks,
    maxima: BlockMaxima,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    scores = rows.float() @ keys.float().transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = masks.tokens(scores.masked_fill(~mask, -torch.inf))
    maxima.lse.copy_(scores.logsumexp(dim=2))
    blocks = scores.unflatten(2, (-1, maxima.select_block)).amax(dim=3)[:, :, : maxima.scores.shape[2]]
    maxima.scores.fill_(-torch.inf)
    maxima.scores[:, :, : blocks.shape[2]] = blocks


def attend(
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

"""Causal attention that also says how much each token wants each block of keys: what gates learn from.

A block is select_block tokens of one sequence, counted from its begin. The largest attention weight that a token's
query head gives a key of a block is exp(scores - lse), which block_weights pools over the heads of a group.
Source: SeerAttention-R (arXiv 2506.08889) sec. 3.2.
"""

import torch

from kernels.attention import PackedSequences

CHUNK_ELEMENTS = 1 << 25  # float32 scores of one chunk of the reference's query tokens: 128 MB


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqs: PackedSequences,
    *,
    scale: float,
    select_block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As packed_attention, without gradients, and what block_weights needs.

    select_block: on a GPU a power of two, 16 or more.
    Shapes: query [T, Hq, D]; key, value [T, Hkv, D]. NB blocks of the longest sequence. Returns the output [T, Hq, D],
    the largest scaled score in each block [T, Hq, NB] float32, -inf where a token sees none of its keys, and the
    log-sum-exp of all a token's scores [T, Hq] float32.
    """
    if not query.is_cuda:
        return pooled_attention_reference(query, key, value, seqs, scale=scale, select_block=select_block)
    # only where it runs: importing triton settles whether kernels are interpreted
    from kernels.pooled_attention_triton import pooled_attention_triton

    return pooled_attention_triton(query, key, value, seqs, scale=scale, select_block=select_block)


def block_weights(scores: torch.Tensor, lse: torch.Tensor, *, num_kv_heads: int) -> torch.Tensor:
    """The largest attention weight that a token gives a key of each block, over the query heads of each key head.

    Shapes: scores [T, Hq, NB] and lse [T, Hq], of pooled_attention or of a verification. Returns [T, Hkv, NB] float32.
    """
    return (scores - lse[:, :, None]).unflatten(1, (num_kv_heads, -1)).amax(dim=2).exp()


@torch.no_grad()
def pooled_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqs: PackedSequences,
    *,
    scale: float,
    select_block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pooled_attention in torch, a chunk of one sequence's query tokens at a time."""
    num_tokens, num_heads, _ = query.shape
    num_kv_heads = key.shape[1]
    num_blocks = -(-seqs.max_seqlen // select_block)
    output = torch.empty_like(query)
    scores = torch.full((num_tokens, num_heads, num_blocks), -torch.inf, device=query.device)
    lse = torch.empty(num_tokens, num_heads, device=query.device)
    bounds = seqs.cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        rows = max(1, CHUNK_ELEMENTS // (num_heads * max(1, end - begin)))
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            # keys after the last of these tokens are seen by none
            keys, values = key[begin:last].float(), value[begin:last].float()
            grouped = query[first:last].float().unflatten(1, (num_kv_heads, -1))
            index = torch.arange(begin, last, device=query.device)
            unseen = index > index[first - begin :, None, None, None]
            row = (torch.einsum("qhgd,khd->qhgk", grouped, keys) * scale).masked_fill(unseen, -torch.inf)
            attended = torch.einsum("qhgk,khd->qhgd", row.softmax(dim=3), values)
            output[first:last] = attended.flatten(1, 2).to(output.dtype)
            lse[first:last] = row.logsumexp(dim=3).flatten(1)
            whole = -(-(last - begin) // select_block) * select_block
            blocks = torch.nn.functional.pad(row.flatten(1, 2), (0, whole - (last - begin)), value=-torch.inf)
            scores[first:last, :, : whole // select_block] = blocks.unflatten(2, (-1, select_block)).amax(dim=3)
    return output, scores, lse

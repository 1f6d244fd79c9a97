"""Who attends to whom in a paged cache, written out over the padded batch: the definition of what kernels compute."""

from dataclasses import dataclass

import torch


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

    def rows(self, query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """query [T, Hq, D] as [B, Hkv, G * Q, D]: heads that share a key head are rows, keys are never expanded."""
        num_sequences, _, max_query, _ = self.visible.shape
        padded = query if self.pad is None else query.index_select(0, self.pad)
        rows = padded.view(num_sequences, max_query, num_kv_heads, -1, query.shape[2]).permute(0, 2, 3, 1, 4)
        return rows.reshape(num_sequences, num_kv_heads, -1, query.shape[2])

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of rows, for any last dimension: [B, Hkv, G * Q, X] to [T, Hq, X]."""
        num_sequences, num_kv_heads, _, width = rows.shape
        max_query = self.visible.shape[2]
        tokens = rows.view(num_sequences, num_kv_heads, -1, max_query, width).permute(0, 3, 1, 2, 4)
        tokens = tokens.reshape(num_sequences * max_query, -1, width)
        return tokens if self.unpad is None else tokens.index_select(0, self.unpad)

    def cached(self, cache: torch.Tensor) -> torch.Tensor:
        """cache [num_blocks, block_size, Hkv, D] as [B, Hkv, K * block_size, D], in block-table order."""
        keys = cache.index_select(0, self.blocks).view(self.visible.shape[0], -1, *cache.shape[2:])
        return keys.transpose(1, 2)


def dense_masks(
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
    """The masks of B sequences' T new tokens, as paged_sequences describes them; its arguments are passed on."""
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

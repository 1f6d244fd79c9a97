"""The selector that goes by trained gates."""

import torch

from drafter.gate import Gates
from kernels.attention import PagedSequences
from kernels.describe import most_touched
from kernels.select import BlockLists, Choice, choose_blocks, mean_scores
from rollout.model import PagedCache

AT_ONCE = 512  # blocks whose keys are compressed together: each is copied, in float32


class GateSelector:
    """Picks by SeerAttention-R's trained gates (drafter/gate.py).

    descriptors [layers, num_blocks + 1, parts, Hkv, Dg]: the compressed keys of the attached cache.
    """

    def __init__(self, gates: Gates, choice: Choice) -> None:
        config = gates.config
        self.select_block = config.select_block
        self.share_of_cache = config.gate_dim / (2 * config.head_dim * config.select_block)
        self.descriptors = torch.empty(0)
        self._gates = gates
        self._choice = choice
        self._scale = config.gate_dim**-0.5

    def attach(self, cache: PagedCache, *, num_texts: int, table_width: int) -> None:
        """Room for compressed keys of this cache."""
        layers, _, num_blocks, block_size, num_kv_heads, _ = cache.storage.shape
        parts = block_size // self.select_block
        self.descriptors = cache.storage.new_zeros(layers, num_blocks, parts, num_kv_heads, self._gates.config.gate_dim)

    def release(self) -> None:
        """Keep no descriptors."""
        self.descriptors = torch.empty(0)

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Compress the blocks that these keys touch."""
        touched = most_touched(most, self.select_block)
        at_once = max(1, AT_ONCE // touched)  # rows
        for each in zip(block_tables.split(at_once), begins.split(at_once), ends.split(at_once), strict=True):
            self._compress(storage, *each, touched)

    def _compress(
        self, storage: torch.Tensor, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Compress the blocks from that of each begin on, at most `most`, up to that of its end."""
        block_size, size = storage.shape[3], self.select_block
        parts = block_size // size
        touched = begins[:, None] // size + torch.arange(most, device=storage.device)
        is_touched = (touched * size < ends[:, None]) & (begins < ends)[:, None]
        column = (touched // parts).clamp(max=block_tables.shape[1] - 1).long()
        # what is not touched is read from and written to nobody's block
        blocks = torch.where(is_touched, block_tables.gather(1, column), storage.shape[2] - 1).flatten().long()
        part, starts = (touched % parts).flatten().long(), (touched * size).flatten().long()
        num_valid = (ends[:, None] - touched * size).clamp(1, size).flatten()
        keys = storage[:, 0].unflatten(2, (parts, size))[:, blocks, part]
        self.descriptors[:, blocks, part] = self._gates.compress_layers(keys, starts, num_valid)

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, text: torch.Tensor
    ) -> BlockLists:
        """The blocks that the layer's gate wants most; under a threshold, by their softmax over complete blocks."""
        merged = self._gates.merge(layer, query, positions)
        scores = mean_scores(merged, self.descriptors[layer], seqs)
        if self._choice.threshold is not None:
            index = torch.arange(scores.shape[2], device=scores.device)
            complete = index < (seqs.context_lens // self.select_block)[:, None, None]
            scores = (scores * self._scale).masked_fill(~complete, -torch.inf).softmax(dim=2).nan_to_num(0.0)
        return choose_blocks(scores, seqs, self._choice, select_block=self.select_block)

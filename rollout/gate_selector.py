"""The selector that goes by trained gates."""

import torch

from drafter.gate import Gates
from kernels.attention import PagedSequences
from kernels.gate import compress, empty_compressed, gate_choose
from kernels.select import BlockLists, Choice


class GateSelector:
    """Picks by SeerAttention-R's gates (drafter/gate.py), which are read where they are.

    gates: of all of the policy's layers; it picks in these. descriptors: as kernels.gate.empty_compressed makes them,
    of the attached storage, in this dtype or, without one, the gates'. Under a threshold a block's score is its share
    of the softmax over the complete blocks.
    """

    def __init__(self, gates: Gates, choice: Choice, *, layers: range, dtype: torch.dtype | None = None) -> None:
        config = gates.config
        weights = gates.weights()
        smaller = 1 if dtype is None else dtype.itemsize / weights.key_weight.dtype.itemsize
        self.select_block = config.select_block
        self.share_of_cache = smaller * config.gate_dim / (2 * config.head_dim * config.select_block)
        self.descriptors = torch.empty(0)
        self.gates = gates
        self._weights = weights.of(layers)
        self._dtype = dtype
        self._choice = choice

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        """Room for compressed keys of this cache."""
        self.descriptors = empty_compressed(self._weights, storage, select_block=self.select_block, dtype=self._dtype)

    def release(self) -> None:
        """Keep no descriptors."""
        self.descriptors = torch.empty(0)

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Compress the blocks that these keys touch."""
        compress(
            self._weights,
            storage,
            self.descriptors,
            block_tables=block_tables,
            begins=begins,
            ends=ends,
            max_tokens=most,
        )

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        """The blocks that the layer's gate wants most."""
        return gate_choose(self._weights, layer, query, positions, self.descriptors[layer], seqs, self._choice)

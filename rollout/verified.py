"""The selector that goes by what was attended to: dense attention leaves its largest weights for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np
import torch
from transformers import PretrainedConfig

from kernels.attention import BlockMaxima, PagedSequences, paged_attention
from kernels.describe import most_touched
from kernels.select import BlockLists, Choice, choose_blocks, num_selection_blocks, verified_scores
from kernels.upload import upload
from rollout.model import kv_shape

CHOSEN_FROM = 1 << 23  # weights that lists are made of at once: 32 MiB are copied


class VerifiedSelector:
    """Picks what the last dense forward of a text attended to most, the same for all that is drafted until the next.

    A block scores the logarithm of its largest weight. Source: PillarAttn (arXiv 2512.01278).
    weights [layers, rows + 1, Hkv, blocks] float32: those logarithms, in a slot for each text that is being written and
    one for rows that are nobody's. A text that is written no more has lost its own.
    """

    share_of_cache = 0.0

    def __init__(self, choice: Choice, *, select_block: int) -> None:
        self.select_block = select_block
        self.weights = torch.empty(0)
        self._slot_of = torch.empty(0)  # [texts] int64
        self._slots: dict[int, int] = {}  # of the texts that are being written
        self._choice = replace(choice, threshold=log(choice.threshold) if choice.threshold else None)

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        """Room for what a text on each row attends to."""
        layers, _, _, block_size, num_kv_heads, _ = storage.shape
        blocks = table_width * (block_size // self.select_block)
        device = storage.device
        self.weights = torch.zeros(layers, num_rows + 1, num_kv_heads, blocks, device=device)
        self._slot_of = torch.full((num_texts,), num_rows, dtype=torch.int64, device=device)
        self._slots.clear()

    def release(self) -> None:
        """Keep no weights."""
        self.weights = self._slot_of = torch.empty(0)

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """The keys say nothing."""

    def begin(self, texts: Sequence[int], *, beside: Sequence[int]) -> None:
        """All blocks are as good until the first verification."""
        self._slots = {text: self._slots[text] for text in beside}
        free = sorted({*range(self.weights.shape[1] - 1)}.difference(self._slots.values()))
        slots = free[: len(texts)]
        self._slots.update(zip(texts, slots, strict=True))
        of_texts, at = upload(self.weights.device, np.array(texts, dtype=np.int64), np.array(slots, dtype=np.int64))
        self._slot_of.index_copy_(0, of_texts, at)
        self.weights.index_fill_(1, at, 0.0)

    def kept(self, text: torch.Tensor) -> torch.Tensor:
        """The slots of these texts."""
        return self._slot_of.index_select(0, text)

    def watch(self, kept: torch.Tensor) -> "Watched":
        """Dense attention that leaves its largest weights here."""
        return Watched(self.weights, kept, self.select_block)

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        """The blocks of the largest weights."""
        return choose_blocks(self.weights[layer, kept], seqs, self._choice, select_block=self.select_block)

    def hold(self, seqs: PagedSequences, kept: torch.Tensor) -> list[BlockLists]:
        """Lists of all layers at once, which hold every block that the new tokens fill."""
        lists: list[BlockLists] = []
        always = self._choice.sinks + self._choice.recent + most_touched(seqs.max_seqlen_q, self.select_block)
        choice = replace(self._choice, max_blocks=max(self._choice.max_blocks, always))
        num_rows, (num_kv_heads, num_blocks) = len(kept), self.weights.shape[2:]
        together = max(1, CHOSEN_FROM // (num_rows * num_kv_heads * num_blocks))
        for weights in self.weights.split(together):
            chosen = choose_blocks(
                weights.index_select(1, kept).flatten(0, 1),
                _repeated(seqs, len(weights)),
                choice,
                select_block=self.select_block,
            )
            rows = zip(chosen.blocks.split(num_rows), chosen.counts.split(num_rows), strict=True)
            lists += [BlockLists(blocks, counts, self.select_block, held=True) for blocks, counts in rows]
        return lists


def _repeated(seqs: PagedSequences, times: int) -> PagedSequences:
    """The sequences so many times over, as far as lists go by them."""
    num_rows = len(seqs.context_lens)
    bounds = torch.arange(times * num_rows + 1, dtype=torch.int32, device=seqs.context_lens.device)
    return replace(seqs, context_lens=seqs.context_lens.repeat(times), cu_seqlens_q=bounds * seqs.max_seqlen_q)


def weight_bytes(model_config: PretrainedConfig, *, num_layers: int, num_rows: int, num_blocks: int) -> int:
    """What so many layers keep of the texts of so many rows, and of nobody's, of so many selection blocks each."""
    _, num_kv_heads, _ = kv_shape(model_config)
    return num_layers * (num_rows + 1) * num_kv_heads * num_blocks * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class Watched:
    """Dense attention of rows, whose largest weights are kept in these slots: LayerAttention."""

    weights: torch.Tensor
    kept: torch.Tensor
    select_block: int

    def takes(self, layer: int) -> bool:
        """Every layer is watched."""
        return True

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        positions: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        seqs: PagedSequences,
        *,
        scale: float,
    ) -> torch.Tensor:
        """Over everything."""
        attended, maxima = attend_and_watch(
            query, key_cache, value_cache, seqs, scale=scale, select_block=self.select_block
        )
        verified_scores(maxima, seqs, self.weights[layer], self.kept)
        return attended


def attend_and_watch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seqs: PagedSequences,
    *,
    scale: float,
    select_block: int,
) -> tuple[torch.Tensor, BlockMaxima]:
    """Dense attention [T, Hq, D], and the largest scores in the selection blocks."""
    num_tokens, num_heads, _ = query.shape
    num_blocks = num_selection_blocks(seqs, select_block)
    maxima = BlockMaxima(
        scores=torch.empty(num_tokens, num_heads, num_blocks, device=query.device),
        lse=torch.empty(num_tokens, num_heads, device=query.device),
        select_block=select_block,
    )
    attended = paged_attention(
        query, key_cache, value_cache, seqs, scale=scale, sliding_window=None, softcap=None, maxima=maxima
    )
    return attended, maxima

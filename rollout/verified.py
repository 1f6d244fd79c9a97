"""The selector that goes by what was attended to: dense attention leaves its largest weights for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np
import torch
from transformers import PretrainedConfig

from kernels.attention import BlockMaxima, PagedSequences, paged_attention
from kernels.select import BlockLists, Choice, choose_blocks, num_selection_blocks, verified_scores
from kernels.upload import upload
from rollout.model import PagedCache, kv_shape


class VerifiedSelector:
    """Picks what the last dense forward of a text attended to most, the same for all that is drafted until the next.

    A block scores the logarithm of its largest weight. Source: PillarAttn (arXiv 2512.01278).
    weights [layers, texts, Hkv, blocks] float32: those logarithms, of the attached texts.
    """

    share_of_cache = 0.0

    def __init__(self, choice: Choice, *, select_block: int) -> None:
        self.select_block = select_block
        self.weights = torch.empty(0)
        self._choice = replace(choice, threshold=log(choice.threshold) if choice.threshold else None)

    def attach(self, cache: PagedCache, *, num_texts: int, table_width: int) -> None:
        """Room for what these texts attend to."""
        layers, _, _, block_size, num_kv_heads, _ = cache.storage.shape
        blocks = table_width * (block_size // self.select_block)
        self.weights = torch.zeros(layers, num_texts, num_kv_heads, blocks, device=cache.storage.device)

    def release(self) -> None:
        """Keep no weights."""
        self.weights = torch.empty(0)

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """The keys say nothing."""

    def begin(self, texts: Sequence[int]) -> None:
        """All blocks are as good until the first verification."""
        (at,) = upload(self.weights.device, np.array(texts, dtype=np.int64))
        self.weights.index_fill_(1, at, 0.0)

    def watch(self, text: torch.Tensor) -> "Watched":
        """Dense attention that leaves its largest weights here."""
        return Watched(self.weights, text, self.select_block)

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, text: torch.Tensor
    ) -> BlockLists:
        """The blocks of the largest weights."""
        return choose_blocks(self.weights[layer, text], seqs, self._choice, select_block=self.select_block)


def weight_bytes(model_config: PretrainedConfig, *, num_texts: int, num_blocks: int) -> int:
    """What is kept of so many texts, of so many selection blocks each."""
    layers, num_kv_heads, _ = kv_shape(model_config)
    return layers * num_texts * num_kv_heads * num_blocks * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class Watched:
    """Dense attention of the rows that write these texts, whose largest weights are kept: LayerAttention."""

    weights: torch.Tensor
    text: torch.Tensor
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
        scores = verified_scores(maxima, seqs, num_kv_heads=key_cache.shape[2])
        self.weights[layer, :, :, : scores.shape[2]].index_copy_(0, self.text, scores)
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

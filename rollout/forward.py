"""A cycle's middle: from what rows forward to what is sampled after each of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drafter.types import Rows
from kernels.attention import PagedSequences, paged_sequences
from kernels.cycle import CycleInputs
from kernels.sample import sample
from rollout.decoder import Decoder
from rollout.fused import LayerAttention
from rollout.model import PagedCache
from rollout.residency import Residency
from rollout.types import Sampling


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a forward of T tokens gave. token_ids [T] int64 and logprobs [T] float32 of those sampled after each.

    logits [T, V]: what that was from. hidden [T, H]: after the final norm. aux: the residual stream where it enters
    each of the layers asked for.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    aux: tuple[torch.Tensor, ...]


class RowForward:
    """Forwards rows and samples after each of their tokens, under one sampling transform.

    identity: of what a call launches, beside its arguments: part of the name of a graph that holds one.
    """

    def __init__(
        self, decoder: Decoder, cache: PagedCache, sampling: Sampling, *, residency: Residency, block_size: int
    ) -> None:
        self.cache = cache
        self.block_size = block_size
        self.stop_ids = residency.stop_ids(sampling.stop_token_ids)
        self._decoder = decoder
        self._residency = residency
        self._transform = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self.identity = (self._transform, sampling.stop_token_ids, sampling.under)

    def __call__(
        self,
        rows: Rows,
        inputs: CycleInputs,
        *,
        num_rows: int,
        num_nodes: int,
        aux_layers: Sequence[int] = (),
        attention: LayerAttention | None = None,
    ) -> Drawn:
        """Forward what prepare gave for the first rows, each with so many drafted nodes; keys and values are cached.

        attention: in place of the dense one. Nothing synchronises on a GPU.
        """
        residency = self._residency
        seqs = paged_sequences(
            cu_seqlens_q=residency.cu_seqlens(num_rows, 1 + num_nodes),
            max_seqlen_q=1 + num_nodes,
            context_lens=inputs.context_lens,
            max_context=self._max_context(inputs.context_lens),
            block_tables=rows.block_tables[:num_rows],
            slots=inputs.slots,
            block_size=self.block_size,
            positions=inputs.positions,
            ancestors=inputs.ancestors if num_nodes else None,
            num_drafted=inputs.num_drafted if num_nodes else None,
        )
        hidden, aux = self._decoder.forward_with_aux(
            inputs.token_ids, inputs.positions, seqs, self.cache, aux_layers, attention
        )
        temperature, top_k, top_p, min_p = self._transform
        logits = self._decoder.logits(hidden)
        token_ids, logprobs = sample(
            logits,
            inputs.keys,
            inputs.sample_positions,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        return Drawn(token_ids, logprobs, logits, hidden, aux)

    def sequences(self, rows: Rows, context_lens: torch.Tensor, *, num_rows: int, num_new: int) -> PagedSequences:
        """The first rows with so many new tokens each, which are forwarded elsewhere: no slots are theirs here."""
        return PagedSequences(
            cu_seqlens_q=self._residency.cu_seqlens(num_rows, num_new),
            max_seqlen_q=num_new,
            context_lens=context_lens,
            max_context=self._max_context(context_lens),
            block_tables=rows.block_tables[:num_rows],
            slots=context_lens.new_empty(0, dtype=torch.int64),
            block_size=self.block_size,
            ancestors=None,
            num_drafted=None,
            positions=None,
            masks=None,
        )

    def _max_context(self, context_lens: torch.Tensor) -> int:
        """A bound: a captured forward must be right for any; an eager one on a CPU is dearer the wider it looks."""
        on_cpu = self.cache.storage.device.type == "cpu"
        return int(context_lens.max()) if on_cpu else self._residency.max_length

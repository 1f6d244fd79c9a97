"""Attention to the blocks of the KV cache that are worth reading: who picks them, and forwards that attend so.

What a selector knows of the cached keys (descriptors of their blocks, what was attended to) lies beside the cache. It
is updated when tokens are committed, from committed keys alone: a draft that was rejected leaves no trace in it. Those
of sparse.mode=plain are approximate; all others were computed densely.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from drafter.types import Rows
from kernels.attention import PagedSequences
from kernels.cycle import CycleInputs
from kernels.select import BlockLists
from kernels.sparse_attention import sparse_attention
from rollout.forward import Drawn, RowForward
from rollout.fused import LayerAttention
from rollout.gate_sampler import GateSampler
from rollout.lowbit import LowBitPolicy
from rollout.model import PagedCache


class Selector(Protocol):
    """Picks the selection blocks that sequences' new tokens read, layer by layer (rollout/selectors.py).

    It knows some neighbouring layers of a cache, or all of them: storage is theirs, and they are numbered from 0.
    select_block: tokens in one, which divides the cache's block size. share_of_cache: what it keeps of each block,
    relative to the bytes of the block's keys and values.
    """

    select_block: int
    share_of_cache: float

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        """Select from this storage of a PagedCache from now on: nothing is cached.

        For so many texts of at most table_width blocks, num_rows of which are written at a time.
        """

    def release(self) -> None:
        """The cache is gone: keep nothing beside it."""

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Keys of token indices [begin, end) were committed, at most `most` a row: know the blocks they touch anew.

        Captured in CUDA graphs: no host synchronisation. Shapes: as in kernels.describe.describe.
        """

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        """The blocks to read. query [T, Hq, D] after rotary embedding; positions [T] int64.

        kept [B]: where a WatchingSelector keeps what it knows of the rows' texts; nothing to another one. Captured in
        CUDA graphs: no host synchronisation.
        """


@runtime_checkable
class WatchingSelector(Protocol):
    """A selector that goes by what dense forwards attend to."""

    def begin(self, texts: Sequence[int], *, beside: Sequence[int]) -> None:
        """Sequences start to write these texts: nothing is known of what they attend to. beside: the other texts that
        are written now; of all further ones nothing is kept."""

    def kept(self, text: torch.Tensor) -> torch.Tensor:
        """Where it keeps what it knows of the texts that rows write, [B] int32: [B] int64."""

    def watch(self, kept: torch.Tensor) -> LayerAttention:
        """Dense attention of these rows, which keeps there what the selector goes by."""


@runtime_checkable
class HoldingSelector(Protocol):
    """A selector whose lists hold for all that is drafted until the next verification."""

    def hold(self, seqs: PagedSequences, kept: torch.Tensor) -> Sequence[BlockLists]:
        """The blocks to read of each layer, whichever of the new tokens is forwarded. seqs: as if all were at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring layers that attend sparsely, and their selector, which numbers them from 0 and knows their keys."""

    layers: range
    selector: Selector

    def of(self, storage: torch.Tensor) -> torch.Tensor:
        """The layers' share of a cache's storage."""
        return storage[self.layers.start : self.layers.stop]


class SparseAttention:
    """A policy's sparse attention: parts that share no layer, and one cache at a time. Other layers attend densely.

    What a forward under it writes to the cache is approximate, as is what it computes.
    lowbit: the weights that drafts read; None: the policy's own. sampler: keeps what gates learn from; None where they
    do not learn.
    """

    def __init__(
        self, parts: Sequence[Part], *, lowbit: LowBitPolicy | None = None, sampler: GateSampler | None = None
    ) -> None:
        self.parts = tuple(parts)
        self.sampler = sampler
        self.lowbit = lowbit
        self._attached: tuple[PagedCache, int, int, int] | None = None

    def share_of_cache(self, num_layers: int) -> float:
        """What is kept of each block of a cache of so many layers, relative to the bytes of its keys and values."""
        return sum(len(part.layers) * part.selector.share_of_cache for part in self.parts) / num_layers

    def part_of(self, layer: int) -> Part | None:
        """Where a layer belongs; None: it attends densely."""
        return next((part for part in self.parts if layer in part.layers), None)

    def attach(self, cache: PagedCache, *, num_texts: int, num_rows: int, table_width: int) -> bool:
        """Attend to this cache from now on.

        Returns whether all that is cached stays known: where False, nobody may find what was cached before.
        """
        attached = (cache, num_texts, num_rows, table_width)
        if self._attached is not None and self._attached[0] is cache and self._attached[1:] == attached[1:]:
            return True
        self.release()  # before more is allocated
        # written in inference mode and outside of it
        with torch.inference_mode(False):
            for part in self.parts:
                part.selector.attach(
                    part.of(cache.storage), num_texts=num_texts, num_rows=num_rows, table_width=table_width
                )
        self._attached = attached
        return False

    def release(self) -> None:
        """Keep nothing: the cache is gone."""
        self._attached = None
        for part in self.parts:
            part.selector.release()

    def begin(self, texts: Sequence[int], *, beside: Sequence[int] = ()) -> None:
        """Sequences start to write these texts, and others write those beside."""
        for part in self.parts:
            if texts and isinstance(part.selector, WatchingSelector):
                part.selector.begin(texts, beside=beside)

    def forward(self, rows: Rows, num_rows: int, *, ahead: PagedSequences | None = None) -> LayerAttention:
        """The attention of a forward of the first rows. ahead: of all the tokens of a draft, forwarded one by one."""
        text = rows.text[:num_rows]
        selected: list[tuple[range, LayerAttention]] = []
        for part in self.parts:
            known, held = kept(part.selector, text), None
            if ahead is not None and isinstance(part.selector, HoldingSelector):
                held = part.selector.hold(ahead, known)
            selected.append((part.layers, _Selected(part.selector, known, held)))
        return _InParts(tuple(selected))

    def watch(self, rows: Rows, num_rows: int, *, beside: LayerAttention | None = None) -> LayerAttention | None:
        """What a dense forward of the first rows attends with for the selectors' sake; None: as it does anyway.

        beside: what it attends with in other layers.
        """
        text = rows.text[:num_rows]
        watched = [
            (part.layers, part.selector.watch(kept(part.selector, text)))
            for part in self.parts
            if isinstance(part.selector, WatchingSelector)
        ]
        if beside is not None:
            assert self._attached is not None
            watched.append((range(len(self._attached[0].storage)), beside))
        return _InParts(tuple(watched)) if watched else None

    def commit(self, rows: Rows, inputs: CycleInputs, counts: torch.Tensor, *, most: int) -> None:
        """Each row committed so many tokens of a cycle, whose keys are at their places: they are known now.

        counts [B] int32, at most `most`. The last of them is pending: its key is not cached.
        """
        begins = inputs.context_lens
        tables = rows.block_tables[: len(counts)]
        self.describe(block_tables=tables, begins=begins, ends=begins + counts, most=most)

    def prefilled(self, seqs: PagedSequences) -> None:
        """The new tokens of a forward are cached: they are known now. seqs: of that forward, without drafts."""
        assert seqs.num_drafted is None
        begins = seqs.context_lens
        self.describe(
            block_tables=seqs.block_tables,
            begins=begins,
            ends=begins + seqs.cu_seqlens_q.diff(),
            most=seqs.max_seqlen_q,
        )

    def describe(self, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int) -> None:
        """Selector.describe of every part."""
        assert self._attached is not None
        storage = self._attached[0].storage
        for part in self.parts:
            part.selector.describe(part.of(storage), block_tables=block_tables, begins=begins, ends=ends, most=most)


def kept(selector: Selector, text: torch.Tensor) -> torch.Tensor:
    """What a selector is given of rows that write these texts in Selector.select."""
    return selector.kept(text) if isinstance(selector, WatchingSelector) else text


@dataclass(frozen=True, slots=True)
class _InParts:
    """Each attention in its layers, which it numbers from 0: LayerAttention. The first that takes a layer has it."""

    parts: tuple[tuple[range, LayerAttention], ...]

    def takes(self, layer: int) -> bool:
        """Whether any does."""
        return self._of(layer) is not None

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
        """As the layer's own does."""
        found = self._of(layer)
        assert found is not None, f"layer {layer} attends densely"
        first, attention = found
        return attention.attend(layer - first, query, positions, key_cache, value_cache, seqs, scale=scale)

    def _of(self, layer: int) -> tuple[int, LayerAttention] | None:
        """A layer's attention, and the first layer of its part."""
        for layers, attention in self.parts:
            if layer in layers and attention.takes(layer - layers.start):
                return layers.start, attention
        return None


@dataclass(frozen=True, slots=True)
class _Selected:
    """Attention of one forward to what a selector picks, in all of its layers: rollout.fused.LayerAttention.

    held: of each layer, what was picked before.
    """

    selector: Selector
    kept: torch.Tensor
    held: Sequence[BlockLists] | None

    def takes(self, layer: int) -> bool:
        """Every one."""
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
        """Over the blocks that are picked."""
        if self.held is None:
            lists = self.selector.select(layer, query, positions, seqs, self.kept)
        else:
            lists = self.held[layer]
        return sparse_attention(query, key_cache, value_cache, seqs, lists, scale=scale)


class SparsePolicy:
    """The policy under sparse attention, as drafter.selfdraft.SelfDrafter is lent it.

    logprobs: where to leave what drafted tokens were drawn with, given (num_rows, num_nodes).
    """

    def __init__(
        self,
        forward: RowForward,
        sparse: SparseAttention,
        *,
        logprobs: Callable[[int, int], torch.Tensor] | None = None,
    ) -> None:
        self.block_size = forward.block_size
        self.dummy_slot = forward.cache.dummy_slot
        self.stop_ids = forward.stop_ids
        self._forward = forward
        self._sparse = sparse
        self._logprobs = logprobs

    def draft_logprobs(self, num_rows: int, num_nodes: int) -> torch.Tensor | None:
        """Where to leave them, if at all."""
        return None if self._logprobs is None else self._logprobs(num_rows, num_nodes)

    def ahead(self, rows: Rows, contexts: torch.Tensor, *, num_rows: int, num_new: int) -> "SparseDraft":
        """The forwards of one draft."""
        ahead = self._forward.sequences(rows, contexts, num_rows=num_rows, num_new=num_new)
        return SparseDraft(self._forward, self._sparse.forward(rows, num_rows, ahead=ahead))


@dataclass(frozen=True, slots=True)
class SparseDraft:
    """The policy's forwards under one attention: drafter.selfdraft.Drawing."""

    forward: RowForward
    attention: LayerAttention

    def draw(
        self, rows: Rows, inputs: CycleInputs, *, num_rows: int, num_nodes: int, aux_layers: Sequence[int]
    ) -> Drawn:
        """As RowForward, under the attention."""
        return self.forward(
            rows, inputs, num_rows=num_rows, num_nodes=num_nodes, aux_layers=aux_layers, attention=self.attention
        )

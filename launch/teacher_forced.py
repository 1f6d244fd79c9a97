"""Single tokens of known texts, forwarded over dense keys and values: what one step of an approximation changes.

A row is one place of one text. Its last block is a copy of its own, into which the forward writes: so all rows of a
text are forwarded together, none reads what another has written, and the texts' keys and values stay dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from drafter.types import Rows
from kernels.attention import PagedSequences, paged_sequences
from rollout.decoder import make_decoder
from rollout.fused import LayerAttention
from rollout.model import PagedCache
from rollout.sparse import SparseAttention

BLOCK_SIZE = 64
CHUNK = 512  # tokens of a text that are computed at once


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of one text, R tokens at places that follow one another: forward them with `Forced.logits`.

    token_ids, positions [R] int64; rows: as the selectors know them, each row's text being the window it lies in.
    keys: blocks of the text, in order, [S / 64] int64.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    seqs: PagedSequences
    rows: Rows
    keys: torch.Tensor


class Forced:
    """Texts [B, L] int64 whose keys and values are dense, and forwards of up to num_rows of their tokens.

    sparse: every attention that will be used; each knows the texts' blocks. window: tokens that are drafted from one
    dense verification, which a selector may watch: the places of a window share what was seen before it.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        texts: torch.Tensor,
        sparse: Sequence[SparseAttention],
        *,
        num_rows: int,
        window: int,
    ) -> None:
        count, length = texts.shape
        self.texts = texts
        self._sparse = sparse
        self._window = window
        self._width = -(-length // BLOCK_SIZE)
        self._tables = torch.arange(count * self._width, dtype=torch.int32, device=texts.device).view(count, -1)
        self._own = count * self._width + torch.arange(num_rows, dtype=torch.int32, device=texts.device)
        self.cache = PagedCache(
            model.config,
            num_blocks=(count * self._width) + num_rows,
            block_size=BLOCK_SIZE,
            device=str(texts.device),
            dtype=model.dtype,
        )
        self._decoder = make_decoder(model)
        self._decoder.reach(length)
        for each in sparse:
            each.attach(self.cache, num_texts=num_rows, num_rows=num_rows, table_width=self._width)
        for text in range(count):
            self._compute(text)

    @torch.inference_mode()
    def places(self, text: int, begin: int, count: int) -> Places:
        """The tokens of a text from index begin on, as rows; what a selector goes by is what was there before them."""
        device, own = self.texts.device, self._own[:count]
        positions = torch.arange(begin, begin + count, device=device)
        last = positions // BLOCK_SIZE
        tables = self._tables[text].repeat(count, 1)
        copied = tables.gather(1, last[:, None])[:, 0]
        self.cache.storage[:, :, own.long()] = self.cache.storage[:, :, copied.long()]
        tables.scatter_(1, last[:, None], own[:, None])
        seqs = self._sequences(tables, positions, 1, slots=own.long() * BLOCK_SIZE + positions % BLOCK_SIZE)
        windows = torch.arange(count, device=device) // self._window
        for each in self._sparse:
            each.describe(
                block_tables=tables,
                begins=(last * BLOCK_SIZE).int(),
                ends=positions.int(),
                most=BLOCK_SIZE,
            )
            self._watch(each, text, positions[:: self._window])
        return Places(self.texts[text, positions], positions, seqs, _rows(windows, tables), self._tables[text].long())

    @torch.inference_mode()
    def logits(self, places: Places, attention: LayerAttention | None) -> torch.Tensor:
        """Of what follows each place, [R, V], dense without an attention."""
        hidden, _ = self._decoder.forward_with_aux(
            places.token_ids, places.positions, places.seqs, self.cache, (), attention
        )
        return self._decoder.logits(hidden)

    def _compute(self, text: int) -> None:
        """Fill the cache with a text's keys and values, densely, and let the selectors know them."""
        length, tables = self.texts.shape[1], self._tables[text : text + 1]
        for begin in range(0, length, CHUNK):
            index = torch.arange(begin, min(begin + CHUNK, length), device=self.texts.device)
            slots = tables[0, index // BLOCK_SIZE].long() * BLOCK_SIZE + index % BLOCK_SIZE
            seqs = self._sequences(tables, index[:1], len(index), slots=slots)
            self._decoder.forward(self.texts[text, index], index, seqs, self.cache)
            for each in self._sparse:
                each.prefilled(seqs)

    def _watch(self, sparse: SparseAttention, text: int, begins: torch.Tensor) -> None:
        """Verify densely what lies before the windows that begin there, and drop what comes of it."""
        num_tokens = self._window + 1
        rows = _rows(torch.arange(len(begins), device=begins.device), self._tables[text].repeat(len(begins), 1))
        sparse.begin(range(len(begins)))
        attention = sparse.watch(rows, len(begins))
        if attention is None:
            return
        index = begins[:, None] + torch.arange(-num_tokens, 0, device=begins.device)
        # the keys are there already: what this forward computes of them is nobody's
        nobodys = torch.full_like(index, self.cache.dummy_slot).flatten()
        seqs = self._sequences(rows.block_tables, index[:, 0], num_tokens, slots=nobodys)
        self._decoder.forward_with_aux(
            self.texts[text, index].flatten(), index.flatten(), seqs, self.cache, (), attention
        )

    def _sequences(
        self, tables: torch.Tensor, contexts: torch.Tensor, num_tokens: int, *, slots: torch.Tensor
    ) -> PagedSequences:
        """Rows with so many new tokens each, and so many before them."""
        return paged_sequences(
            cu_seqlens_q=torch.arange(len(tables) + 1, dtype=torch.int32, device=tables.device) * num_tokens,
            max_seqlen_q=num_tokens,
            context_lens=contexts.int(),
            max_context=int(contexts.max()),
            block_tables=tables,
            slots=slots,
            block_size=BLOCK_SIZE,
        )


def _rows(texts: torch.Tensor, tables: torch.Tensor) -> Rows:
    nothing = torch.zeros(len(texts), dtype=torch.int32, device=texts.device)
    return Rows(text=texts.int(), keys=nothing.long(), max_lengths=nothing, active=nothing + 1, block_tables=tables)

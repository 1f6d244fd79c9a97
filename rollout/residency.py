"""The running sequences' state on the device, and the host's mirror of who sits where."""

from collections import abc
from dataclasses import dataclass, field

import numpy as np
import torch

from drafter.types import Drafts, FeatureReader, ResidentDrafter, Rows, Texts
from rollout.sequence import Sequence


@dataclass(slots=True)
class Group:
    """Texts of one prompt. remaining: sequences still expected; texts: finished and recalled ones it holds."""

    number: int
    remaining: int
    texts: list[int] = field(default_factory=list)


class Residency:
    """Rows and texts of at most num_rows running sequences of at most max_length tokens each.

    Row i of the device is the i-th running sequence: a vacated row is filled by the last one, so that a cycle over B
    rows takes the first B. Finished texts stay, for siblings to quote, until their prompt is done or room is needed.
    Everything the host writes is enqueued behind the cycles already launched.
    drafter and reader are attached to the texts, and hear of every sequence that comes and goes.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_texts: int,
        max_length: int,
        table_width: int,
        max_nodes: int,
        dummy_block: int,
        device: torch.device,
        drafter: ResidentDrafter | None,
        reader: FeatureReader | None,
    ) -> None:
        assert num_texts >= num_rows
        self.drafter = drafter
        self.reader = reader

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.num_rows = num_rows
        self.max_length = max_length
        self.device = device
        nobody = num_texts  # one more text, of one token, for rows that are nobody's
        self.texts = Texts(
            tokens=zeros(num_texts + 1, max_length), lengths=zeros(num_texts + 1), groups=zeros(num_texts + 1)
        )
        self.texts.lengths[nobody] = 1
        self.texts.groups.fill_(-1)
        self.rows = Rows(
            text=torch.full((num_rows,), nobody, dtype=torch.int32, device=device),
            keys=zeros(num_rows, dtype=torch.int64),
            max_lengths=zeros(num_rows),
            active=zeros(num_rows),
            block_tables=torch.full((num_rows, table_width), dummy_block, dtype=torch.int32, device=device),
        )
        self._draft_ids = zeros(num_rows * max_nodes)
        self._draft_parents = zeros(num_rows * max_nodes)
        self._num_nodes = zeros(num_rows)
        self._nobody = nobody
        self._free_texts = list(range(num_texts - 1, -1, -1))
        self._finished_texts: dict[int, Group] = {}  # in the order of finishing
        self._groups: dict[str, Group] = {}
        self._num_groups = 0
        self._text_of: dict[Sequence, int] = {}
        self._uploaded: list[int] = []  # blocks of each row that the device knows
        self._row_texts = np.zeros(num_rows, dtype=np.int64)
        width = 3 * (1 + max_nodes) + 3
        self._results = zeros(num_rows * width)
        pinned = device.type == "cuda"
        # two: the host reads one cycle's results while the next one's arrive
        self._host_results = [torch.zeros(num_rows * width, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._arange = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._cu_seqlens: dict[int, torch.Tensor] = {}
        self._stop_ids: dict[tuple[int, ...], torch.Tensor] = {}
        self.sequences: list[Sequence] = []  # by row
        if reader is not None:
            reader.attach(self.texts, num_rows=num_rows)
        if drafter is not None:
            drafter.attach(self.texts)

    def drafts(self, num_rows: int, num_nodes: int) -> Drafts:
        """Where drafts of this shape are proposed: the same memory for every shape, for one cycle at a time."""
        count = num_rows * num_nodes
        return Drafts(
            token_ids=self._draft_ids[:count].view(num_rows, num_nodes),
            parents=self._draft_parents[:count].view(num_rows, num_nodes),
            num_nodes=self._num_nodes[:num_rows],
        )

    def results(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where a cycle of this shape leaves CycleResult.host, [num_rows, 3 + 3 (1 + num_nodes)] int32."""
        return _table(self._results, num_rows, num_nodes)

    def host_results(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where the host reads them; the other of two buffers at each call."""
        self._host_results.reverse()
        return _table(self._host_results[0], num_rows, num_nodes)

    def cu_seqlens(self, num_rows: int, tokens_each: int) -> torch.Tensor:
        """Boundaries of num_rows sequences of equal length, [num_rows + 1] int32, at an address that stays."""
        if tokens_each not in self._cu_seqlens:
            self._cu_seqlens[tokens_each] = self._arange * tokens_each
        return self._cu_seqlens[tokens_each][: num_rows + 1]

    def stop_ids(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """Stop tokens [K] int32, at an address that stays."""
        if token_ids not in self._stop_ids:
            self._stop_ids[token_ids] = torch.tensor(token_ids, dtype=torch.int32, device=self.device)
        return self._stop_ids[token_ids]

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._text_of

    def row_texts(self) -> np.ndarray:
        """The text that each sequence on a row writes by now, [B] int64."""
        return self._row_texts[: len(self.sequences)].copy()

    def expect(self, sequences: abc.Iterable[Sequence]) -> None:
        """These sequences will come; a prompt's texts are kept until all of its own have left."""
        for sequence in sequences:
            group = self._groups.get(sequence.prompt.id)
            if group is None:
                group = self._groups[sequence.prompt.id] = Group(number=self._num_groups, remaining=0)
                self._num_groups += 1
            group.remaining += 1

    def dismiss(self, gone: abc.Collection[Sequence]) -> None:
        """Sequences, on rows or not, that another engine goes on with: what they said here may still be quoted."""
        on_rows = [sequence for sequence in gone if sequence in self]
        self._vacate(on_rows)
        for sequence in on_rows:
            self._quote(sequence)
        for sequence in gone:
            self._count_off(sequence)

    def enter(self, sequences: abc.Sequence[Sequence]) -> None:
        """Give each sequence a row and a text that holds its present tokens."""
        if not sequences:
            return
        texts = [self._take_text(sequence) for sequence in sequences]
        self._write_texts(sequences, texts)
        first = len(self.sequences)
        self.sequences += sequences
        self._uploaded += [0] * len(sequences)
        at = slice(first, len(self.sequences))
        self._row_texts[at] = texts
        fields = torch.tensor(
            [[text, s.noise_key, s.max_length] for text, s in zip(texts, sequences, strict=True)], dtype=torch.int64
        ).to(self.device, non_blocking=True)
        self.rows.text[at] = fields[:, 0].int()
        self.rows.keys[at] = fields[:, 1]
        self.rows.max_lengths[at] = fields[:, 2].int()
        self.rows.active[at] = 1
        if self.reader is not None:
            for text, sequence in zip(texts, sequences, strict=True):
                self.reader.begin(text, len(sequence.tokens))
        if self.drafter is None:
            return
        for text, sequence in zip(texts, sequences, strict=True):
            group = self._groups[sequence.prompt.id]
            # rows still to be taken find a text in any case
            spare = max(0, len(self._free_texts) - (self.num_rows - len(self.sequences)))
            offered = self._free_texts[::-1][:spare]
            count = self.drafter.begin(text, group.number, sequence.prompt.id, sequence.prompt.token_ids, offered)
            group.texts += offered[:count]
            del self._free_texts[len(self._free_texts) - count :]

    def upload_blocks(self) -> None:
        """Tell the device which blocks the sequences hold by now."""
        where: list[tuple[int, int, int]] = []
        for row, sequence in enumerate(self.sequences):
            known = self._uploaded[row]
            if sequence.num_blocks > known:
                where += [(row, index, int(sequence.block_table[index])) for index in range(known, sequence.num_blocks)]
                self._uploaded[row] = sequence.num_blocks
        if where:
            news = torch.tensor(where, dtype=torch.int64).to(self.device, non_blocking=True)
            self.rows.block_tables[news[:, 0], news[:, 1]] = news[:, 2].int()

    def leave(self, gone: abc.Collection[Sequence]) -> None:
        """Vacate the rows of sequences that finished, or that lost their blocks and will enter again."""
        self._vacate(gone)
        for sequence in gone:
            if sequence.finish is None:  # it will write another text
                self._free([self._text_of.pop(sequence)])
            else:
                self._quote(sequence)
                self._count_off(sequence)

    def clear(self) -> None:
        """Vacate everything: no sequence will come back."""
        for sequence in self.sequences:
            if self.drafter is not None and sequence.logprobs and sequence.finish is None:
                response = sequence.tokens[len(sequence.prompt.token_ids) :]
                self.drafter.finish(self._text_of[sequence], sequence.prompt.id, response)
        self.leave(list(self.sequences))
        texts = [text for group in self._groups.values() for text in group.texts]
        self._groups.clear()
        self._finished_texts.clear()
        if texts:
            self._free(texts)

    def _vacate(self, gone: abc.Collection[Sequence]) -> None:
        """Free the rows of these sequences, which write their texts no more."""
        if not gone:
            return
        leaving = set(gone)
        if self.reader is not None:
            self.reader.release([self._text_of[sequence] for sequence in gone])
        kept = [row for row, sequence in enumerate(self.sequences) if sequence not in leaving]
        count = len(self.sequences)
        # the last rows fill the holes: as few moves as there are holes
        holes = [row for row in range(len(kept)) if self.sequences[row] in leaving]
        movers = [row for row in kept if row >= len(kept)]
        for hole, mover in zip(holes, movers, strict=True):
            self.sequences[hole] = self.sequences[mover]
            self._uploaded[hole] = self._uploaded[mover]
            self._row_texts[hole] = self._row_texts[mover]
        del self.sequences[len(kept) :]
        del self._uploaded[len(kept) :]
        rows = self.rows
        if holes:
            moves = torch.tensor([holes, movers], dtype=torch.int64).to(self.device, non_blocking=True)
            for values in (rows.text, rows.keys, rows.max_lengths, rows.active, rows.block_tables):
                values[moves[0]] = values[moves[1]]
        rows.active[len(kept) : count] = 0
        rows.text[len(kept) : count] = self._nobody

    def _take_text(self, sequence: Sequence) -> int:
        if not self._free_texts:  # the text that was finished first is the one least worth quoting
            text, group = next(iter(self._finished_texts.items()))
            del self._finished_texts[text]
            group.texts.remove(text)
            self._free([text])
        text = self._free_texts.pop()
        self._text_of[sequence] = text
        return text

    def _write_texts(self, sequences: abc.Sequence[Sequence], texts: abc.Sequence[int]) -> None:
        longest = max(len(sequence.tokens) for sequence in sequences)
        tokens = np.zeros((len(sequences), longest), dtype=np.int32)
        for line, sequence in zip(tokens, sequences, strict=True):
            line[: len(sequence.tokens)] = sequence.tokens
        fields = torch.tensor(
            [[t, len(s.tokens), self._groups[s.prompt.id].number] for t, s in zip(texts, sequences, strict=True)],
            dtype=torch.int64,
        ).to(self.device, non_blocking=True)
        at = fields[:, 0]
        self.texts.tokens[at, :longest] = torch.from_numpy(tokens).to(self.device, non_blocking=True)
        self.texts.lengths[at] = fields[:, 1].int()
        self.texts.groups[at] = fields[:, 2].int()

    def _quote(self, sequence: Sequence) -> None:
        """Keep the text of a sequence that has left for good, for its siblings."""
        text = self._text_of.pop(sequence)
        group = self._groups[sequence.prompt.id]
        group.texts.append(text)
        self._finished_texts[text] = group
        if self.drafter is not None:
            response = sequence.tokens[len(sequence.prompt.token_ids) :]
            self.drafter.finish(text, sequence.prompt.id, response)

    def _count_off(self, sequence: Sequence) -> None:
        """One sequence less is expected; the last of a prompt frees all texts of it."""
        group = self._groups[sequence.prompt.id]
        group.remaining -= 1
        if group.remaining == 0:
            for text in group.texts:
                self._finished_texts.pop(text, None)
            if group.texts:
                self._free(group.texts)
            del self._groups[sequence.prompt.id]

    def _free(self, texts: abc.Sequence[int]) -> None:
        at = torch.tensor(texts, dtype=torch.int64).to(self.device, non_blocking=True)
        self.texts.groups.index_fill_(0, at, -1)  # not by assignment, which waits for the device to copy the -1
        self._free_texts += texts
        if self.drafter is not None:
            self.drafter.release(texts)


def _table(buffer: torch.Tensor, num_rows: int, num_nodes: int) -> torch.Tensor:
    width = 3 + 3 * (1 + num_nodes)
    return buffer[: num_rows * width].view(num_rows, width)

"""The running sequences' state on the device, and the host's mirror of who sits where."""

from collections import abc
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from drafter.types import Begun, Drafts, FeatureReader, ResidentDrafter, Rows, Strategy, Texts
from kernels.upload import upload
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
    Everything the host writes is enqueued behind the cycles already launched, in as many launches for many sequences
    as for one: each takes the host some microseconds, and a small batch's cycle takes the device a few hundred.
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
        # side by side, so that they move in one launch, each on a multiple of 16 bytes
        self._fields = zeros(3, -(-num_rows // 4) * 4)[:, :num_rows]
        self._nobodys = torch.tensor([[nobody], [0], [0]], dtype=torch.int32, device=device)
        self._fields.copy_(self._nobodys.expand_as(self._fields))
        self.rows = Rows(
            text=self._fields[0],
            keys=zeros(num_rows, dtype=torch.int64),
            max_lengths=self._fields[1],
            active=self._fields[2],
            block_tables=torch.full((num_rows, table_width), dummy_block, dtype=torch.int32, device=device),
        )
        self._draft_ids = zeros(num_rows * max_nodes)
        self._draft_parents = zeros(num_rows * max_nodes)
        self._draft_logprobs = zeros(num_rows * max_nodes, dtype=torch.float32)
        self._num_nodes = zeros(num_rows)
        self._grown = 0  # tokens at most that a text has got in all cycles so far
        self._grown_before: dict[str, int] = {}  # by source: those before it proposed last
        self._free_texts = list(range(num_texts - 1, -1, -1))
        self._finished_texts: dict[int, Group] = {}  # in the order of finishing
        self._groups: dict[str, Group] = {}
        self._num_groups = 0
        self._text_of: dict[Sequence, int] = {}
        self._uploaded: list[int] = []  # blocks of each row that the device knows
        self._row_texts = np.zeros(num_rows, dtype=np.int64)
        width = 4 * (1 + max_nodes) + 3  # of a table, and the dense log-probs behind it
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

    def draft_logprobs(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where a drafter leaves what it drew its drafts with, [num_rows, num_nodes] float32."""
        return self._draft_logprobs[: num_rows * num_nodes].view(num_rows, num_nodes)

    def results(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where a cycle of this shape leaves CycleResult.host, [num_rows, 3 + 3 (1 + num_nodes)] int32."""
        return _table(self._results, num_rows, num_nodes)

    def host_results(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where the host reads them; the other of two buffers at each call."""
        self._host_results.reverse()
        return _table(self._host_results[0], num_rows, num_nodes)

    def dense_logprobs(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where a rectified cycle leaves the policy's own log-probs, [num_rows, 1 + num_nodes] float32."""
        return _behind_table(self._results, num_rows, num_nodes)

    def host_dense_logprobs(self, num_rows: int, num_nodes: int) -> torch.Tensor:
        """Where the host reads them, beside the results it was given last."""
        return _behind_table(self._host_results[0], num_rows, num_nodes)

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
        self._free([text for sequence in gone for text in self._count_off(sequence)])

    def enter(self, sequences: abc.Sequence[Sequence]) -> None:
        """Give each sequence a row and a text that holds its present tokens."""
        if not sequences:
            return
        texts = self._take_texts(sequences)
        first = len(self.sequences)
        self.sequences += sequences
        self._uploaded += [0] * len(sequences)
        at = slice(first, len(self.sequences))
        self._row_texts[at] = texts
        self._write(at, sequences, texts)
        if self.reader is not None:
            self.reader.begin(texts, [len(sequence.tokens) for sequence in sequences])
        if self.drafter is not None:
            self._begin(self.drafter, sequences, texts)

    def upload_blocks(self) -> None:
        """Tell the device which blocks the sequences hold by now."""
        places: list[int] = []
        blocks: list[int] = []
        width = self.rows.block_tables.shape[1]
        for row, sequence in enumerate(self.sequences):
            known = self._uploaded[row]
            if sequence.num_blocks > known:
                places += range(row * width + known, row * width + sequence.num_blocks)
                blocks += sequence.block_table[known : sequence.num_blocks].tolist()
                self._uploaded[row] = sequence.num_blocks
        if places:
            at, values = upload(self.device, np.array(places, dtype=np.int64), np.array(blocks, dtype=np.int32))
            self.rows.block_tables.view(-1).index_copy_(0, at, values)

    def refresh(self, strategy: Strategy) -> None:
        """A cycle of this strategy is about to be launched: let whoever proposes in it know all that has come to be."""
        if strategy.num_verify:
            assert self.drafter is not None
            grown = self._grown - self._grown_before.get(strategy.source, 0)
            self.drafter.refresh(strategy, grown=grown)
            self._grown_before[strategy.source] = self._grown
        self._grown += 1 + strategy.num_verify

    def leave(self, gone: abc.Collection[Sequence]) -> None:
        """Vacate the rows of sequences that finished, or that lost their blocks and will enter again."""
        self._vacate(gone)
        freed: list[int] = []
        for sequence in gone:
            if sequence.finish is None:  # it will write another text
                freed.append(self._text_of.pop(sequence))
            else:
                self._quote(sequence)
                freed += self._count_off(sequence)
        self._free(freed)

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
            to, of = upload(self.device, np.array(holes, dtype=np.int64), np.array(movers, dtype=np.int64))
            self._fields.index_copy_(1, to, self._fields.index_select(1, of))
            for values in (rows.keys, rows.block_tables):
                values.index_copy_(0, to, values.index_select(0, of))
        self._fields[:, len(kept) : count] = self._nobodys

    def _take_texts(self, sequences: abc.Sequence[Sequence]) -> list[int]:
        """A text for each of these to write; the texts that were finished first are those least worth quoting."""
        lacking = max(0, len(sequences) - len(self._free_texts))
        evicted = list(islice(self._finished_texts, lacking))
        for text in evicted:
            self._finished_texts.pop(text).texts.remove(text)
        self._free(evicted)
        texts = [self._free_texts.pop() for _ in sequences]
        self._text_of.update(zip(sequences, texts, strict=True))
        return texts

    def _write(self, at: slice, sequences: abc.Sequence[Sequence], texts: abc.Sequence[int]) -> None:
        """What these sequences have said, into their texts; whose rows these are, into the rows."""
        lengths = [len(sequence.tokens) for sequence in sequences]
        tokens = np.zeros((len(sequences), max(lengths)), dtype=np.int32)
        for line, sequence in zip(tokens, sequences, strict=True):
            line[: len(sequence.tokens)] = sequence.tokens
        groups = [self._groups[sequence.prompt.id].number for sequence in sequences]
        ends = [sequence.max_length for sequence in sequences]
        of_texts, keys, says, length, group, fields = upload(
            self.device,
            np.array(texts, dtype=np.int64),
            np.array([sequence.noise_key for sequence in sequences], dtype=np.int64),
            tokens,
            np.array(lengths, dtype=np.int32),
            np.array(groups, dtype=np.int32),
            np.array([texts, ends, [1] * len(texts)], dtype=np.int32),
        )
        self.texts.tokens[:, : tokens.shape[1]].index_copy_(0, of_texts, says)
        self.texts.lengths.index_copy_(0, of_texts, length)
        self.texts.groups.index_copy_(0, of_texts, group)
        self.rows.keys[at] = keys
        self._fields[:, at] = fields

    def _begin(self, drafter: ResidentDrafter, sequences: abc.Sequence[Sequence], texts: abc.Sequence[int]) -> None:
        """Tell the drafter of sequences that begin; it may take texts for what it remembers of their prompts."""
        groups = [self._groups[sequence.prompt.id] for sequence in sequences]
        begun = [
            Begun(text, group.number, sequence.prompt.id, sequence.prompt.token_ids, len(sequence.tokens))
            for text, group, sequence in zip(texts, groups, sequences, strict=True)
        ]
        # rows still to be taken find a text in any case
        spare = max(0, len(self._free_texts) - (self.num_rows - len(self.sequences)))
        taken = drafter.begin(begun, self._free_texts[::-1][:spare])
        for group, more in zip(groups, taken, strict=True):
            group.texts += more
        del self._free_texts[len(self._free_texts) - sum(map(len, taken)) :]

    def _quote(self, sequence: Sequence) -> None:
        """Keep the text of a sequence that has left for good, for its siblings."""
        text = self._text_of.pop(sequence)
        group = self._groups[sequence.prompt.id]
        group.texts.append(text)
        self._finished_texts[text] = group
        if self.drafter is not None:
            response = sequence.tokens[len(sequence.prompt.token_ids) :]
            self.drafter.finish(text, sequence.prompt.id, response)

    def _count_off(self, sequence: Sequence) -> list[int]:
        """One sequence less is expected; with the last of a prompt all texts of it are to be freed: these."""
        group = self._groups[sequence.prompt.id]
        group.remaining -= 1
        if group.remaining:
            return []
        for text in group.texts:
            self._finished_texts.pop(text, None)
        del self._groups[sequence.prompt.id]
        return group.texts

    def _free(self, texts: abc.Sequence[int]) -> None:
        if not texts:
            return
        (at,) = upload(self.device, np.array(texts, dtype=np.int64))
        self.texts.groups.index_fill_(0, at, -1)  # not by assignment, which waits for the device to copy the -1
        self._free_texts += texts
        if self.drafter is not None:
            self.drafter.release(texts)


def _table(buffer: torch.Tensor, num_rows: int, num_nodes: int) -> torch.Tensor:
    width = 3 + 3 * (1 + num_nodes)
    return buffer[: num_rows * width].view(num_rows, width)


def _behind_table(buffer: torch.Tensor, num_rows: int, num_nodes: int) -> torch.Tensor:
    begin, tokens = num_rows * (3 + 3 * (1 + num_nodes)), num_rows * (1 + num_nodes)
    return buffer[begin : begin + tokens].view(torch.float32).view(num_rows, 1 + num_nodes)

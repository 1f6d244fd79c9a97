"""Drafts from what was already said, found on the device: siblings, earlier epochs, and the sequence itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from drafter.history import RolloutHistory
from drafter.types import Drafts, Rows, Strategy, Texts
from kernels.ngram import NgramIndex, empty_index, insert, propose


class NgramDrafter:
    """drafter/suffix.py for texts on the device: the same matches as far as a table keeps them, the same votes.

    What sequences commit is indexed by propose itself; the host does nothing a cycle. It remembers finished rollouts,
    and writes them into free texts when their prompt is sampled again. Every match may be drafted from: whether a
    draft pays is the strategy's to say, which is chosen by its measured goodput.

    min_match: shortest agreement that may propose. max_history and max_rollouts: RolloutHistory's max_tokens and
    max_rollouts.
    """

    def __init__(self, *, min_match: int, max_history: int = 8_000_000, max_rollouts: int = 32) -> None:
        self._min_match = min_match
        self._history = RolloutHistory(max_tokens=max_history, max_rollouts=max_rollouts)
        self._texts: Texts | None = None
        self._index: NgramIndex | None = None
        self._numbers = torch.empty(0)
        self._group_of: dict[int, int] = {}  # by text
        self._texts_of: dict[int, set[int]] = {}  # by group
        self._prompts: dict[int, int] = {}  # by group: the text whose prompt is indexed

    def attach(self, texts: Texts) -> None:
        """Draft from these texts from now on; all of them are free."""
        self._texts = texts
        self._index = empty_index(texts, min_match=self._min_match)
        self._numbers = torch.arange(len(texts.lengths), dtype=torch.int32, device=texts.lengths.device)
        self._group_of.clear()
        self._texts_of.clear()
        self._prompts.clear()

    def begin(self, text: int, group: int, prompt_id: str, prompt_ids: Sequence[int], free_texts: Sequence[int]) -> int:
        """A sequence starts to write a text; its prompt is indexed once a group, and earlier rollouts with it.

        Returns how many of free_texts now hold earlier rollouts, the newest first.
        """
        assert self._texts is not None and self._index is not None
        self._forget(text)
        is_first = group not in self._texts_of
        self._remember([text], group)
        last = len(prompt_ids) - 1  # the last token's successor is each sequence's own
        indexed = self._index.indexed[text : text + 1]
        if group not in self._prompts:
            self._prompts[group] = text
            indexed.zero_()
            insert(self._index, self._texts, self._numbers[text : text + 1], max_places=last)
        indexed.fill_(last)
        return self._recall(group, prompt_id, prompt_ids, free_texts) if is_first else 0

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Write a draft for each of the first B rows. Captured in a CUDA graph: no host synchronisation."""
        assert self._index is not None and texts is self._texts, "attach the texts first"
        propose(self._index, texts, rows, out, depth=strategy.depth, top_k=strategy.top_k)

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The sequence that wrote this text is complete; the text serves its siblings until it is released."""
        self._history.add(prompt_id, token_ids)

    def release(self, texts: Sequence[int]) -> None:
        """These texts are free again. Their entries stay and match nothing: they are of no live group."""
        for text in texts:
            self._forget(text)

    def state_dict(self) -> dict[str, Any]:
        """Finished rollouts, oldest first, as SuffixDrafter's: a run may resume with either."""
        return {"finished": self._history.dump()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, replacing the present one; texts stay as they are."""
        self._history.load(state["finished"])

    def _remember(self, texts: Sequence[int], group: int) -> None:
        for text in texts:
            self._group_of[text] = group
            self._texts_of.setdefault(group, set()).add(text)

    def _forget(self, text: int) -> None:
        group = self._group_of.pop(text, None)
        if group is None:
            return
        self._texts_of[group].remove(text)
        if not self._texts_of[group]:
            del self._texts_of[group]
        if self._prompts.get(group) == text:
            del self._prompts[group]

    def _recall(self, group: int, prompt_id: str, prompt_ids: Sequence[int], free_texts: Sequence[int]) -> int:
        """Write remembered rollouts into free texts, and index them; how many."""
        assert self._texts is not None and self._index is not None
        room = self._texts.tokens.shape[1] - len(prompt_ids)
        responses = [response[:room] for response in self._history.of(prompt_id)[::-1][: len(free_texts)]]
        if not responses or room <= 0:
            return 0
        lengths = [len(prompt_ids) + len(response) for response in responses]
        taken = free_texts[: len(responses)]
        # one copy to the device: number, length, then tokens
        table = np.zeros((len(responses), 2 + max(lengths)), dtype=np.int32)
        table[:, 0], table[:, 1] = taken, lengths
        table[:, 2 : 2 + len(prompt_ids)] = prompt_ids
        for line, length, response in zip(table, lengths, responses, strict=True):
            line[2 + len(prompt_ids) : 2 + length] = response
        on_host = torch.from_numpy(table)
        if self._numbers.is_cuda:
            on_host = on_host.pin_memory()
        on_device = on_host.to(self._numbers.device, non_blocking=True)
        numbers = on_device[:, 0].contiguous()
        at = numbers.long()
        self._texts.tokens[at, : max(lengths)] = on_device[:, 2:]
        self._texts.lengths[at] = on_device[:, 1]
        # not by assignment, which waits for the device to copy a number
        self._texts.groups.index_fill_(0, at, group)
        self._index.indexed.index_fill_(0, at, len(prompt_ids) - 1)
        insert(self._index, self._texts, numbers, max_places=max(lengths))
        self._remember(taken, group)
        return len(taken)

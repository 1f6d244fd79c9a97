"""Drafts from what was already said, found on the device: siblings, earlier epochs, and the sequence itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drafter.history import RolloutHistory, saved_rollouts
from drafter.types import Begun, Drafts, Rows, Strategy, Texts
from kernels.ngram import CATCH_UP, NgramIndex, empty_index, insert, propose
from kernels.upload import upload


class NgramDrafter:
    """drafter/suffix.py for texts on the device: the same matches as far as a table keeps them, the same votes.

    What sequences commit is indexed by propose itself; the host does nothing a cycle. It remembers finished rollouts,
    and writes them into free texts when their prompt is sampled again. What sequences that come and go bring waits for
    the next cycle that drafts from here: until then the device is not told, and nothing is launched. Every match may be
    drafted from: whether a draft pays is the strategy's to say, which is chosen by its measured goodput.

    min_match: shortest agreement that may propose. max_history and max_rollouts: RolloutHistory's max_tokens and
    max_rollouts.
    """

    def __init__(self, *, min_match: int, max_history: int = 8_000_000, max_rollouts: int = 32) -> None:
        self._min_match = min_match
        self._history = RolloutHistory(max_tokens=max_history, max_rollouts=max_rollouts)
        self._texts: Texts | None = None
        self._index: NgramIndex | None = None
        self._group_of: dict[int, int] = {}  # by text
        self._texts_of: dict[int, set[int]] = {}  # by group
        self._prompts: dict[int, int] = {}  # by group: the text whose prompt is indexed
        # what the device is yet to be told, by text: places that count as entered, and tokens that there were
        self._begun: dict[int, tuple[int, int]] = {}
        self._recalled: dict[int, tuple[int, list[int]]] = {}  # by text: its group, and what to write into it

    def attach(self, texts: Texts) -> None:
        """Draft from these texts from now on; all of them are free."""
        self._texts = texts
        self._index = empty_index(texts, min_match=self._min_match)
        for known in (self._group_of, self._texts_of, self._prompts, self._begun, self._recalled):
            known.clear()

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        """Sequences start to write texts; a prompt is indexed once a group, and earlier rollouts with it.

        Returns, for each, those of free_texts that are to hold earlier rollouts, the newest first.
        """
        taken: list[list[int]] = []
        num_taken = 0
        for each in begun:
            self._forget(each.text)
            is_first = each.group not in self._texts_of
            self._remember(each.text, each.group)
            # the last token's successor is each sequence's own
            entered = len(each.prompt_ids) - 1
            if each.group not in self._prompts:
                self._prompts[each.group] = each.text
                entered = 0
            self._begun[each.text] = entered, each.length
            taken.append(self._recall(each, free_texts[num_taken:]) if is_first else [])
            num_taken += len(taken[-1])
        return taken

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        """Write what was recalled and enter what has come to be, whatever number of sequences it is of.

        Texts that have got more than propose would enter by itself are caught up with: they grow under other strategies
        too, and what was said then is what is quoted now.
        """
        assert self._texts is not None and self._index is not None
        if self._recalled:
            self._write_recalled(self._texts)
        lagging = grown > CATCH_UP
        if not self._begun and not lagging:
            return
        texts = list(self._group_of) if lagging else list(self._begun)
        missing = max((length - 1 - entered for entered, length in self._begun.values()), default=0)
        begun = list(self._begun)
        of_texts, numbers, of_begun, entered_before = upload(
            self._texts.tokens.device,
            np.array(texts, dtype=np.int64),
            np.array(texts, dtype=np.int32),
            np.array(begun, dtype=np.int64),
            np.array([self._begun[text][0] for text in begun], dtype=np.int32),
        )
        indexed = self._index.indexed
        indexed.index_copy_(0, of_begun, entered_before)
        insert(self._index, self._texts, numbers, max_places=min(missing + grown, self._texts.tokens.shape[1]))
        indexed.index_copy_(0, of_texts, self._texts.lengths.index_select(0, of_texts) - 1)
        self._begun.clear()

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Write a draft for each of the first B rows. Captured in a CUDA graph: no host synchronisation."""
        assert self._index is not None and texts is self._texts, "attach the texts first"
        propose(self._index, texts, rows, out, depth=strategy.depth, top_k=strategy.top_k)

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The sequence that wrote this text is complete; the text serves its siblings until it is released."""
        self._history.add(prompt_id, token_ids)

    def release(self, texts: Sequence[int]) -> None:
        """These texts are free again. Their entries match nothing, being of no live group."""
        for text in texts:
            self._forget(text)

    def state_dict(self) -> dict[str, Any]:
        """Finished rollouts, oldest first, as SuffixDrafter's: a run may resume with either."""
        return {"finished": self._history.dump()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, replacing the present one; texts stay as they are."""
        self._history.load(saved_rollouts(state))

    def _remember(self, text: int, group: int) -> None:
        self._group_of[text] = group
        self._texts_of.setdefault(group, set()).add(text)

    def _forget(self, text: int) -> None:
        group = self._group_of.pop(text, None)
        if group is None:
            return
        self._begun.pop(text, None)
        self._recalled.pop(text, None)
        self._texts_of[group].remove(text)
        if not self._texts_of[group]:
            del self._texts_of[group]
        if self._prompts.get(group) == text:
            del self._prompts[group]

    def _recall(self, begun: Begun, free_texts: Sequence[int]) -> list[int]:
        """The free texts that are to hold remembered rollouts of a prompt, newest first."""
        assert self._texts is not None
        prompt = list(begun.prompt_ids)
        room = self._texts.tokens.shape[1] - len(prompt)
        taken: list[int] = []
        if room > 0:
            for text, response in zip(free_texts, reversed(self._history.of(begun.prompt_id)), strict=False):
                token_ids = [*prompt, *response[:room]]
                self._remember(text, begun.group)
                self._begun[text] = len(prompt) - 1, len(token_ids)
                self._recalled[text] = begun.group, token_ids
                taken.append(text)
        return taken

    def _write_recalled(self, texts: Texts) -> None:
        """Let the texts that were taken hold what was recalled."""
        recalled = list(self._recalled.values())
        lengths = [len(token_ids) for _, token_ids in recalled]
        tokens = np.zeros((len(recalled), max(lengths)), dtype=np.int32)
        for line, (_, token_ids) in zip(tokens, recalled, strict=True):
            line[: len(token_ids)] = token_ids
        at, says, length, group = upload(
            texts.tokens.device,
            np.array(list(self._recalled), dtype=np.int64),
            tokens,
            np.array(lengths, dtype=np.int32),
            np.array([group for group, _ in recalled], dtype=np.int32),
        )
        texts.tokens[:, : tokens.shape[1]].index_copy_(0, at, says)
        texts.lengths.index_copy_(0, at, length)
        texts.groups.index_copy_(0, at, group)
        self._recalled.clear()

"""Finished rollouts by prompt, bounded: what a drafter that quotes earlier epochs remembers."""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any


class RolloutHistory:
    """The newest rollouts of every prompt, 4 bytes a token.

    max_tokens: response tokens kept over all prompts; the oldest rollouts go first. max_rollouts: rollouts kept of one
    prompt, so that a stale policy's words give way to the present one's.
    """

    def __init__(self, *, max_tokens: int, max_rollouts: int) -> None:
        assert max_rollouts > 0
        self._max_tokens = max_tokens
        self._max_rollouts = max_rollouts
        self._finished: dict[int, tuple[str, array[int]]] = {}  # by order of finishing: prompt id, response
        self._of: dict[str, deque[int]] = {}  # prompt id -> its keys in _finished, oldest first
        self._num_finished = 0  # ever: the next key
        self._num_tokens = 0

    def of(self, prompt_id: str) -> list[Sequence[int]]:
        """Responses to this prompt, oldest first."""
        return [self._finished[key][1] for key in self._of.get(prompt_id, ())]

    def add(self, prompt_id: str, response: Sequence[int]) -> None:
        """Keep a response; drop the oldest of the prompt, then the oldest of all, until the bounds hold."""
        if not response:
            return
        self._finished[self._num_finished] = (prompt_id, array("i", response))
        keys = self._of.setdefault(prompt_id, deque())
        keys.append(self._num_finished)
        self._num_finished += 1
        self._num_tokens += len(response)
        if len(keys) > self._max_rollouts:
            self._drop(keys[0])
        while self._num_tokens > self._max_tokens:
            self._drop(next(iter(self._finished)))

    def dump(self) -> list[list[str | Sequence[int]]]:
        """Prompt id and response of every rollout, oldest first. The arrays are never mutated and not copied."""
        return [[prompt_id, response] for prompt_id, response in self._finished.values()]

    def load(self, finished: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Take up what was dumped, as arrays or lists, replacing the present rollouts."""
        self._finished.clear()
        self._of.clear()
        self._num_tokens = 0
        for prompt_id, response in finished:
            self.add(prompt_id, response)

    def _drop(self, key: int) -> None:
        prompt_id, response = self._finished.pop(key)
        self._num_tokens -= len(response)
        keys = self._of[prompt_id]
        oldest = keys.popleft()
        assert oldest == key
        if not keys:
            del self._of[prompt_id]


def saved_rollouts(state: dict[str, Any]) -> Iterable[tuple[str, Sequence[int]]]:
    """What a drafter's saved state holds of finished rollouts: a suffix drafter's own, or that of several by source.

    A run may resume with other drafters than it was saved with: () where no suffix drafter was among them.
    """
    rollouts: Iterable[tuple[str, Sequence[int]]] = state.get("suffix", state).get("finished", ())
    return rollouts

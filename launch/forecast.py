"""How long responses will get, from how long they got, and prompts spread over workers by it."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rollout.types import Prompt

PROMPTS = 16_384  # whose last lengths are remembered
RECENT = 4096  # responses from which the others' lengths are told


class Lengths:
    """Response lengths by prompt: of an earlier epoch where there was one, else by the line through prompts' lengths.

    What it expects depends on what was learned alone, not on the order in which responses arrived.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # mean of a prompt's last responses; the longest unseen first
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT)  # tokens of prompt and response

    def learn(self, prompts: Mapping[str, Prompt], lengths: Mapping[tuple[str, int], int]) -> None:
        """Responses of one call have ended: tokens by prompt id and sample."""
        by_prompt: dict[str, list[int]] = {}
        for (prompt_id, _), length in sorted(lengths.items()):
            by_prompt.setdefault(prompt_id, []).append(length)
            self._recent.append((len(prompts[prompt_id].token_ids), length))
        for prompt_id, found in by_prompt.items():
            self._last.pop(prompt_id, None)
            self._last[prompt_id] = fmean(found)
        for prompt_id in list(self._last)[: max(0, len(self._last) - PROMPTS)]:
            del self._last[prompt_id]

    def expected(self, prompts: Iterable[Prompt]) -> list[float]:
        """Tokens of a response to each prompt; 1 for all while nothing is known."""
        intercept, slope = self._line()
        return [self._last.get(prompt.id, max(1.0, intercept + slope * len(prompt.token_ids))) for prompt in prompts]

    def _line(self) -> tuple[float, float]:
        """Least squares through the recent responses."""
        if not self._recent:
            return 1.0, 0.0
        x_mean, y_mean = (fmean(column) for column in zip(*self._recent, strict=True))
        variance = sum((x - x_mean) ** 2 for x, _ in self._recent)
        if not variance:
            return y_mean, 0.0
        slope = sum((x - x_mean) * (y - y_mean) for x, y in self._recent) / variance
        return y_mean - slope * x_mean, slope

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to spread prompts as this one would; JSON-able."""
        return {"last": self._last, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self._last = dict(state["last"])
        self._recent = deque(((x, y) for x, y in state["recent"]), maxlen=RECENT)


def spread(prompts: Sequence[Prompt], expected: Sequence[float], workers: Sequence[int]) -> dict[int, list[Prompt]]:
    """Prompts by worker, nearly as many tokens each: the longest goes first, each to the one with least (Graham's LPT).

    Equal ones go round in order. A worker's own are in the order given.
    """
    load = dict.fromkeys(workers, 0.0)
    owner: dict[int, int] = {}
    for index in sorted(range(len(prompts)), key=lambda index: (-expected[index], index)):
        number = min(load, key=lambda worker: load[worker])
        owner[index] = number
        load[number] += expected[index]
    return {number: [prompts[index] for index in sorted(owner) if owner[index] == number] for number in workers}

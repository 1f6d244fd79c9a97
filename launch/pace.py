"""How fast workers sample, how long responses get and what it costs to move one: measured as they run."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from launch.idle import Costs, Load, expected_remaining, fit_rate

Key = tuple[str, int]  # prompt id, sample

RECENT = 8  # measurements kept of a batch size
FINISHED = 4096  # lengths kept of finished responses
SHORTEST_S = 0.02  # between two looks, for what happened in between to say anything
MOVE_S = 0.5  # a takeover's cost before one was measured
WEIGHT = 0.5  # of a new takeover's cost


@dataclass(frozen=True, slots=True)
class Look:
    """One worker at a moment of the driver's clock. lengths: response tokens so far of its unfinished sequences."""

    at_s: float
    lengths: Mapping[Key, int]


class Pace:
    """What looks at workers tell. slots: sequences that a worker runs at a time."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))  # a token, by batch
        self._finished: deque[int] = deque(maxlen=FINISHED)
        self._move_s = MOVE_S

    def finished(self, length: int) -> None:
        """A response came to its end after so many tokens."""
        self._finished.append(length)

    def observe(self, before: Look, after: Look) -> None:
        """A worker was looked at twice while it sampled."""
        grown = _grown(before, after)
        if grown and after.at_s - before.at_s >= SHORTEST_S:
            self._seconds[len(grown)].append((after.at_s - before.at_s) / fmean(grown))

    def moved(self, begun: Look, after: Look) -> None:
        """Sequences taken over at the first look have grown by the second: what was not sampling was their move."""
        grown = _grown(begun, after)
        costs = self.costs()
        if grown and costs is not None:
            sampling_s = fmean(grown) * costs.rate.seconds(len(grown))
            spent = max(0.0, after.at_s - begun.at_s - sampling_s)
            self._move_s += WEIGHT * (spent - self._move_s)

    def costs(self) -> Costs | None:
        """What is known; None before any worker was looked at twice."""
        samples = [(running, median(recent)) for running, recent in self._seconds.items()]
        rate = fit_rate(samples)
        return None if rate is None else Costs(rate=rate, move_s=self._move_s, slots=self._slots)

    def load(self, worker: int, lengths: Mapping[Key, int], *, limit: int) -> Load:
        """What a worker has left, the shortest responses first: they are given up first, and cost least to move.

        limit: tokens of a response at most.
        """
        ordered = sorted(lengths.values())
        return Load(worker, tuple(expected_remaining(length, self._finished, limit) for length in ordered))


def _grown(before: Look, after: Look) -> list[int]:
    """By how many tokens sequences grew that were there both times; those that wait, or are prefilled, did not."""
    gained = [length - before.lengths[key] for key, length in after.lengths.items() if key in before.lengths]
    return [tokens for tokens in gained if tokens > 0]

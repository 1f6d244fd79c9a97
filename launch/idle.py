"""What a worker whose rollouts are finished does while others still sample: the choice that saves the most time.

Pure functions of what was measured. launch/shift.py measures, asks here, and carries out what is decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from statistics import fmean
from typing import Protocol

# Seconds of later rollouts that a second of training the drafter is worth. Its gain cannot be read off one step
# (acceptance moves by less than its noise), while that of a takeover is felt at once: only one that saves a good
# share of the time goes before training.
LEARN_WORTH = 0.05


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """Seconds in which each of b sequences that run together gets one more token: base_s + each_s * b."""

    base_s: float
    each_s: float

    def seconds(self, running: int) -> float:
        """Seconds a token, of every sequence."""
        return self.base_s + self.each_s * running


@dataclass(frozen=True, slots=True)
class Load:
    """A worker that still samples. remaining: tokens expected of each sequence, in the order it gives them up."""

    worker: int
    remaining: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured. move_s: from asking for sequences until they go on elsewhere; slots: that run at a time."""

    rate: DecodeRate
    move_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Continue so many sequences of another worker."""

    source: int
    count: int


@dataclass(frozen=True, slots=True)
class Score:
    """Compute some finished rollouts' log-probs under the reference policy, which training would else compute."""


@dataclass(frozen=True, slots=True)
class Learn:
    """Train the drafter until called away."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing is worth doing."""


Task = TakeOver | Score | Learn | Rest


class Decide(Protocol):
    """What one idle worker does now; see decide."""

    def __call__(self, busy: Sequence[Load], costs: Costs | None, *, can_learn: bool, can_score: bool) -> Task: ...


def decide(busy: Sequence[Load], costs: Costs | None, *, can_learn: bool, can_score: bool) -> Task:
    """What one idle worker does now: the task that saves the most seconds, now or later.

    A takeover saves what it takes off the time until the last sequence is finished; training is worth LEARN_WORTH of
    the time it gets, also of what a takeover leaves of it. costs None: nothing is measured yet, so nothing is moved.
    Scoring what is finished takes moments, and spares all workers as many: it goes before training.
    """
    otherwise: Task = Score() if can_score else Learn() if can_learn else Rest()
    worth = LEARN_WORTH if can_learn else 0.0
    if costs is None:
        return otherwise
    finish = [finish_s(load.remaining, costs) for load in busy]
    end = max(finish, default=0.0)
    best, best_saved = otherwise, worth * end
    for load, alone in zip(busy, finish, strict=True):
        if alone < end:
            continue  # taking work from any but the last to finish shortens nothing
        others = max((s for other, s in zip(busy, finish, strict=True) if other is not load), default=0.0)
        for count in counts(len(load.remaining)):
            taken = costs.move_s + finish_s(load.remaining[:count], costs)
            new_end = max(others, taken, finish_s(load.remaining[count:], costs))
            saved = end - new_end + worth * (new_end - taken)
            if saved > best_saved:
                best, best_saved = TakeOver(load.worker, count), saved
    return best


def counts(total: int) -> list[int]:
    """How many of a worker's sequences to consider taking: half at most, each number while they are few."""
    few = list(range(1, min(total // 2, 8) + 1))
    return few + [total * eighths // 16 for eighths in range(1, 9) if total * eighths // 16 > 8]


def finish_s(remaining: Sequence[float], costs: Costs) -> float:
    """Seconds until one worker has sampled so many tokens of each sequence, at most costs.slots of them at a time.

    Those that wait start in the order given. All that run advance together, at the rate of their number.
    """
    waiting = list(remaining[costs.slots :])[::-1]
    ends = list(remaining[: costs.slots])  # by tokens that each running sequence has been given since the start
    heapify(ends)
    now = seconds = 0.0
    while ends:
        running = len(ends)
        end = heappop(ends)
        seconds += (end - now) * costs.rate.seconds(running)
        now = end
        if waiting:
            heappush(ends, now + waiting.pop())
    return seconds


def expected_remaining(length: int, finished: Sequence[int], limit: int) -> float:
    """Tokens a response that has length of them will still take: what responses that came as far took on average.

    finished: lengths of finished responses, of this step and those before. Where none came as far: as many again, the
    rule of heavy tails (of Lindy's). limit: of a response.
    """
    further = [other - length for other in finished if other > length]
    expected = fmean(further) if further else float(max(length, 1))
    return min(expected, float(limit - length))


def fit_rate(samples: Sequence[tuple[int, float]]) -> DecodeRate | None:
    """The line through (sequences running, seconds a token), by least squares, neither part negative; None of none."""
    if not samples:
        return None
    mean_running = fmean(running for running, _ in samples)
    mean_s = fmean(seconds for _, seconds in samples)
    variance = sum((running - mean_running) ** 2 for running, _ in samples)
    if not variance:
        # from one batch size nothing is known about others: their cycles take as long, so that moving seems to save
        # nothing but waiting
        return DecodeRate(mean_s, 0.0)
    slope = sum((running - mean_running) * (seconds - mean_s) for running, seconds in samples) / variance
    slope = min(max(slope, 0.0), mean_s / mean_running)
    return DecodeRate(mean_s - slope * mean_running, slope)

"""What became of workers' time in one call: when each was free, and what it did from then on."""

from dataclasses import dataclass
from time import perf_counter


@dataclass(slots=True)
class IdleReport:
    """What became of workers' time between the end of their own rollouts and the end of all, in worker-seconds.

    idle_s: all of it; sampled_s: sequences taken over; learned_s: optimiser steps of the drafter; scored_s: finished
    rollouts under the reference policy. seconds: of the whole call. num_moved: sequences taken over.
    """

    seconds: float = 0.0
    idle_s: float = 0.0
    sampled_s: float = 0.0
    learned_s: float = 0.0
    scored_s: float = 0.0
    num_moved: int = 0

    @property
    def used(self) -> float:
        """Share of the idle time that was put to use; 1 where there was none."""
        return (self.sampled_s + self.learned_s + self.scored_s) / self.idle_s if self.idle_s else 1.0

    def figures(self) -> dict[str, float]:
        """For a step's record."""
        return {
            "idle_seconds": self.idle_s,
            "idle_used_share": self.used,
            "sequences_moved": self.num_moved,
            "learned_seconds": self.learned_s,
            "scored_seconds": self.scored_s,
        }


class Ledger:
    """One call's, by the driver's clock."""

    def __init__(self) -> None:
        self.begun = self.ended = perf_counter()  # ended: when the last rollout arrived
        self.freed: dict[int, float] = {}  # when a worker's own share was done
        self.num_moved = 0  # sequences taken over
        self._sampled: list[tuple[float, float]] = []
        self._learned: list[tuple[float, float]] = []
        self._scored: list[tuple[float, float]] = []

    def arrived(self) -> None:
        """A rollout is there."""
        self.ended = perf_counter()

    def streamed(self, number: int, begun: float, *, lost: bool) -> None:
        """A worker has sampled since begun: its own share, or what it took over."""
        now = perf_counter()
        if number in self.freed:
            self._sampled.append((begun, now))
        elif not lost:
            self.freed[number] = now

    def learned(self, begun: float, trained_s: float) -> None:
        """A turn of learning began then, and trained for so long."""
        self._learned.append((begun, trained_s))

    def scored(self, begun: float) -> None:
        """A worker has scored rollouts since then."""
        self._scored.append((begun, perf_counter()))

    def report(self) -> IdleReport:
        """What became of the idle time."""
        end = self.ended
        return IdleReport(
            seconds=end - self.begun,
            idle_s=sum(max(0.0, end - freed) for freed in self.freed.values()),
            sampled_s=sum(min(until, end) - begun for begun, until in self._sampled),
            scored_s=sum(max(0.0, min(until, end) - begun) for begun, until in self._scored),
            learned_s=sum(max(0.0, min(trained_s, end - begun)) for begun, trained_s in self._learned),
            num_moved=self.num_moved,
        )

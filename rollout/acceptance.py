"""How many drafted tokens are accepted: counters that forget, by depth, for one source of drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

# Counters hold the evidence of about this many trials, so a half-life of 0.7 times as many.
MAX_TRIALS = 512
MAX_COVERAGE_ROWS = 128
RENEWED_ROWS = 16.0  # that the share of rows with a draft weighs when the source's weights are others
# What a source is given before it has been tried: hopeful, and outvoted by a handful of rows. What has not been tried
# of a depth is expected of it as it was seen one level above.
HOPE = 0.6
HOPE_TRIALS = 2.0


@dataclass(slots=True)
class Share:
    """Hits per trial, of which the latest count in full and earlier ones less and less."""

    hits: float
    trials: float

    @property
    def rate(self) -> float:
        return self.hits / self.trials

    def add(self, hits: float, trials: float, *, limit: float) -> None:
        """Count trials, and let the evidence weigh no more than limit trials in all."""
        self.hits += hits
        self.trials += trials
        if self.trials > limit:
            self.weaken(limit)

    def weaken(self, limit: float) -> None:
        """Keep the rate; let it weigh at most limit trials."""
        if self.trials > limit:
            self.hits *= limit / self.trials
            self.trials = limit

    def fade(self, factor: float) -> None:
        """Keep the rate; let it weigh less."""
        self.hits *= factor
        self.trials *= factor


class Acceptance:
    """What one source's drafts are worth: which rows get one, and how deep it is followed.

    A depth's trials are the drafts that were followed to the depth above it, so gain is a sum of running products.
    """

    def __init__(self, max_depth: int) -> None:
        self._depths = [Share(0.0, 0.0) for _ in range(max_depth)]
        self._expected = [HOPE] * max_depth
        self._coverage = Share(HOPE_TRIALS, HOPE_TRIALS)
        self._gains = [0.0] * (max_depth + 1)
        self.untried = True
        self._sum_up()

    @property
    def coverage(self) -> float:
        """Share of rows that had a draft lately."""
        return self._coverage.rate

    @property
    def rows(self) -> float:
        """Rows that the evidence weighs."""
        return self._coverage.trials

    def gain(self, depth: int) -> float:
        """Tokens accepted of a draft this many levels deep."""
        return self._gains[depth]

    def rates(self) -> list[float]:
        """Share accepted at each depth of what was accepted above it."""
        return list(self._expected)

    def observe(self, rows: int, drafted: int, accepted: Sequence[int]) -> None:
        """Of these rows, drafted had a draft, and accepted[d] of those were followed d + 1 levels down."""
        self.untried = False
        self._coverage.add(drafted, rows, limit=MAX_COVERAGE_ROWS)
        trials = drafted
        for share, hits in zip(self._depths, accepted, strict=False):  # a shallower strategy says nothing of below
            if not trials:
                break
            share.add(hits, trials, limit=MAX_TRIALS)
            trials = hits
        self._sum_up()

    def renew(self) -> None:
        """The source drafts with other weights: at least as good as those it had, or else as one that is untried."""
        self._coverage.weaken(RENEWED_ROWS)
        if self._coverage.rate < HOPE:
            self._coverage = Share(HOPE_TRIALS, HOPE_TRIALS)
            self.untried = True
        for share, expected in zip(self._depths, self._expected, strict=True):
            share.hits, share.trials = max(HOPE, expected) * HOPE_TRIALS, HOPE_TRIALS
        self._sum_up()

    def weaken(self, limit: float) -> None:
        """Let what comes next count for more: what was seen before may no longer hold."""
        self._coverage.weaken(limit)
        for share in self._depths:
            share.weaken(limit)

    def _sum_up(self) -> None:
        reached, total, expected = 1.0, 0.0, HOPE
        for depth, share in enumerate(self._depths):
            expected = (share.hits + HOPE_TRIALS * expected) / (share.trials + HOPE_TRIALS)
            self._expected[depth] = expected
            reached *= expected
            total += reached
            self._gains[depth + 1] = total

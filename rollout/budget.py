"""What trying may cost: budgets of seconds that are earned before they are spent, so that hope alone spends little."""

from collections import deque
from collections.abc import Collection

Arm = int
Place = tuple[Arm, int]  # an arm, and the rows its graphs are for

PURSE_SHARE = 0.005  # of all time may be lost to drafts that bring nothing
PURSE_CYCLES = 2.0  # plain cycles' worth of loss allowed ahead of that
EARNED_CYCLES = 8.0  # plain cycles' worth that time alone may earn, or that may be owed
SAVED_CYCLES = 32.0  # and that drafts which bring something may save up, against those that do not
LATE_CYCLES = 8  # after which a cycle that is not reported never ran

CAPTURE_CYCLES = 20.0  # plain cycles that a capture takes, before any is seen
CAPTURES = 15  # that are remembered
CAPTURE_SHARE = 0.004  # of all time may go into graphs of drafts that bring nothing
SAVED_SHARE = 1.0  # and of the time that drafts have saved, into graphs for more of them
FIRST_CAPTURES, MOST_CAPTURES = 8.0, 16.0  # captures' worth allowed ahead of that, and that may be saved up
DEAREST = 4.0  # captures' worth that one is charged at most: the first ones compile too, for whoever comes next


class Purse:
    """What drafting may lose against plain decoding: what it has saved, and a share of all time.

    A cycle that drafts sets aside what it loses should nothing be accepted, and settles when it is reported. So no
    strategy, however wrong its estimate, costs more than the share and what drafts have saved before it.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None  # None before a plain cycle is known
        self._aside: deque[tuple[int, Arm, float]] = deque()  # cycle, arm, seconds

    def affords(self, loss_s: float) -> bool:
        """Whether a cycle may lose so much."""
        return self._seconds is not None and loss_s <= self._seconds

    def can_earn(self, loss_s: float, plain_s: float) -> bool:
        """Whether time alone will bring in so much, a plain cycle taking plain_s."""
        return loss_s <= EARNED_CYCLES * plain_s

    def set_aside(self, cycle: int, arm: Arm, loss_s: float) -> None:
        """A cycle is about to run that loses so much at most."""
        assert self._seconds is not None
        self._seconds -= loss_s
        self._aside.append((cycle, arm, loss_s))

    def settle(self, cycle: int, arm: Arm, seconds: float, saved_s: float, plain_s: float) -> None:
        """A cycle took so many seconds, and saved so many against plain ones, of which one takes plain_s."""
        if self._seconds is None:
            self._seconds = PURSE_CYCLES * plain_s
        held = 0.0
        for entry in list(self._aside):
            if entry[0] < cycle - LATE_CYCLES:
                self._aside.remove(entry)
                self._seconds += entry[2]
        for entry in self._aside:
            if entry[1] == arm:
                self._aside.remove(entry)
                held = entry[2]
                break
        earned = max(0.0, min(PURSE_SHARE * seconds, EARNED_CYCLES * plain_s - self._seconds))
        self._seconds = max(-EARNED_CYCLES * plain_s, self._seconds + earned + held + saved_s)
        self._seconds = min(self._seconds, max(SAVED_CYCLES, EARNED_CYCLES) * plain_s)


class Captures:
    """Which graphs there are, what another one costs, and what may be spent on it.

    An arm's first cycle at a number of rows captures its graphs, and may compile their kernels; reports say what that
    took. Where that is nothing, as on a device without graphs, everything is free.
    """

    def __init__(self) -> None:
        self._ready: set[Place] = set()
        self._seen: deque[float] = deque(maxlen=CAPTURES)
        self._funds = 0.0  # seconds earned and saved, less those spent
        self._plain_s = 0.0
        self.spent_s = 0.0

    @property
    def cost_s(self) -> float:
        """What the next capture is expected to take: the mean of those seen, the dearest of them left out."""
        assumed = CAPTURE_CYCLES * self._plain_s
        if not self._seen:
            return assumed
        dearest = max(self._seen)
        return (sum(self._seen) - dearest + min(dearest, assumed)) / len(self._seen)

    def ready(self, place: Place) -> bool:
        """Whether these graphs are there, or cost nothing."""
        return place in self._ready or (bool(self._seen) and not any(self._seen))

    def has_any(self, arms: Collection[Arm]) -> bool:
        """Whether any of these arms has graphs, for whatever number of rows."""
        return any(arm in arms for arm, _ in self._ready)

    def affords(self, *, ahead: float = FIRST_CAPTURES) -> bool:
        """Whether there is enough for another one, so many captures' worth being allowed ahead of what was earned."""
        return self.cost_s * (1.0 - ahead) <= self._funds

    def observe(self, place: Place, capture_s: float, seconds: float, saved_s: float, plain_s: float) -> None:
        """A cycle ran there, and captured for so long."""
        self._plain_s = plain_s
        self._funds += CAPTURE_SHARE * seconds + SAVED_SHARE * max(0.0, saved_s)
        if place in self._ready and capture_s:  # evicted, or all are gone because memory has moved
            self._ready.clear()
        if place not in self._ready:
            if place[0]:
                charge = min(capture_s, DEAREST * self.cost_s)
                self._funds -= charge
                self.spent_s += charge
            if capture_s or not any(self._seen):  # else it was there all along: what others took it does not tell
                self._seen.append(capture_s)
            self._ready.add(place)
        self._funds = min(self._funds, (MOST_CAPTURES - FIRST_CAPTURES) * self.cost_s)

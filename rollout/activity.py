"""What an engine does now and has done in a step, counted so cheaply that every cycle is: integers, and a host's clock.

Nothing here waits for a device. A cycle on a GPU is counted when the host has launched it or read its results, a cycle
or two from when it ran.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from drafter.types import OFF, Strategy
from rollout.types import Activity, Span

SHORT_S = 0.05  # a span shorter than that joins the one after it
LONG_S = 5.0  # a span longer than that is ended and another begun: whoever watches sees a long rollout go on
KEPT = 128  # spans; they are asked for every second at least, in which a few are made


@dataclass(slots=True)
class _Growing:
    kind: Literal["decode", "prefill"]
    begin: float
    end: float


class Tally:
    """Counts over the generates of one step, and the spans of time they took. step: of the sampling."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.is_over = False  # the weights have changed since
        self.tokens = 0  # committed
        self.preempted = 0  # by schedulers before the present one
        self._strategy: Strategy = OFF
        self._prefills = False
        self._cycles: dict[str, int] = {}
        self._spans: deque[Span] = deque(maxlen=KEPT)
        self._growing: list[_Growing] = []  # the last two, which may still be joined to what follows

    def cycle(self, strategy: Strategy | None, *, prefills: bool) -> None:
        """A cycle is made with this strategy, None where nothing is sampled; whether it computes prompts."""
        self._prefills = prefills
        if strategy is not None:
            self._strategy = strategy
            self._cycles[strategy.source] = self._cycles.get(strategy.source, 0) + 1

    def spent(self, begin: float, end: float) -> None:
        """The last cycle took from one moment of time.time() to another."""
        kind: Literal["decode", "prefill"] = "prefill" if self._prefills else "decode"
        growing = self._growing
        if growing and begin - growing[-1].end < SHORT_S:
            last = growing[-1]
            if last.kind == kind:
                if end - last.begin < LONG_S:
                    last.end = end
                    return
            elif last.end - last.begin < SHORT_S:
                growing.pop()
                if growing and growing[-1].kind == kind and last.begin - growing[-1].end < SHORT_S:
                    growing[-1].end = end
                else:
                    growing.append(_Growing(kind, last.begin, end))
                return
        growing.append(_Growing(kind, begin, end))
        if len(growing) > 2:
            self._spans.append(_over(growing.pop(0)))

    def activity(self, *, running: int, waiting: int, preempted: int, is_generating: bool) -> Activity:
        """The counts, and the spans that are over: while a generate is under way the last ones may still grow.

        preempted: by the present scheduler.
        """
        over = self._growing
        if is_generating and over:
            is_short = over[-1].end - over[-1].begin < SHORT_S
            over = over[: -2 if is_short else -1]
        return Activity(
            step=self.step,
            running=running,
            waiting=waiting,
            tokens=self.tokens,
            strategy=label(self._strategy) if running else "off",
            cycles=dict(self._cycles),
            preempted=self.preempted + preempted,
            spans=(*self._spans, *map(_over, over)),
        )


def label(strategy: Strategy) -> str:
    """A strategy in a word or two: "off", or source, depth, children a node and drafted tokens verified."""
    if strategy.source == "off":
        return "off"
    return f"{strategy.source} d{strategy.depth} k{strategy.top_k} v{strategy.num_verify}"


def _over(span: _Growing) -> Span:
    return Span(span.kind, span.begin, span.end)

"""What a run does while it does it: the curve of a step's rollouts, and who spent time on what.

metrics/curve.jsonl: while rollouts are sampled, how many are done, and what every worker does.
metrics/lanes.jsonl: spans of time by worker, -1 for the driver, as they end; those of one worker never overlap.
trace/step_N.json.gz: both for one step, for Perfetto.
Nothing here may end a run or slow it down: what cannot be written is missed, and said once.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from configs.schema import Config
from rl.metrics import Stopwatch
from rl.rundir import RunDir
from rl.trace import KEPT_TRACES, Lane, step_trace
from rollout.types import Activity, Engine, Rollout, Sampling

CURVE_S = 0.25  # between two lines of the curve at least, once the step is a second old
YOUNG_S = 0.05  # before: a step may be over in half a second
SLOWEST_S = 1.0  # and at most, in long rollouts: whoever watches is never further behind
LINES = 240  # of a step's curve, after which lines come slower
IDLE_S = 0.05  # a gap that long between a worker's spans is one of its own

# Phases of the loop that are spans, by whose they are. Rollouts are the engines' own to tell.
OF_TRAINERS = ("train", "warmstart")
OF_ENGINES = ("drafter",)
OF_BOTH = ("sync",)
OF_DRIVER = ("reward", "checkpoint", "eval")
DRIVER = -1

log = logging.getLogger(__name__)


class Recorder:
    """Records one run, step after step.

    Workers have the numbers that errors and logs call them by: those that only train come first. An engine that
    several workers share has the first one's.
    """

    def __init__(self, run: RunDir, engine: Engine, config: Config) -> None:
        compute = config.compute
        self._run = run
        self._engine = engine
        self._num_trainers = compute.workers if compute.placement == "separate" else 0
        self._team = config.rollout.tensor_parallel
        self._step = 0
        self._begun = time.time()
        self._lanes: list[Lane] = []  # of the step at hand, like the next
        self._curve: list[dict[str, Any]] = []
        self._told: dict[int, float] = {}  # by worker, when the last of its spans ended that was taken from the engine
        self._inside = False  # of a span of the loop
        self._failed = False

    def begin(self, step: int) -> Stopwatch:
        """A step begins, counted from 1; the clock whose phases become spans."""
        self._step, self._begun = step, time.time()
        self._lanes, self._curve = [], []
        return Stopwatch(self.span)

    def end(self) -> None:
        """The step is over, its checkpoint written: the idle time in it, and its trace."""
        now = time.time()
        self._take_spans()
        idle = [lane for number in sorted({*self._engines, *self._trainers}) for lane in self._gaps(number, now)]
        self._keep_lanes(idle)
        self._keep_trace()

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """A phase of the loop, of workers or of the driver; what is inside another is part of that."""
        workers = self._who(phase)
        if self._inside or not workers:
            yield
            return
        begin, self._inside = time.time(), True
        try:
            yield
        finally:
            self._inside = False
            self._take_spans()
            self._keep_lanes([Lane(self._step, worker, phase, begin, time.time()) for worker in workers])

    async def watched(
        self, rollouts: AsyncGenerator[Rollout], sampling: Sampling, *, total: int
    ) -> AsyncGenerator[Rollout]:
        """The same rollouts, so many in total, and the curve of them beside."""
        finished = 0

        def look() -> None:
            self._take_spans()
            self._keep_point(sampling, total=total, finished=finished)

        look()  # whoever watches sees the step begin
        watching = asyncio.create_task(_again_and_again(look))
        try:
            async with aclosing(rollouts):
                async for rollout in rollouts:
                    finished += 1
                    yield rollout
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            look()

    @property
    def _engines(self) -> Sequence[int]:
        """Workers that sample, in the order of the engine's activity."""
        return [self._num_trainers + each * self._team for each in range(max(1, len(self._engine.activity())))]

    @property
    def _trainers(self) -> Sequence[int]:
        """Workers that train; those that sample where none does nothing else."""
        return range(self._num_trainers) if self._num_trainers else self._engines

    def _who(self, phase: str) -> Sequence[int]:
        """Whose span a phase is; nobody's where it is none."""
        if phase in OF_DRIVER:
            return (DRIVER,)
        engines = self._engines if phase in (*OF_ENGINES, *OF_BOTH) else ()
        trainers = self._trainers if phase in (*OF_TRAINERS, *OF_BOTH) else ()
        return sorted({*engines, *trainers})

    def _keep_point(self, sampling: Sampling, *, total: int, finished: int) -> None:
        """One line of the curve."""
        # what has not been heard of since the last step, or lost since, has done nothing in this one
        workers = [each if each.step == sampling.step else Activity() for each in self._engine.activity()]
        point: dict[str, Any] = {"step": self._step}
        if sampling.step < 0:
            point["eval"] = True
        point |= {
            "time": time.time(),
            "finished": finished,
            "total": total,
            "tokens": sum(each.tokens for each in workers),
            "workers": [
                {
                    "worker": number,
                    "running": each.running,
                    "waiting": each.waiting,
                    "strategy": each.strategy,
                    "cycles": each.cycles,
                    "preempted": each.preempted,
                    "tokens": each.tokens,
                }
                for number, each in zip(self._engines, workers, strict=False)
            ],
        }
        self._curve.append(point)
        self._append("curve", [point])

    def _take_spans(self) -> None:
        """What workers have done since it was asked last."""
        lanes = []
        for number, activity in zip(self._engines, self._engine.activity(), strict=False):
            told = self._told.get(number, 0.0)
            for span in activity.spans:
                if span.begin >= told:
                    told = span.end
                    lanes.append(Lane(self._step, number, span.kind, span.begin, span.end))
            self._told[number] = told
        self._keep_lanes(lanes)

    def _gaps(self, worker: int, end: float) -> list[Lane]:
        """When a worker did nothing in this step."""
        reached, gaps = self._begun, []
        for lane in sorted((lane for lane in self._lanes if lane.worker == worker), key=lambda lane: lane.begin):
            gaps.append((reached, lane.begin))
            reached = max(reached, lane.end)
        gaps.append((reached, end))
        return [Lane(self._step, worker, "idle", begin, until) for begin, until in gaps if until - begin >= IDLE_S]

    def _keep_lanes(self, lanes: Sequence[Lane]) -> None:
        if lanes:
            self._lanes += lanes
            self._append("lanes", [lane.record() for lane in lanes])

    def _keep_trace(self) -> None:
        with self._missed():
            folder = self._run.path / "trace"
            folder.mkdir(exist_ok=True)
            (folder / f"step_{self._step}.json.gz").write_bytes(step_trace(self._lanes, self._curve, self._begun))
            (folder / f"step_{self._step - KEPT_TRACES}.json.gz").unlink(missing_ok=True)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with self._missed(), (self._run.path / "metrics" / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)

    @contextmanager
    def _missed(self) -> Iterator[None]:
        """What cannot be written inside is not."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning("curve, lanes and traces of this run are incomplete: %s", error)
            self._failed = True


def sooner(usual_s: float, elapsed_s: float) -> float:
    """How long to wait between two looks at what began so long ago: less than usual at first, so that what is over
    quickly is seen too."""
    return min(usual_s, max(YOUNG_S, elapsed_s / 4))


async def _again_and_again(look: Callable[[], None]) -> None:
    begun = time.monotonic()
    while True:
        elapsed = time.monotonic() - begun
        await asyncio.sleep(min(SLOWEST_S, max(sooner(CURVE_S, elapsed), elapsed / LINES)))
        look()

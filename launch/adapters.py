"""The loop's objects over Ray actors, one adapter for each protocol: engine and trainer of all workers.

A worker that is lost takes no part any more: the engine does without it, as launch/learners.py does; the trainer
cannot.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from drafter.report import LearnStats
from launch.fleet import Fleet, WorkerLostError, silent
from launch.noted import earliest, note, one_line, waiting_for
from launch.pace import Key
from launch.pulse import ASK_S, death, first_gone, silence, who
from launch.shift import sample
from rl.types import Batch, StepStats
from rollout.types import Activity, Partial, Prompt, Rollout, Sampling

GRACE_S = 5.0  # after a worker's error, for others to end too: the first heard is not always the first cause

# Limits, in seconds, of calls whose worker shows no life meanwhile; past them it counts as lost. What launch.shift asks
# of a worker has limits there, and a generate none: its worker is asked how far it is.
LESSON_S = 600.0  # one part of a lesson: compiling the drafter, judging it, moving deltas; or copying the policy
TRAIN_S = 7200.0  # a step on the longest batch, a checkpoint on slow storage; ranks wait for one another in it


class RayMember:
    """launch.fleet.Member over a worker actor."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, partials: Sequence[Partial]
    ) -> AsyncGenerator[Rollout]:
        """As Member says."""
        refs = self.handle.generate.options(num_returns="streaming").remote(prompts, sampling, partials)
        ended = False
        try:
            async for ref in refs:
                yield await ref
            ended = True
        except ray.exceptions.RayError as error:
            ended = True
            cause = first_cause(error)
            raise (await self._torn(cause) if is_collective(cause) else cause) from error
        finally:
            if not ended:
                ray.cancel(refs)

    async def surrender(self, count: int) -> list[Partial]:
        """As Member says."""
        return await self._call("surrender", count)

    async def adopt(self, partials: Sequence[Partial]) -> bool:
        """As Member says."""
        return await self._call("adopt", partials)

    async def progress(self) -> dict[Key, int]:
        """As Member says."""
        return await self._call("progress")

    async def activity(self) -> Activity:
        """As Member says."""
        return await self._call("activity")

    async def learn(self, turn: int) -> float:
        """As Member says."""
        stats: LearnStats = await self._call("learn", turn, math.inf)
        return stats.seconds

    async def score(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> dict[Key, list[float]]:
        """As Member says."""
        return await self._call("score", pairs)

    async def call_away(self, turn: int) -> None:
        """As Member says."""
        await self._call("call_away", turn)

    async def _torn(self, cause: Exception) -> Exception:
        """What is said of a team whose first rank lost another: who is gone, once that is known."""
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(ASK_S)
            try:
                await self.handle.alive.remote()
            except ray.exceptions.RayError as error:
                return first_cause(error)
        return WorkerLostError(f"the ranks of a team lost touch ({one_line(cause)}); resume the run")

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            return await getattr(self.handle, method).remote(*args)
        except ray.exceptions.RayError as error:
            raise first_cause(error) from error


class RayEngine:
    """An Engine over every worker's engine. bring: has a version of the policy reach them, where they do not train."""

    def __init__(self, workers: Sequence[Any], fleet: Fleet, bring: Callable[[int], int] | None = None) -> None:
        self.workers = workers
        self.fleet = fleet
        self._bring = bring

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
        """Merge the workers' streams as rollouts finish; whoever is done early takes over or learns."""
        return sample(self.fleet, prompts, sampling)

    def activity(self) -> list[Activity]:
        """What every worker last said it does; half a second old at most, while it answers."""
        return self.fleet.activity()

    def references(self) -> dict[Key, list[float]]:
        """What idle workers computed of the rollouts of the last generate."""
        return self.fleet.references

    def figures(self) -> dict[str, Any]:
        """What became of workers' time between the end of their own rollouts and the end of all."""
        return self.fleet.report.figures()

    def update(self, version: int) -> int:
        """Every worker's engine is at this version, and forgets what it computed with the old weights."""
        sent = 0 if self._bring is None else self._bring(version)
        return sent + sum(on_alive(self.workers, self.fleet, "update", version, limit_s=LESSON_S).values())

    def state_dict(self) -> dict[str, Any]:
        """One state a worker, None of one that is lost, and what spreads prompts over them."""
        told = on_alive(self.workers, self.fleet, "engine_state", limit_s=TRAIN_S)
        states = [told.get(number) for number in range(len(self.workers))]
        return {"workers": states, "lengths": self.fleet.lengths.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give every worker the state it saved; one that was lost then begins anew."""
        pairs = zip(self.workers, state["workers"], strict=True)
        refs = {
            self.fleet.number(member): worker.load_engine_state.remote(saved)
            for member, (worker, saved) in enumerate(pairs)
            if saved
        }
        gather(refs, "load_engine_state", limit_s=TRAIN_S)
        self.fleet.lengths.load_state_dict(state["lengths"])


class RayTrainer:
    """A Trainer over every worker's trainer: each is given the whole batch and takes its share.

    Everything raises ResourceError once a worker is lost, at once: the others would wait for it.
    """

    def __init__(self, workers: Sequence[Any], fleet: Fleet) -> None:
        self.workers = workers
        self.fleet = fleet
        self.changes = 0  # of the policy

    def step(self, batch: Batch) -> StepStats:
        """Trainer.step on all ranks at once; the statistics are those of the whole batch."""
        self.changes += 1
        return on_all(self.workers, self.fleet, "step", batch, limit_s=TRAIN_S)[0]

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        """Trainer.supervise on all ranks at once."""
        self.changes += 1
        return on_all(self.workers, self.fleet, "supervise", batch, lr, limit_s=TRAIN_S)[0]

    def save(self, folder: Path) -> None:
        """All ranks gather, rank 0 writes: folder must be on storage that rank 0's node shares with the driver."""
        on_all(self.workers, self.fleet, "save", folder.absolute(), limit_s=TRAIN_S)

    def load(self, folder: Path) -> None:
        """All ranks read the same folder."""
        self.changes += 1
        on_all(self.workers, self.fleet, "load", folder.absolute(), limit_s=TRAIN_S)


def on_all(workers: Sequence[Any], fleet: Fleet, method: str, *args: Any, limit_s: float) -> list[Any]:
    """Call a method on every worker at once and return their results by rank.

    Raises the first error at once, WorkerLostError too: others may be waiting for the one that is lost.
    """
    for error in fleet.lost.values():
        raise error
    refs = {fleet.number(member): getattr(worker, method).remote(*args) for member, worker in enumerate(workers)}
    return gather(refs, method, limit_s=limit_s)


def gather(refs: Mapping[int, Any], method: str, *, limit_s: float) -> list[Any]:
    """Results of a method by worker. Raises the first cause soon after an error, and WorkerLostError where one takes
    too long."""
    deadline_s = time.monotonic() + limit_s
    waiting = list(refs.values())
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline_s - time.monotonic()))
        if not done:
            raise silent([number for number, ref in refs.items() if ref in waiting], method, limit_s)
        try:
            get(done)
        except Exception as error:
            raise first_of(refs, waiting) from error
    return [get(ref) for ref in refs.values()]


def first_of(refs: Mapping[int, Any], waiting: Sequence[Any]) -> BaseException:
    """The first cause among the errors of workers, one of which has ended with one."""
    if waiting:
        ray.wait(list(waiting), num_returns=len(waiting), timeout=GRACE_S)
    errors: dict[int, BaseException] = {}
    for number, ref in refs.items():
        if ray.wait([ref], timeout=0)[0]:
            try:
                get(ref)
            except Exception as error:
                errors[number] = error
    absent = [number for number, ref in refs.items() if number not in errors and not ray.wait([ref], timeout=0)[0]]
    if all(is_collective(error) for error in errors.values()):
        return lost_touch(errors, absent)
    return earliest(errors, lambda error: isinstance(error, WorkerLostError))


def is_collective(error: BaseException) -> bool:
    """Whether a rank says no more than that another one did not take part."""
    # gloo raises plain RuntimeErrors, which name its source files
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def lost_touch(errors: Mapping[int, BaseException], absent: Sequence[int]) -> WorkerLostError:
    """What is said where ranks waited in vain for those that are absent, or for one another."""
    first = earliest(errors, lambda error: False)
    whom = ", ".join(f"worker {number}" for number in absent) or "one another"
    waited = ", ".join(f"worker {number}" for number in errors)
    gone = WorkerLostError(f"{waited} waited in vain for {whom} ({one_line(first)}); resume the run")
    gone.__cause__ = first
    waiting_for(gone, whom)
    return gone


def on_alive(workers: Sequence[Any], fleet: Fleet, method: str, *args: Any, limit_s: float) -> dict[int, Any]:
    """Call a method, which waits for nobody, on every worker alive; the results of those that survived it."""
    refs = {number: getattr(workers[number], method).remote(*args) for number in fleet.alive}
    return survivors(refs, fleet, method, limit_s=limit_s)


def survivors(refs: Mapping[int, Any], fleet: Fleet, method: str, *, limit_s: float) -> dict[int, Any]:
    """Results of a method by worker, without those of workers that are lost or do not answer in time."""
    results = {}
    deadline_s = time.monotonic() + limit_s
    for number, ref in refs.items():
        if number in fleet.lost:
            continue
        try:
            done, _ = ray.wait([ref], timeout=max(0.0, deadline_s - time.monotonic()))
            if not done:
                raise silent([fleet.number(number)], method, limit_s)
            results[number] = get(ref)
        except WorkerLostError as error:
            fleet.lose(number, error)
    return results


def get(refs: Any) -> Any:
    """ray.get of what is there, with a user's error as itself instead of wrapped in Ray's."""
    try:
        return ray.get(refs)
    except ray.exceptions.RayError as error:
        raise first_cause(error) from error


def lost(error: Any) -> WorkerLostError:
    """What is said of an actor that is gone."""
    first = first_gone(error.actor_id)
    name, life = who(first)
    said = silence(first) or death(error)
    gone = WorkerLostError(f"{name} (process {life.pid} on {life.host}) {said}; resume the run")
    note(gone, process=name, host=life.host, pid=life.pid)
    waiting_for(gone, name)
    return gone


def first_cause(error: Exception) -> Exception:
    """What went wrong in a worker, as itself instead of wrapped in Ray's error."""
    match error:
        case ray.exceptions.RayTaskError():
            return error.cause
        case ray.exceptions.RayActorError():
            return lost(error)
        case (
            ray.exceptions.WorkerCrashedError()
            | ray.exceptions.OutOfMemoryError()  # Ray killed it, its node being short of memory
            | ray.exceptions.ObjectLostError()
            | ray.exceptions.NodeDiedError()
        ):
            return WorkerLostError(f"a worker or its node died ({one_line(error)}); resume the run")
    return error

"""Workers without a cluster: their errors keep their exit codes, and learning ends when they are called away."""

import asyncio
import errno
import threading
from collections.abc import Callable

import pytest
import ray
from ray.exceptions import RayTaskError

from configs.errors import DataError, ResourceError
from drafter.report import LearnStats
from launch.actors import Worker
from launch.adapters import first_cause
from launch.exits import outcome
from launch.fleet import WorkerLostError


def test_a_workers_error_arrives_as_itself() -> None:
    for cause in (DataError("bad row"), OSError(errno.ENOSPC, "No space left on device"), MemoryError("no room")):
        wrapped = RayTaskError("step", "traceback", cause)
        assert first_cause(wrapped) is cause
        assert outcome(first_cause(wrapped)) == outcome(cause)


def test_a_worker_that_ray_killed_for_memory_is_lost() -> None:
    cause = first_cause(ray.exceptions.OutOfMemoryError("memory on the node was low"))
    assert isinstance(cause, WorkerLostError) and "memory on the node was low" in str(cause)


def test_a_dead_worker_is_a_matter_of_resources() -> None:
    error = first_cause(ray.exceptions.RayActorError())
    assert isinstance(error, ResourceError)
    assert "resume the run" in str(error)


class Stepping:
    """A learner whose steps each take until they are told to end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.num_steps = 0

    def learn(self, *, budget_s: float, until: Callable[[], bool]) -> LearnStats:
        before = self.num_steps
        while not until():
            self.begun.release()
            assert self.may_end.acquire(timeout=60)
            self.num_steps += 1
        return LearnStats(self.num_steps - before, 0.0, 0.0)


def test_a_worker_called_away_ends_the_step_it_is_at_and_begins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # a worker sets them
    worker = Worker(0, 1)
    worker.learner = learner = Stepping()  # type: ignore[assignment]

    async def called_away() -> None:
        learning = asyncio.create_task(worker.learn(4, 600.0))
        assert await asyncio.to_thread(learner.begun.acquire, timeout=60)
        worker.call_away(3)  # the turn before, late
        learner.may_end.release()
        assert await asyncio.to_thread(learner.begun.acquire, timeout=60), "it goes on"
        worker.call_away(4)
        learner.may_end.release()
        assert (await learning).num_steps == 2
        worker.call_away(6)
        assert (await worker.learn(6, 600.0)).num_steps == 0, "called away before it began"
        worker.call_away(5)
        assert (await worker.learn(6, 600.0)).num_steps == 0, "no turn comes back"

    asyncio.run(asyncio.wait_for(called_away(), 120))

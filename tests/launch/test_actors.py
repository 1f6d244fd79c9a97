"""Errors of workers, without a cluster: they keep their exit codes."""

import errno

import ray
from ray.exceptions import RayTaskError

from configs.errors import DataError, ResourceError
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

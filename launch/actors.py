"""The loop's objects behind Ray actors: one adapter for each protocol, the algorithm unchanged.

Every worker actor holds a policy with its trainer and its engine, exactly as one process does. The driver spreads
prompts over the workers' engines and hands each batch to all trainers, which share it and reduce their gradients.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.errors import PreflightError, ResourceError
from configs.schema import Config
from rl.types import Batch, StepStats
from rollout.types import Prompt, Rollout, Sampling

PLACEMENT_TIMEOUT_S = 120.0


class Worker:
    """Actor body: one rank. Methods mirror Engine and Trainer; generate streams."""

    def __init__(self, rank: int, world_size: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}

    def address(self) -> tuple[str, int]:
        """This node's address and a free port: where the ranks of rank 0's group meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, config: Config, path: Path, *, device: str, dtype: str, meet: tuple[str, int]) -> None:
        """Load the policy and join the other ranks."""
        from launch.cluster import build_worker

        os.environ |= {"MASTER_ADDR": meet[0], "MASTER_PORT": str(meet[1])}
        self.engine, self.trainer = build_worker(config, path, device=device, dtype=dtype)

    async def generate(self, prompts: list[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
        """Engine.generate on this worker's policy."""
        async for rollout in self.engine.generate(prompts, sampling):
            yield rollout

    def update(self, version: int) -> None:
        """Engine.update."""
        self.engine.update(version)

    def engine_state(self) -> dict[str, Any]:
        """Engine.state_dict."""
        return self.engine.state_dict()

    def load_engine_state(self, state: dict[str, Any]) -> None:
        """Engine.load_state_dict."""
        self.engine.load_state_dict(state)

    def step(self, batch: Batch) -> StepStats:
        """Trainer.step; the ranks share the batch and reduce among themselves."""
        return self.trainer.step(batch)

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        """Trainer.supervise."""
        return self.trainer.supervise(batch, lr)

    def save(self, folder: Path) -> None:
        """Trainer.save; rank 0 writes."""
        self.trainer.save(folder)

    def load(self, folder: Path) -> None:
        """Trainer.load."""
        self.trainer.load(folder)


class RayEngine:
    """An Engine over every worker's engine: prompt i goes to worker i modulo their number."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
        """Merge the workers' streams as rollouts finish."""
        finished: asyncio.Queue[Rollout | BaseException | None] = asyncio.Queue()

        async def drain(worker: Any, share: list[Prompt]) -> None:
            try:
                async for ref in worker.generate.options(num_returns="streaming").remote(share, sampling):
                    finished.put_nowait(await ref)
                finished.put_nowait(None)
            except Exception as error:
                finished.put_nowait(first_cause(error))

        shares = [list(prompts[rank :: len(self.workers)]) for rank in range(len(self.workers))]
        drains = [
            asyncio.create_task(drain(worker, share))
            for worker, share in zip(self.workers, shares, strict=True)
            if share
        ]
        try:
            running = len(drains)
            while running:
                item = await finished.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in drains:
                task.cancel()

    def update(self, version: int) -> None:
        """Every worker's engine forgets what it computed with the old weights."""
        on_all(self.workers, "update", version)

    def state_dict(self) -> dict[str, Any]:
        """One state a worker, by rank."""
        return {"workers": on_all(self.workers, "engine_state")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give every worker the state it saved."""
        get(
            [
                worker.load_engine_state.remote(saved)
                for worker, saved in zip(self.workers, state["workers"], strict=True)
            ]
        )


class RayTrainer:
    """A Trainer over every worker's trainer: each is given the whole batch and takes its share."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    def step(self, batch: Batch) -> StepStats:
        """Trainer.step on all ranks at once; the statistics are those of the whole batch."""
        return on_all(self.workers, "step", batch)[0]

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        """Trainer.supervise on all ranks at once."""
        return on_all(self.workers, "supervise", batch, lr)[0]

    def save(self, folder: Path) -> None:
        """All ranks gather, rank 0 writes: folder must be on storage that rank 0's node shares with the driver."""
        on_all(self.workers, "save", folder.absolute())

    def load(self, folder: Path) -> None:
        """All ranks read the same folder."""
        on_all(self.workers, "load", folder.absolute())


@contextmanager
def start_workers(config: Config, path: Path, *, device: str, dtype: str) -> Iterator[tuple[RayEngine, RayTrainer]]:
    """Start one actor a worker, on the cluster RAY_ADDRESS names or on a local one, and stop them at the end."""
    count = config.compute.workers
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise PreflightError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it, or unset it"
        ) from error
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
    group = placement_group([bundle] * count, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):
            raise ResourceError(
                f"compute.workers={count} need {bundle} each; the cluster has {ray.available_resources()} free; "
                "lower compute.workers or add nodes"
            )
        actor = ray.remote(Worker)
        workers = [
            actor.options(
                num_cpus=1,
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(rank, count)
            for rank in range(count)
        ]
        meet = get(workers[0].address.remote())
        get([worker.build.remote(config, path, device=device, dtype=dtype, meet=meet) for worker in workers])
        yield RayEngine(workers), RayTrainer(workers)
    finally:
        remove_placement_group(group)
        ray.shutdown()


def on_all(workers: list[Any], method: str, *args: Any) -> list[Any]:
    """Call a method on every worker at once and return their results by rank."""
    return get([getattr(worker, method).remote(*args) for worker in workers])


def get(refs: Any) -> Any:
    """ray.get, with a user's error as itself instead of wrapped in Ray's."""
    try:
        return ray.get(refs)
    except ray.exceptions.RayError as error:
        raise first_cause(error) from error


def first_cause(error: Exception) -> Exception:
    """What went wrong in a worker, as itself instead of wrapped in Ray's error."""
    match error:
        case ray.exceptions.RayTaskError():
            return error.cause
        case ray.exceptions.RayActorError():
            reason = str(error).strip().splitlines()[0]
            return ResourceError(f"a worker died ({reason}); it may have run out of memory; resume the run")
    return error

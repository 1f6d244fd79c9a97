"""The loop's objects behind Ray actors: one adapter for each protocol, the algorithm unchanged.

Every worker actor holds a policy with its trainer and its engine, exactly as one process does. The driver spreads
prompts over the workers' engines and hands each batch to all trainers, which share it and reduce their gradients.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs import faults
from configs.errors import PreflightError, ResourceError
from configs.schema import Config
from drafter.learner import DrafterReport, Learner, LearnStats, Replica, Standing
from drafter.publish import Judgement
from launch.adapters import RayEngine, RayMember, RayTrainer, gather
from launch.fleet import Fleet
from launch.idle import Decide, decide
from launch.learners import RayLearner
from launch.noted import noting
from launch.pace import Key
from launch.pulse import GROUP, Life, Pulse, life
from rl.types import Batch, StepStats, Trainer
from rollout.engine import NativeEngine
from rollout.types import Activity, Engine, Partial, Prompt, Rollout, Sampling

PLACEMENT_TIMEOUT_S = 120.0
SILENCE_S = 60.0  # of workers that write no checkpoint
BUILD_S = 3600.0  # for a worker's process to start, and for the largest policy to come from slow storage

# What a worker is made of. Without a trainer it only samples; without a learner there is no drafter to train.
Parts = tuple[Engine, Trainer | None, Learner | None]


@noting
class Worker:
    """Actor body: one rank. Methods mirror those of engine, trainer and learner; generate streams.

    All of them run in one thread, between two cycles of a generate; learning alone has its own, and never runs beside
    a generate: whoever gives the worker something to sample calls it away first.
    """

    def __init__(self, rank: int, world_size: int, planned: str = "", recovery: int = 0) -> None:
        """planned: faults, as PACELINE_FAULT has them at the driver; recovery: how many came before this worker."""
        faults.arm(planned, process=str(rank), recovery=recovery)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
        self.generating = asyncio.Lock()
        self.away_from = 0  # the last turn of learning that is over

    @ray.method(concurrency_group=GROUP)
    def alive(self) -> Life:
        """Who this is; answered by a thread of its own, whatever the other is at."""
        return life()

    def address(self) -> tuple[str, int]:
        """This node's address and a free port: where the ranks of rank 0's group meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, make: Callable[[], Parts], meet: tuple[str, int]) -> bool:
        """Load the policy and join the other ranks; whether there is a drafter to train."""
        os.environ |= {"MASTER_ADDR": meet[0], "MASTER_PORT": str(meet[1])}
        faults.hit("worker.build")
        engine, trainer, learner = make()
        assert isinstance(engine, NativeEngine)  # configs.check lets no other engine run under Ray
        self.engine = engine
        if trainer is not None:
            self.trainer = trainer
        if learner is not None:
            self.learner = learner
        return learner is not None

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, partials: Sequence[Partial]
    ) -> AsyncGenerator[Rollout]:
        """NativeEngine.generate on this worker's policy, once the one before has ended."""
        stream = self.engine.generate(prompts, sampling, partials=partials)
        async with self.generating, aclosing(stream) as rollouts:
            async for rollout in rollouts:
                yield rollout

    def surrender(self, count: int) -> list[Partial]:
        """NativeEngine.surrender, between two cycles."""
        return self.engine.surrender(count)

    def adopt(self, partials: Sequence[Partial]) -> bool:
        """NativeEngine.adopt, between two cycles; False where there is no generate under way that could."""
        if not self.engine.is_generating:
            return False
        self.engine.adopt(partials)
        return True

    def progress(self) -> dict[Key, int]:
        """NativeEngine.progress."""
        return self.engine.progress()

    def activity(self) -> Activity:
        """NativeEngine.activity."""
        return self.engine.activity()[0]

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

    def begin_learning(self, counts: torch.Tensor) -> None:
        """Learner.begin."""
        self.learner.begin(counts)

    async def learn(self, turn: int, budget_s: float) -> LearnStats:
        """Learner.learn, in a thread so that the actor still hears what it is told, until called away from the turn."""
        return await asyncio.to_thread(self.learner.learn, budget_s=budget_s, until=lambda: self.away_from >= turn)

    def call_away(self, turn: int) -> None:
        """End the learning of this turn and those before, begun or not, after the step it is at."""
        self.away_from = max(self.away_from, turn)

    def delta(self) -> tuple[bool, dict[str, torch.Tensor]]:
        """Learner.delta, and whether there is any."""
        delta = self.learner.delta()
        return bool(delta), delta

    def apply_deltas(self, *deltas: dict[str, torch.Tensor]) -> None:
        """Learner.apply."""
        self.learner.apply(deltas)

    def judge(self, version: int) -> Judgement | None:
        """Learner.judge."""
        return self.learner.judge(version)

    def conclude(self, judgement: Judgement | None) -> DrafterReport:
        """Learner.conclude."""
        return self.learner.conclude(judgement)

    def replica(self) -> Replica:
        """Learner.replica."""
        return self.learner.replica()

    def become(self, replica: Replica) -> Standing:
        """Learner.become."""
        return self.learner.become(replica)

    def give_up(self, reason: str) -> Standing:
        """Learner.give_up."""
        return self.learner.give_up(reason)

    def save_drafter(self, folder: Path) -> float:
        """Learner.save."""
        return self.learner.save(folder)

    def drafter_saved(self) -> None:
        """Learner.saved."""
        self.learner.saved()

    def load_drafter(self, folder: Path) -> None:
        """Learner.load."""
        self.learner.load(folder)


@contextmanager
def start_workers(
    config: Config, path: Path, *, device: str, dtype: str, recovery: int = 0
) -> Iterator[tuple[RayEngine, RayTrainer, RayLearner | None]]:
    """A run's engine, its trainer and, if it has one, its learner: one actor a worker, until the end of the block.

    recovery: how many times they have been started again. All are ranks of the trainer, so all end with one.
    """
    from launch.cluster import build_worker

    make = partial(build_worker, config, path, device=device, dtype=dtype)
    count, slots = config.compute.workers, config.rollout.max_running
    silence_s = config.run.silence_s
    with start_actors(make, count=count, device=device, slots=slots, silence_s=silence_s, recovery=recovery) as parts:
        parts[0].fleet.needs_all = True
        yield parts


@contextmanager
def start_actors(
    make: Callable[[], Parts],
    *,
    count: int,
    device: str,
    slots: int,
    decide: Decide = decide,
    silence_s: float = SILENCE_S,
    recovery: int = 0,
) -> Iterator[tuple[RayEngine, RayTrainer, RayLearner | None]]:
    """Start one actor a worker, on the cluster RAY_ADDRESS names or on a local one, and stop them at the end.

    make: called in each worker, after the variables by which ranks find one another are set. slots, decide: as Fleet's.
    silence_s: as Pulse's. recovery: as Worker's.
    """
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise PreflightError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it, or unset it"
        ) from error
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
    pulse: Pulse | None = None
    planned = os.environ.get(faults.VARIABLE, "")
    group = placement_group([bundle] * count, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):
            raise ResourceError(
                f"compute.workers={count} need {bundle} each; the cluster has {ray.available_resources()} free; "
                "lower compute.workers or add nodes"
            )
        actor = ray.remote(concurrency_groups={GROUP: 1})(Worker)
        workers = [
            actor.options(
                num_cpus=1,
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(rank, count, planned, recovery)
            for rank in range(count)
        ]
        pulse = Pulse(workers, silence_s=silence_s)
        (meet,) = gather({0: workers[0].address.remote()}, "address", limit_s=BUILD_S)
        refs = {rank: worker.build.remote(make, meet) for rank, worker in enumerate(workers)}
        learns = all(gather(refs, "build", limit_s=BUILD_S))
        fleet = Fleet([RayMember(worker) for worker in workers], slots=slots, learns=learns, decide=decide)
        learner = RayLearner(workers, fleet) if learns else None
        yield RayEngine(workers, fleet), RayTrainer(workers, fleet), learner
    finally:
        if pulse is not None:
            pulse.stop()
        remove_placement_group(group)
        ray.shutdown()

"""The workers of a run on a Ray cluster: where they are, what each is, and the loop's objects over them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs import faults
from configs.errors import ResourceError
from configs.schema import Config
from launch.actors import Parts, Worker
from launch.adapters import RayEngine, RayMember, RayTrainer, gather
from launch.delivery import Delivery
from launch.fleet import Fleet
from launch.idle import Decide, decide
from launch.joined import join
from launch.learners import RayLearner
from launch.parts import build_engine, build_trainer, build_worker
from launch.pulse import GROUP, Pulse
from rl.trainer import DeepSpeedTrainer

PLACEMENT_TIMEOUT_S = 120.0
SILENCE_S = 60.0  # of workers that write no checkpoint
BUILD_S = 3600.0  # for a worker's process to start, and for the largest policy to come from slow storage

Over = tuple[RayEngine, RayTrainer, RayLearner | None]  # the workers


def start_workers(
    config: Config, path: Path, *, device: str, dtype: str, recovery: int = 0
) -> AbstractContextManager[Over]:
    """A run's engine, its trainer and, if it has one, its learner, until the end of the block.

    recovery: how many times they have been started again.
    """
    start = {"colocated": _start_colocated, "separate": _start_separate}[config.compute.placement]
    return start(config, path, device=device, dtype=dtype, recovery=recovery)


@contextmanager
def _start_colocated(config: Config, path: Path, *, device: str, dtype: str, recovery: int) -> Iterator[Over]:
    """One actor a worker. All are ranks of the trainer, so all end with one."""
    make = partial(build_worker, config, path, device=device, dtype=dtype)
    count, slots = config.compute.workers, config.rollout.max_running
    silence_s = config.run.silence_s
    with start_actors(make, count=count, device=device, slots=slots, silence_s=silence_s, recovery=recovery) as parts:
        parts[0].fleet.needs_all = True
        parts[0].fleet.scores = DeepSpeedTrainer.scores_alone(config.train)
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
) -> Iterator[Over]:
    """Start one actor a worker, on the cluster RAY_ADDRESS names or on a local one, and stop them at the end.

    make: called in each worker, after the variables by which ranks find one another are set. slots, decide: as Fleet's.
    silence_s: as Pulse's. recovery: as Worker's.
    """
    asked = f"compute.workers={count}"
    with _placed([count], asked, device=device, silence_s=silence_s, recovery=recovery) as (workers,):
        learns = all(_build([(worker, make) for worker in workers]))
        fleet = Fleet([RayMember(worker) for worker in workers], slots=slots, learns=learns, decide=decide)
        learner = RayLearner(workers, fleet) if learns else None
        yield RayEngine(workers, fleet), RayTrainer(workers, fleet), learner


@contextmanager
def _start_separate(config: Config, path: Path, *, device: str, dtype: str, recovery: int) -> Iterator[Over]:
    """Actors that train and actors that sample. With one of the former all end; without one of the latter the others
    sample on."""
    compute = config.compute
    counts = [compute.workers, compute.rollout_workers]
    asked = f"compute.workers={counts[0]} and compute.rollout_workers={counts[1]}"
    train, sample = (partial(each, config, path, device=device, dtype=dtype) for each in (build_trainer, build_engine))
    with _placed(counts, asked, device=device, silence_s=config.run.silence_s, recovery=recovery) as actors:
        trainers, engines = actors
        learns = _build([*((each, train) for each in trainers), *((each, sample) for each in engines)])
        all_learn = all(learns[len(trainers) :])
        members, slots = [RayMember(each) for each in engines], config.rollout.max_running
        fleet = Fleet(members, slots=slots, learns=all_learn, first=len(trainers))
        trainer = RayTrainer(trainers, Fleet([], slots=1, learns=False))
        bucket_bytes = compute.bucket_mb << 20
        delivery = Delivery(trainers, engines, fleet, trainer, device=device, bucket_bytes=bucket_bytes)
        yield RayEngine(engines, fleet, delivery.bring), trainer, RayLearner(engines, fleet) if all_learn else None


@contextmanager
def _placed(
    counts: Sequence[int], asked: str, *, device: str, silence_s: float, recovery: int
) -> Iterator[list[list[Any]]]:
    """So many actors of each kind, each on a CPU and a GPU of its own, near to one another; stopped at the end.

    asked: by which options, for whoever asked for too many. Raises PreflightError and ResourceError.
    """
    join(os.environ.get("RAY_ADDRESS", "local"))  # not any other that this machine runs
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
    pulse: Pulse | None = None
    planned = os.environ.get(faults.VARIABLE, "")
    if "RAY_ADDRESS" not in os.environ and (short := shortage(ray.cluster_resources(), bundle, sum(counts))):
        ray.shutdown()
        raise ResourceError(f"{asked} need {short} on this machine; ask for fewer")
    group = placement_group([bundle] * sum(counts), strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):  # nodes may still join
            free = shortage(ray.available_resources(), bundle, sum(counts)) or "nodes with room for one each"
            raise ResourceError(
                f"{asked} need {free} free in the cluster after {PLACEMENT_TIMEOUT_S:g} s; ask for fewer, or add nodes"
            )
        kind = ray.remote(concurrency_groups={GROUP: 1})(Worker)
        actors = [
            kind.options(
                num_cpus=1,
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            ).remote(number, counts[0], planned, recovery)
            for number in range(sum(counts))
        ]
        pulse = Pulse(actors, silence_s=silence_s)
        yield [actors[sum(counts[:index]) :][:count] for index, count in enumerate(counts)]
    finally:
        if pulse is not None:
            pulse.stop()
        remove_placement_group(group)
        ray.shutdown()


def shortage(has: Mapping[str, float], each: Mapping[str, float], count: int) -> str:
    """Of what there is too little for so many workers, in words; "" where there is enough of everything."""
    lacking = {kind: count * size for kind, size in each.items() if has.get(kind, 0.0) < count * size}
    return ", ".join(f"{wanted:g} {kind}s and there are {has.get(kind, 0.0):g}" for kind, wanted in lacking.items())


def _build(made: Sequence[tuple[Any, Callable[[], Parts]]]) -> list[bool]:
    """Have every actor make its parts, the ranks meeting at the first one's; which have a drafter to train."""
    (meet,) = gather({0: made[0][0].address.remote()}, "address", limit_s=BUILD_S)
    refs = {number: actor.build.remote(make, meet) for number, (actor, make) in enumerate(made)}
    return gather(refs, "build", limit_s=BUILD_S)

"""The workers of a run on a Ray cluster: where they are, what each is, and the loop's objects over them."""

import os
from collections.abc import Callable, Iterator, Sequence
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
from launch.actors import Parts, Summons, Worker
from launch.adapters import RayEngine, RayMember, RayTrainer, gather
from launch.delivery import Delivery
from launch.fleet import Fleet
from launch.idle import Decide, decide
from launch.joined import join
from launch.learners import RayLearner
from launch.parts import build_engine, build_share, build_trainer, build_worker
from launch.pulse import GROUP, Pulse
from launch.room import asked_sizes, bundle, shortage, too_little
from rl.trainer import DeepSpeedTrainer
from rollout.team import Seat

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
    compute, team = config.compute, config.rollout.tensor_parallel
    counts = [compute.workers, compute.rollout_workers]
    train, sample = (partial(each, config, path, device=device, dtype=dtype) for each in (build_trainer, build_engine))
    asked, silence_s = asked_sizes(config), config.run.silence_s
    placed = _placed(counts, asked, device=device, silence_s=silence_s, recovery=recovery, team=team)
    with placed as (trainers, engines):
        making: list[tuple[Any, Callable[[], Parts]]] = [(each, train) for each in trainers]
        if team == 1:
            making += [(each, sample) for each in engines]
        else:
            share = partial(build_share, config, path, device=device, dtype=dtype)
            making += _seated(share, engines, team, timeout_s=config.run.collective_s)
        learns = _build(making)
        all_learn = all(learns[len(trainers) :])
        leaders, slots = engines[::team], config.rollout.max_running
        members = [RayMember(each) for each in leaders]
        fleet = Fleet(members, slots=slots, learns=all_learn, first=len(trainers), team=team)
        trainer = RayTrainer(trainers, Fleet([], slots=1, learns=False))
        bucket_bytes = compute.bucket_mb << 20
        delivery = Delivery(trainers, engines, fleet, trainer, device=device, bucket_bytes=bucket_bytes)
        yield RayEngine(leaders, fleet, delivery.bring), trainer, RayLearner(leaders, fleet) if all_learn else None


@contextmanager
def _placed(
    counts: Sequence[int], asked: str, *, device: str, silence_s: float, recovery: int, team: int = 1
) -> Iterator[list[list[Any]]]:
    """So many actors of each kind, each on a CPU and a GPU of its own, near to one another; stopped at the end.

    asked: by which options, for whoever asked for too many. team: so many of the last kind are on one node, and do not
    outlive one another. Raises PreflightError and ResourceError.
    """
    join(os.environ.get("RAY_ADDRESS", "local"))  # not any other that this machine runs
    each = bundle(device)
    pulse: Pulse | None = None
    planned = os.environ.get(faults.VARIABLE, "")
    if "RAY_ADDRESS" not in os.environ and (short := shortage(ray.cluster_resources(), each, sum(counts))):
        ray.shutdown()
        raise too_little(asked, short)
    first = sum(counts[:-1])
    bundle_of = [*range(first), *(first + number // team for number in range(counts[-1]))]
    together = {kind: team * size for kind, size in each.items()}
    group = placement_group([each] * first + [together] * (counts[-1] // team), strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):  # nodes may still join
            lacking = f"nodes with room for {'one each' if team == 1 else f'each {team}'}"
            free = shortage(ray.available_resources(), each, sum(counts)) or lacking
            raise ResourceError(
                f"{asked} need {free} free in the cluster after {PLACEMENT_TIMEOUT_S:g} s; ask for fewer, or add nodes"
            )
        kind = ray.remote(concurrency_groups={GROUP: 1})(Worker)
        actors = [
            kind.options(
                num_cpus=1,
                num_gpus=each.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            ).remote(number, counts[0], planned, recovery)
            for number, place in enumerate(bundle_of)
        ]
        numbers = range(sum(counts))
        teams = [numbers[start : start + team] for start in range(first, sum(counts), team)] if team > 1 else []
        pulse = Pulse(actors, silence_s=silence_s, teams=teams)
        yield [actors[sum(counts[:index]) :][:count] for index, count in enumerate(counts)]
    finally:
        if pulse is not None:
            pulse.stop()
        remove_placement_group(group)
        ray.shutdown()


def _seated(
    make: Callable[..., Parts], engines: Sequence[Any], size: int, *, timeout_s: float
) -> list[tuple[Any, Callable[[], Parts]]]:
    """Engines in teams of this size, the ranks of each meeting at its first one's."""
    teams = [engines[start : start + size] for start in range(0, len(engines), size)]
    asked = {number: team[0].address.remote() for number, team in enumerate(teams)}
    return [
        (each, partial(make, seat=Seat(meet, rank, size, timeout_s), summon=Summons(team[1:])))
        for team, meet in zip(teams, gather(asked, "address", limit_s=BUILD_S), strict=True)
        for rank, each in enumerate(team)
    ]


def _build(made: Sequence[tuple[Any, Callable[[], Parts]]]) -> list[bool]:
    """Have every actor make its parts, the ranks meeting at the first one's; which have a drafter to train."""
    (meet,) = gather({0: made[0][0].address.remote()}, "address", limit_s=BUILD_S)
    refs = {number: actor.build.remote(make, meet) for number, (actor, make) in enumerate(made)}
    return gather(refs, "build", limit_s=BUILD_S)

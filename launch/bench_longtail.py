"""Whole steps of GRPO where a few rollouts take most of the time, by how they are drafted.

Every arm is a run of its own, from one warm-started checkpoint, with the same seed and so the same prompts and noise:
what differs is how long it takes. All of them live in this process and take turns, a step each.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

from configs.errors import ConfigError
from configs.load import dump, load
from configs.schema import Config
from drafter.export import read_drafter
from launch.arms import WARM, Arm, Ground, begin_arm, free, newest, standing, take_turns, warm_up
from launch.bench_report import provenance
from launch.longtail_drafter import begin_drafter, end_drafter, given_drafter
from launch.longtail_report import WHAT, report, warmstart
from launch.offline import drafter_shape
from rl.export import require_free
from rl.export_drafter import require_drafter_place
from rl.rundir import require_run
from rollout.model import load_config
from rollout.pretrained import resolve

ARMS: dict[str, tuple[str, ...]] = {
    "off": ("spec.source=off",),
    "suffix": ("spec.source=suffix", "spec.choice=auto"),
    # TLT (arXiv 2511.16665): a learned head, its bandit over a fixed table, on while fewer than 32 sequences run
    "tlt": ("spec.source=eagle", "spec.choice=beg_mab", "spec.below=32"),
    "ours": ("spec.source=auto", "spec.choice=auto"),
}
# Over the recipe and under the user's overrides: caches of so many tokens fit side by side, one for each arm.
SHAPE = ("rollout.kv_tokens=262144",)
LEARNER = "ours"  # whose drafter is measured at the end
DRAFTER = "drafter"  # what learned arms start from, in a folder beside theirs
FIXED = ("compute.backend=inline", "checkpoint.every=1000000")

Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: steps of every arm, of which the first `skip` (captures, compilation) enter no figure.

    drafter_steps: updates of the drafter that learned arms start from, before any arm begins; 0 starts them from random
    weights. minutes: no round of turns is begun later than that after the start; 0 sets no limit.
    """

    arms: tuple[str, ...]
    steps: int
    skip: int
    drafter_steps: int
    minutes: float


def run(
    recipe: Path,
    overrides: Sequence[str],
    job: Job,
    *,
    checkpoint: Path | None,
    drafter: Path | None,
    folder: Path,
    keep: Keep,
) -> dict[str, Any]:
    """Warm up, or take up the newest checkpoint of the run `checkpoint` and the drafter in a folder; then let the arms
    take turns.

    keep is given the result so far after every turn. Raises what the first failing arm raised, once the others are
    done; ConfigError and PreflightError, for folders that are taken too, before anything is measured.
    """
    unknown = [name for name in job.arms if name not in ARMS]
    if unknown or not job.arms:
        raise ConfigError(f"--arms {','.join(job.arms)}: name some of {', '.join(ARMS)}")
    if job.skip >= job.steps:
        raise ConfigError(f"--skip {job.skip} leaves nothing of --steps {job.steps}; lower it")
    if checkpoint is not None:
        require_run(checkpoint)
    if drafter is not None:
        read_drafter(drafter)
    given = [*SHAPE, *overrides, *FIXED]
    configs = {name: load(recipe, [*given, "eval.every=0", *ARMS[name]]) for name in job.arms}
    warm = load(recipe, [*given, *ARMS["off"]])
    # its worked solutions are never of problems that are held out
    offline = load(recipe, [*given, "eval.every=1", *ARMS["ours"]])
    for name in (*job.arms, *(() if checkpoint is not None else (WARM,))):
        require_free(folder / name)
    if drafter is None and job.drafter_steps and learned(configs):
        require_drafter_place(folder / DRAFTER, drafter_shape(offline, load_config(resolve(offline.model))))
    return asyncio.run(_run(configs, warm, offline, job, checkpoint, drafter, folder, keep))


async def _run(
    configs: dict[str, Config],
    warm: Config,
    offline: Config,
    job: Job,
    checkpoint: Path | None,
    drafter: Path | None,
    folder: Path,
    keep: Keep,
) -> dict[str, Any]:
    begin = perf_counter()
    heldout = warm.eval.num_prompts if warm.eval.every else 0
    async with standing(warm, folder, num_heldout=heldout) as ground:
        result: dict[str, Any] = {
            "what": WHAT,
            "model": warm.model,
            **provenance(device=ground.device, seed=warm.run.seed),
            "load_average": os.getloadavg(),
            "config": dump(warm),
            **asdict(job),
            "seconds_setup": perf_counter() - begin,
        }
        if checkpoint is None:
            checkpoint = await warm_up(warm, ground)
        result["warmstart"] = warmstart(checkpoint)
        result["seconds_warmstart"] = perf_counter() - begin
        drafter, result["drafter"] = await warm_drafter(offline, configs, job, checkpoint, drafter, ground)
        result["seconds_before"] = perf_counter() - begin
        start = newest(checkpoint)
        arms = [Arm(name, begin_arm(name, config, drafter, ground, start)) for name, config in configs.items()]
        await take_turns(
            arms,
            steps=job.steps,
            stop=ground.stop,
            deadline=begin + 60 * job.minutes if job.minutes else inf,
            after=lambda: keep(result | figures(arms, job)),
        )
        result |= figures(arms, job)
        learner = next((arm for arm in arms if arm.name == LEARNER and arm.error is None), None)
        if learner is not None and drafter is not None:
            result["drafter"]["end"] = await measured_end(learner, offline, drafter)
    for arm in arms:
        if arm.error is not None:
            raise arm.error
    return result


def learned(arms: Mapping[str, Config]) -> bool:
    """Whether a learned drafter serves any of these arms."""
    return any(arm.spec.source in ("eagle", "auto") for arm in arms.values())


async def warm_drafter(
    config: Config,
    arms: Mapping[str, Config],
    job: Job,
    checkpoint: Path,
    drafter: Path | None,
    ground: Ground,
) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the drafter that learned arms start from, and its figures; None and {} where there is none."""
    if not learned(arms):
        return None, {}
    # in a thread, so that a request to stop is heard
    figures: dict[str, Any] = {}
    if drafter is not None:
        figures = await asyncio.to_thread(given_drafter, checkpoint, config, drafter)
    elif job.drafter_steps:
        drafter = ground.folder / DRAFTER
        steps, stop = job.drafter_steps, ground.stop
        figures = await asyncio.to_thread(begin_drafter, checkpoint, config, drafter, steps=steps, stop=stop)
    free(ground.device)
    return drafter, figures


async def measured_end(arm: Arm, config: Config, drafter: Path) -> dict[str, Any]:
    """What became of the drafter, by the run's checkpoint: static against online."""
    arm.loop.save(arm.loop.engine.state_dict())
    return await asyncio.to_thread(end_drafter, arm.loop.run.path, config, drafter)


def figures(arms: Sequence[Arm], job: Job) -> dict[str, Any]:
    """What the arms measured so far."""
    return {
        "arms": report({arm.name: arm.loop.run.path for arm in arms}, skip=job.skip),
        "settings": {arm.name: asdict(arm.loop.config.spec) for arm in arms},
        "failed": {arm.name: f"{type(arm.error).__name__}: {arm.error}" for arm in arms if arm.error is not None},
    }

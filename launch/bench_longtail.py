"""Whole steps of GRPO where a few rollouts take most of the time, by how they are drafted.

Every arm is a run of its own, from one warm-started checkpoint, with the same seed and so the same prompts and noise:
what differs is how long it takes. All of them live in this process and take turns, a step each.
"""

import asyncio
import gc
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from configs.errors import ConfigError, PreemptedError, PreflightError
from configs.load import dump, load
from configs.schema import Config
from drafter import sealed
from drafter.export import read_drafter
from launch.bench_report import provenance, say
from launch.cluster import check_counts, make_gate_lessons, make_lessons, on_sigterm, stop_token_ids
from launch.longtail_drafter import begin_drafter, end_drafter, given_drafter
from launch.longtail_report import WHAT, report, warmstart
from launch.offline import drafter_shape
from launch.parts import build_worker
from rl.checkpoint import CheckpointStore, step_of
from rl.data import DataSet, load_data
from rl.export import require_free
from rl.export_drafter import require_drafter_place
from rl.loop import Loop
from rl.reward import check_rewards
from rl.rundir import RunDir, require_run
from rl.sandbox import RewardPool
from rl.warmstart import warm_start
from rollout.model import context_length, load_config, resolve_compute
from rollout.pretrained import load_tokenizer, resolve

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
WARM, DRAFTER = "warm", "drafter"  # what the arms start from, in folders beside theirs
FIXED = ("compute.backend=inline", "checkpoint.every=1000000")

Record = Mapping[str, Any]
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


@dataclass(frozen=True, slots=True)
class Ground:
    """What all arms stand on."""

    path: Path  # of the model
    device: str
    dtype: str
    tokenizer: Any
    data: DataSet
    rewards: RewardPool
    folder: Path
    stop: threading.Event


@dataclass(slots=True)
class Arm:
    """One contender, and what ended it early, if anything did."""

    name: str
    loop: Loop
    error: Exception | None = None


class Lines:
    """rl.metrics.Progress in a line a step, on standard error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def phase(self, name: str) -> None:
        """Steps are short."""

    def rollouts(self, done: int, total: int) -> None:
        """Steps are short."""

    def step(self, record: Record) -> None:
        """Print what is compared."""
        say(
            f"{self._name:>8} step {record['step']}: rollout {record['seconds_rollout']:.2f} s, tail "
            f"{record['seconds_tail']:.2f} s, step {record['seconds']:.2f} s, longest {record['response_len_max']}, "
            f"accept {record['accept_length']:.2f}, reward {record['reward_mean']:.3f}"
        )

    def message(self, text: str) -> None:
        """Print the text."""
        say(f"{self._name:>8} {text}")

    def close(self) -> None:
        """Nothing to put back."""


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
    device, dtype = resolve_compute(warm.compute)
    path = resolve(warm.model).absolute()
    tokenizer = load_tokenizer(path)
    check_rewards(warm.reward)
    data = load_data(
        warm.data,
        tokenizer,
        seed=warm.run.seed,
        context_length=context_length(load_config(path)),
        max_new_tokens=warm.rollout.max_new_tokens,
        num_heldout=warm.eval.num_prompts if warm.eval.every else 0,
        quarantine=None,
    )
    check_counts(warm, data)
    result: dict[str, Any] = {
        "what": WHAT,
        "model": warm.model,
        **provenance(device=device, seed=warm.run.seed),
        "load_average": os.getloadavg(),
        "config": dump(warm),
        **asdict(job),
    }
    async with RewardPool(warm.reward) as rewards:
        stop = threading.Event()
        ground = Ground(path, device, dtype, tokenizer, data, rewards, folder, stop)
        with on_sigterm(stop):
            result["seconds_setup"] = perf_counter() - begin
            if checkpoint is None:
                checkpoint = await warm_up(warm, ground)
            result["warmstart"] = warmstart(checkpoint)
            result["seconds_warmstart"] = perf_counter() - begin
            drafter, result["drafter"] = await warm_drafter(offline, configs, job, checkpoint, drafter, ground)
            result["seconds_before"] = perf_counter() - begin
            start = newest(checkpoint)
            arms = [Arm(name, begin_arm(name, config, drafter, ground, start)) for name, config in configs.items()]
            for number in range(job.steps):
                if stop.is_set():
                    raise PreemptedError(f"asked to stop after {number} steps of each arm")
                if job.minutes and perf_counter() - begin > 60 * job.minutes:
                    say(f"--minutes {job.minutes:g} are over after {number} steps of each arm")
                    break
                turn = number % len(arms)
                for arm in [*arms[turn:], *arms[:turn]]:
                    if arm.error is None:
                        await take_turn(arm)
                        keep(result | figures(arms, job))
            result |= figures(arms, job)
            learner = next((arm for arm in arms if arm.name == LEARNER and arm.error is None), None)
            if learner is not None and drafter is not None:
                result["drafter"]["end"] = await measured_end(learner, offline, drafter)
    for arm in arms:
        if arm.error is not None:
            raise arm.error
    return result


async def warm_up(config: Config, ground: Ground) -> Path:
    """Take the supervised steps and measure what they made of the model: the run directory of that."""
    loop = make_loop(WARM, config, ground)
    if config.warmstart.steps:
        warm_start(loop.trainer, loop.data, loop.tokenizer, config.warmstart, report=loop.report_warmstart)
        loop.engine.update(0)
        await loop.evaluate("warmstart")
    loop.save(loop.engine.state_dict())
    loop.run.close()
    path = loop.run.path
    del loop
    free(ground.device)
    return path


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


def free(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()  # policy, optimiser and cache refer to one another
    if device == "cuda":
        torch.cuda.empty_cache()


def newest(run: Path) -> Path:
    """The newest intact checkpoint of a run. Raises PreflightError where it has none."""
    found = sealed.newest(run / "checkpoints")
    if found is None:
        raise PreflightError(f"{run} has no intact checkpoint; leave --checkpoint out to make one")
    return found


def begin_arm(name: str, config: Config, drafter: Path | None, ground: Ground, start: Path) -> Loop:
    """A run at the checkpoint's weights and optimiser, a learned drafter at those in its folder.

    Its engine knows nothing yet, whatever the other run's knew.
    """
    if drafter is not None:
        config = replace(config, drafter=replace(config.drafter, init=str(drafter)))
    loop = make_loop(name, config, ground)
    loop.trainer.load(start / "trainer")
    loop.step, loop.prepared = step_of(start), True
    loop.engine.update(loop.step)
    return loop


def make_loop(name: str, config: Config, ground: Ground) -> Loop:
    """A run under the ground's folder, with a policy, a trainer and an engine of its own."""
    config = replace(config, run=replace(config.run, name=name, dir=str(ground.folder / name)))
    run = RunDir.create(config, dump(config))
    engine, trainer, learner = build_worker(config, ground.path, device=ground.device, dtype=ground.dtype)
    return Loop(
        config=config,
        run=run,
        data=ground.data,
        engine=engine,
        trainer=trainer,
        lessons=make_lessons(config, learner, ground.path),
        gates=make_gate_lessons(config, engine),
        rewards=ground.rewards,
        tokenizer=ground.tokenizer,
        stop_token_ids=stop_token_ids(ground.path, ground.tokenizer),
        store=CheckpointStore(run.path / "checkpoints", keep=1),
        progress=Lines(name),
        stop_requested=ground.stop,
    )


def figures(arms: Sequence[Arm], job: Job) -> dict[str, Any]:
    """What the arms measured so far."""
    return {
        "arms": report({arm.name: arm.loop.run.path for arm in arms}, skip=job.skip),
        "settings": {arm.name: asdict(arm.loop.config.spec) for arm in arms},
        "failed": {arm.name: f"{type(arm.error).__name__}: {arm.error}" for arm in arms if arm.error is not None},
    }


async def take_turn(arm: Arm) -> None:
    """One step of an arm. What it raises is kept, so that the others go on; a request to stop ends all."""
    try:
        await arm.loop.train_step()
    except PreemptedError:
        raise
    # whatever one side does wrong is its own result
    except Exception as error:
        traceback.print_exc()
        arm.error = error

"""Runs that are compared: alive in one process side by side, on the same ground, taking turns a step each."""

import gc
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from configs.errors import PreemptedError, PreflightError
from configs.load import dump
from configs.schema import Config
from drafter import sealed
from launch.bench_report import say
from launch.cluster import make_gate_lessons, make_lessons, on_sigterm, read_inputs, stop_token_ids
from launch.parts import build_worker
from rl.checkpoint import CheckpointStore, step_of
from rl.data import DataSet
from rl.loop import Loop
from rl.rundir import RunDir
from rl.sandbox import RewardPool
from rl.warmstart import warm_start
from rollout.model import resolve_compute

WARM = "warm"  # the run that ends where the arms begin, in a folder beside theirs

Record = Mapping[str, Any]


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


@asynccontextmanager
async def standing(config: Config, folder: Path, *, num_heldout: int) -> AsyncIterator[Ground]:
    """The ground of runs under `folder`: so many problems are held out, SIGTERM sets its stop.

    Raises PacelineError for what would stop a run of this configuration before its first step.
    """
    device, dtype = resolve_compute(config.compute)
    path, tokenizer, data = read_inputs(config, num_heldout=num_heldout, quarantine=None)
    async with RewardPool(config.reward) as rewards:
        stop = threading.Event()
        with on_sigterm(stop):
            yield Ground(path, device, dtype, tokenizer, data, rewards, folder, stop)


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


async def take_turns(
    arms: Sequence[Arm], *, steps: int, stop: threading.Event, deadline: float, after: Callable[[], None]
) -> None:
    """So many steps of every arm that does not fail, a step each in turns, another arm first in each round.

    deadline: no round is begun later, by perf_counter. after is called after every turn. Raises PreemptedError where
    asked to stop.
    """
    for number in range(steps):
        if stop.is_set():
            raise PreemptedError(f"asked to stop after {number} steps of each arm")
        if perf_counter() > deadline:
            say(f"--minutes are over after {number} steps of each arm")
            return
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            if arm.error is None:
                await take_turn(arm)
                after()

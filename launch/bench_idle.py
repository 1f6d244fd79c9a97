"""Idle GPUs under a clock: one worker has all the rollouts, the other what it is told to do meanwhile.

Arms take turns on the same prompts with the same noise: the idle worker rests, trains the drafter, or does what
launch.idle.decide says. Last it is killed in the middle of an update.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from threading import Timer
from time import perf_counter
from typing import Any

import ray
import torch
from rich.console import Group

from configs.errors import ConfigError, ResourceError
from configs.schema import Config, DrafterConfig, RolloutConfig, SpecConfig
from drafter.types import OFF
from launch.actors import Parts
from launch.adapters import LESSON_S, RayEngine, on_alive
from launch.bench_report import in_turns, plain_table, provenance, say, spread
from launch.bench_rollout import random_prompts, sampling
from launch.drafting import make_drafting
from launch.geometry import Device, Dtype, Subject, geometry, placement
from launch.idle import Costs, Decide, Learn, Load, Rest, Task, decide
from launch.learners import RayLearner
from launch.ledger import IdleReport
from launch.pace import Key
from launch.start import start_actors
from rollout.engine import NativeEngine
from rollout.model import load_config
from rollout.pretrained import resolve
from rollout.strategy import FixedChooser
from rollout.types import Prompt

USED_LIMIT, INTERFERENCE_LIMIT = 0.80, 0.02  # share of idle time in use, at least; slowdown of the other, at most
WORKERS = 2
WAVES = 2  # sequences of the busy worker, in those it runs at a time
WARM_PROMPTS = 16  # that leave features on both workers; an eighth of them is kept for judging
WARM_TOKENS = 256
WARM_LEARNING_S = 5.0
KILL_SHARE = 0.3  # of the time the rollouts take, after which the idle worker is killed


def rest(busy: Sequence[Load], costs: Costs | None, *, can_learn: bool, can_score: bool) -> Task:
    """Never anything."""
    return Rest()


def learn(busy: Sequence[Load], costs: Costs | None, *, can_learn: bool, can_score: bool) -> Task:
    """Always training, as far as there is something to train on."""
    return Learn() if can_learn else Rest()


ARMS: dict[str, Decide] = {"rest": rest, "learn": learn, "decide": decide}


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: rollouts of new_tokens tokens each, running of them at a time, WAVES times as many in all."""

    geometry: str | None
    model: str | None
    running: int
    prompt_len: int
    new_tokens: int
    batch_tokens: int  # of the drafter's optimiser steps
    rounds: int
    seed: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One call. away_s: from the last rollout until whoever learned was back; rollouts: what was said."""

    report: IdleReport
    away_s: float
    rollouts: dict[Key, list[int]]


def run(job: Job, *, device: Device, dtype: Dtype) -> dict[str, Any]:
    """Measure all arms, then the kill; JSON-able. Raises ConfigError, and ResourceError without two devices."""
    where, kind = placement(device, dtype)
    check_devices(where)
    size = vocab_size(job)
    found = provenance(device=where, seed=job.seed)
    # one prompt alone: all its rollouts fall to the first worker
    prompts = [random_prompts(1, job.prompt_len, size, seed=job.seed + number) for number in range(job.rounds + 1)]
    make = partial(make_side, job, device, dtype)
    with start_actors(make, count=WORKERS, device=where, slots=job.running) as (engine, _, learner):
        assert learner is not None
        say("both workers are up")
        warm_up(job, engine, learner, random_prompts(WARM_PROMPTS, job.prompt_len, size, seed=job.seed), size)
        timed = measure(job, engine, prompts)
        agreed = agree(engine, learner)
        killed = kill(job, engine, learner, prompts[-1], timed["rest"][-1])
    return {
        "what": "what became of a GPU's idle time",
        "subject": job.geometry or job.model,
        **found,
        **asdict(job),
        "device": where,
        "dtype": kind,
        "limits": {"used": USED_LIMIT, "interference": INTERFERENCE_LIMIT},
        "arms": {name: summary(rounds, timed["rest"]) for name, rounds in timed.items()},
        "agreed": agreed,
        "killed": killed,
    }


def check_devices(device: str) -> None:
    """Find out before Ray waits for devices that this machine has too few. Raises ResourceError."""
    num_devices = torch.cuda.device_count()
    # the machines of a cluster are Ray's to count
    if device == "cuda" and "RAY_ADDRESS" not in os.environ and num_devices < WORKERS:
        raise ResourceError(
            f"bench idle runs {WORKERS} workers of one GPU each, and torch sees {num_devices} here; "
            "give --device cpu, or set RAY_ADDRESS to a cluster that has them"
        )


def make_side(job: Job, device: Device, dtype: Dtype) -> Parts:
    """One worker: random or given weights, an engine that keeps features but drafts nothing, a learner."""
    subject = Subject.load(job.geometry, job.model, device=device, dtype=dtype, seed=job.seed)
    config = Config(
        rollout=RolloutConfig(max_running=job.running, max_new_tokens=job.new_tokens),
        spec=SpecConfig(source="eagle"),
        drafter=DrafterConfig(batch_tokens=job.batch_tokens),
    )
    chooser = FixedChooser(OFF)
    drafting = make_drafting(config, subject.model, chooser)
    engine = NativeEngine(
        subject.model, drafter=drafting.drafter, chooser=chooser, rollout=config.rollout, reader=drafting.reader
    )
    return engine, None, drafting.learner


def vocab_size(job: Job) -> int:
    """The policy's. Raises ConfigError and PreflightError for one there is not."""
    if (job.geometry is None) == (job.model is None):
        raise ConfigError("give --geometry NAME for random weights or --model MODEL, as in --geometry qwen3-1.7b")
    config = geometry(job.geometry) if job.geometry else load_config(resolve(job.model or ""))
    return int(config.get_text_config().vocab_size)


def warm_up(job: Job, engine: RayEngine, learner: RayLearner, prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Leave features, a vocabulary and compiled training on both workers."""
    engine.fleet.decide = rest
    samples = -(-WORKERS * job.running // len(prompts))
    found = generate(engine, prompts, samples=samples, tokens=WARM_TOKENS, seed=job.seed)
    said = torch.tensor([token for token_ids in found.rollouts.values() for token in token_ids])
    learner.begin(torch.bincount(said, minlength=vocab_size))
    stats = learner.learn(budget_s=WARM_LEARNING_S, until=lambda: False)
    say(f"warm: {len(found.rollouts)} rollouts, {stats.num_steps} steps of learning, {stats.step_s * 1e3:.0f} ms each")


def measure(job: Job, engine: RayEngine, prompts: Sequence[Sequence[Prompt]]) -> dict[str, list[Timed]]:
    """Every arm in every round, a round's prompts being the same; the first round is dropped."""
    timed: dict[str, list[Timed]] = {name: [] for name in ARMS}
    for number, name in in_turns(list(ARMS), job.rounds):
        engine.fleet.decide = ARMS[name]
        found = lopsided(job, engine, prompts[number])
        say(f"round {number}, {name}: {found.report.seconds:.2f} s, {found.report.used:.0%} of the idle time in use")
        if number:
            timed[name].append(found)
    return timed


def lopsided(job: Job, engine: RayEngine, prompts: Sequence[Prompt]) -> Timed:
    """Roll out one worker's prompts."""
    return generate(engine, prompts, samples=WAVES * job.running, tokens=job.new_tokens, seed=job.seed)


def generate(engine: RayEngine, prompts: Sequence[Prompt], *, samples: int, tokens: int, seed: int) -> Timed:
    """Roll out on all workers alive."""
    engine.update(0)  # what was cached by the call before is forgotten
    how = sampling(tokens, seed=seed, num_samples=samples)

    async def call() -> dict[Key, list[int]]:
        return {(each.prompt_id, each.sample): each.token_ids async for each in engine.generate(prompts, how)}

    begun = perf_counter()
    rollouts = asyncio.run(call())
    report = engine.fleet.report
    return Timed(report, perf_counter() - begun - report.seconds, rollouts)


def summary(rounds: Sequence[Timed], resting: Sequence[Timed]) -> dict[str, Any]:
    """An arm's figures, and against the arm that rests, round by round."""
    pairs = list(zip(rounds, resting, strict=True))
    return {
        "seconds": spread([each.report.seconds for each in rounds]),
        "over_rest": spread([each.report.seconds / other.report.seconds - 1 for each, other in pairs]),
        "used": spread([each.report.used for each in rounds]),
        "idle_s": spread([each.report.idle_s for each in rounds]),
        "learned_s": spread([each.report.learned_s for each in rounds]),
        "sampled_s": spread([each.report.sampled_s for each in rounds]),
        "away_ms": spread([each.away_s * 1e3 for each in rounds]),
        "num_moved": [each.report.num_moved for each in rounds],
        "same": [same(each, other) for each, other in pairs],
    }


def same(ours: Timed, theirs: Timed) -> float:
    """Share of the rollouts that are equal, token for token."""
    assert ours.rollouts.keys() == theirs.rollouts.keys()
    return sum(ours.rollouts[key] == theirs.rollouts[key] for key in ours.rollouts) / len(ours.rollouts)


def agree(engine: RayEngine, learner: RayLearner) -> dict[str, Any]:
    """What it takes to average what the workers learned and to publish it; whether they serve the same then."""
    begun = perf_counter()
    learner.agree()
    averaged_s = perf_counter() - begun
    report = learner.settle(0)
    settled_s = perf_counter() - begun - averaged_s
    concluded = on_alive(engine.workers, engine.fleet, "conclude", None, limit_s=LESSON_S)
    checksums = {each.checksum for each in concluded.values()}
    say(f"agreed in {averaged_s:.2f} s, {report.outcome} in {settled_s:.2f} s, {len(checksums)} checksum(s)")
    return {"averaged_s": averaged_s, "settled_s": settled_s, "equal": len(checksums) == 1, "report": asdict(report)}


def kill(
    job: Job, engine: RayEngine, learner: RayLearner, prompts: Sequence[Prompt], undisturbed: Timed
) -> dict[str, Any]:
    """Kill the idle worker while it trains: the rollouts of that call, the agreement and the call after it."""
    engine.fleet.decide = learn
    timer = kill_after(engine, 1, KILL_SHARE * undisturbed.report.seconds)
    struck = lopsided(job, engine, prompts)
    timer.join()
    lost = {number: str(error) for number, error in engine.fleet.lost.items()}
    begun = perf_counter()
    learner.agree()
    agreed_s = perf_counter() - begun
    after = lopsided(job, engine, prompts)
    say(f"killed: {struck.report.seconds:.2f} s, then {after.report.seconds:.2f} s alone")
    return {
        "lost": lost,
        "seconds": struck.report.seconds,
        "over_rest": struck.report.seconds / undisturbed.report.seconds - 1,
        "same": same(struck, undisturbed),
        "agreed_s": agreed_s,
        "next_seconds": after.report.seconds,
        "next_same": same(after, undisturbed),
    }


def kill_after(engine: RayEngine, number: int, seconds: float) -> Timer:
    """Kill a worker's process in so many seconds."""
    timer = Timer(seconds, ray.kill, [engine.workers[number]])
    timer.start()
    return timer


def table(result: dict[str, Any]) -> Group:
    """The arms side by side, and what the kill did."""
    limits = result["limits"]
    headings = ["idle worker", "s", "over rest", "min", "max", "used", "learned s", "took over s", "moved", "back ms"]
    title = f"{result['what']}, {result['subject']}, {result['dtype']}; asked: used {limits['used']:.0%} or more"
    shown = plain_table(f"{title}, over rest {limits['interference']:.0%} or less", headings)
    for name, arm in result["arms"].items():
        shown.add_row(
            name,
            f"{arm['seconds']['median']:.2f}",
            *(f"{arm['over_rest'][which]:+.1%}" for which in ("median", "min", "max")),
            f"{arm['used']['median']:.0%}",
            *(f"{arm[part]['median']:.2f}" for part in ("learned_s", "sampled_s")),
            "/".join(map(str, arm["num_moved"])),
            f"{arm['away_ms']['median']:.0f}",
        )
    killed, agreed = result["killed"], result["agreed"]
    after = plain_table("", ["afterwards", "s", "over rest", "equal rollouts"])
    after.add_row(
        "killed mid-update", f"{killed['seconds']:.2f}", f"{killed['over_rest']:+.1%}", f"{killed['same']:.0%}"
    )
    after.add_row("the next call", f"{killed['next_seconds']:.2f}", "", f"{killed['next_same']:.0%}")
    after.add_row("deltas averaged", f"{agreed['averaged_s']:.2f}", "", "")
    after.add_row(f"judged: {agreed['report']['outcome']}", f"{agreed['settled_s']:.2f}", "", "")
    return Group(shown, after)

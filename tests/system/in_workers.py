"""Two Ray workers made to hand sequences to one another: run as a script, prints what it found as JSON."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from launch.cluster import protect_local_ray

protect_local_ray()

import ray  # noqa: E402  # it reads its environment when it is imported

from launch import shift  # noqa: E402
from launch.adapters import RayEngine  # noqa: E402
from launch.bench_idle import Job, make_side  # noqa: E402
from launch.bench_rollout import random_prompts  # noqa: E402
from launch.idle import Costs, Load, Rest, TakeOver, Task  # noqa: E402
from launch.start import start_actors  # noqa: E402
from rollout.types import Engine, Prompt, Rollout, Sampling  # noqa: E402

JOB = Job("tiny", None, running=4, prompt_len=20, new_tokens=600, batch_tokens=256, rounds=1, seed=5)
SAMPLING = Sampling(num_samples=8, max_new_tokens=JOB.new_tokens, stop_token_ids=(7, 8), seed=2, step=9)


def grab(busy: Sequence[Load], costs: Costs | None, *, can_learn: bool, can_score: bool) -> Task:
    """Take what there is, as often as it goes."""
    loads = [load for load in busy if len(load.remaining) > 1]
    return TakeOver(loads[0].worker, len(loads[0].remaining) // 2) if loads else Rest()


async def sample(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
    """All rollouts, by prompt and sample."""
    found = [rollout async for rollout in engine.generate(prompts, sampling)]
    return sorted(found, key=lambda rollout: (rollout.prompt_id, rollout.sample))


async def leave_early(engine: RayEngine, prompts: Sequence[Prompt]) -> None:
    """Begin a call and take one rollout of it."""
    async with aclosing(engine.generate(prompts, replace(SAMPLING, step=10))) as rollouts:
        await anext(rollouts)


def main() -> None:
    shift.FIRST_TICK_S = shift.TICK_S = 0.02
    prompts = random_prompts(1, JOB.prompt_len, 512, seed=3)  # all for the first worker
    alone, _, _ = make_side(JOB, "cpu", "float32")
    expected = asyncio.run(sample(alone, prompts, SAMPLING))
    make = lambda: make_side(JOB, "cpu", "float32")  # noqa: E731  # crosses processes by value
    with start_actors(make, count=2, device="cpu", slots=JOB.running, decide=grab) as (engine, _, _):
        asyncio.run(leave_early(engine, prompts))
        found = asyncio.run(sample(engine, prompts, SAMPLING))
        report = engine.fleet.report
        told = {
            "expected": [rollout.token_ids for rollout in expected],
            "found": [rollout.token_ids for rollout in found],
            "num_moved": report.num_moved,
            "sampled_s": report.sampled_s,
            "lost": len(engine.fleet.lost),
            "meets": ray.get(engine.workers[0].address.remote())[0],
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main()

"""Two Ray workers whose gates learn: run as a script with a model's folder and one of gates, prints what it found as
JSON."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from launch.cluster import protect_local_ray

protect_local_ray()

import ray  # noqa: E402  # it reads its environment when it is imported

from configs.load import parse  # noqa: E402
from configs.schema import Config  # noqa: E402
from drafter.buffer import is_heldout  # noqa: E402
from drafter.publish import checksum  # noqa: E402
from launch.actors import Parts  # noqa: E402
from launch.adapters import RayEngine  # noqa: E402
from launch.gate_learners import RayGateLessons  # noqa: E402
from launch.parts import _make_engine  # noqa: E402
from launch.start import start_actors  # noqa: E402
from rl import gate_lessons  # noqa: E402
from rollout import gate_sampler  # noqa: E402
from rollout.model import load_policy  # noqa: E402
from rollout.types import Engine, Prompt, Rollout, Sampling  # noqa: E402

NAMES = [f"p{number}" for number in range(60)]
HELD, TAUGHT = ([name for name in NAMES if is_heldout(name) == held][:4] for held in (True, False))
PROMPTS = [
    Prompt(id=name, token_ids=[3 + (7 * n + 31 * number) % 250 for n in range(80 + number)], answer="")
    for number, name in enumerate([*HELD, *TAUGHT])
]
SPARSE = [
    "sparse.mode=draft", "sparse.selector=gate", "sparse.select_block=16", "sparse.budget_tokens=48",
    "sparse.sinks=0", "sparse.window=0", "sparse.depth=4", "sparse.learn=true", "compute.backend=ray",
]  # fmt: skip


def config(model: Path, *options: str) -> Config:
    common = [f"model={model}", "spec.source=off", "spec.choice=fixed", "rollout.max_running=6"]
    return parse("data: {name: chain_sum}\n", [*common, *options])


def worker(model: Path, gates: Path) -> Parts:
    """An engine whose gates learn fast, from every verification."""
    gate_sampler.WATCH_EVERY = 1
    gate_lessons.LR = 1e-2
    policy = load_policy(model, device="cpu", dtype="float32")
    engine, _ = _make_engine(config(model, *SPARSE, f"sparse.gate={gates}"), policy, None)
    return engine, None, None


async def sample(engine: Engine, step: int) -> dict[str, Rollout]:
    sampling = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=1, step=step, temperature=0.7)
    found = [rollout async for rollout in engine.generate(PROMPTS, sampling)]
    return {f"{rollout.prompt_id} {rollout.sample}": rollout for rollout in found}


def served(engine: RayEngine) -> list[list[Any]]:
    """Version and checksum of the gates that each worker left serves."""
    replicas = [ray.get(engine.workers[number].replica.remote("gates")) for number in engine.fleet.alive]
    return [[each.version, checksum(each.served)] for each in replicas]


def main(model: Path, gates: Path) -> None:
    policy = load_policy(model, device="cpu", dtype="float32")
    plain, _ = _make_engine(config(model), policy, None)
    told: dict[str, Any] = {"steps": []}
    with start_actors(lambda: worker(model, gates), count=2, device="cpu", slots=6) as (engine, _, _):
        lessons = RayGateLessons(engine.workers, engine.fleet)

        def advance(step: int) -> None:
            """A step's rollouts, beside those of an engine that drafts nothing, and its lesson."""
            found, expected = asyncio.run(sample(engine, step)), asyncio.run(sample(plain, step))
            by_worker = [each.tokens for each in engine.activity()]
            record = lessons.take()
            told["steps"].append(
                {
                    "same": {key: rollout.token_ids for key, rollout in found.items()}
                    == {key: rollout.token_ids for key, rollout in expected.items()},
                    "num_rollouts": len(found),
                    "proposed": sum(rollout.spec.proposed for rollout in found.values()),
                    "tokens_by_worker": by_worker,
                    "record": record,
                    "served": served(engine),
                }
            )
            engine.update(step + 1)

        for step in range(3):
            advance(step)
        agree = lessons._replicas.agree

        def strike() -> None:
            """One worker dies once it has learned."""
            ray.kill(engine.workers[1])
            agree()

        lessons._replicas.agree = strike  # type: ignore[method-assign]
        advance(3)
        lessons._replicas.agree = agree  # type: ignore[method-assign]
        told["lost"] = sorted(engine.fleet.lost)
        advance(4)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

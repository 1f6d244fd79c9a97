"""An engine that gave its memory back samples what it would have."""

import asyncio
from pathlib import Path
from typing import Literal

import pytest

from configs.schema import RolloutConfig
from drafter.ngram import NgramDrafter
from drafter.types import Strategy
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling


def roll_out(engine: NativeEngine, step: int) -> list[Rollout]:
    prompts = [Prompt(id=f"p{index}", token_ids=[5, 7 + index, 9], answer="") for index in range(3)]
    sampling = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(), seed=1, step=step, temperature=0.7)

    async def collected() -> list[Rollout]:
        return [rollout async for rollout in engine.generate(prompts, sampling)]

    return sorted(asyncio.run(collected()), key=lambda rollout: (rollout.prompt_id, rollout.sample))


@pytest.mark.parametrize("cycles", ["hosted", "resident"])
def test_memory_given_back_between_steps_changes_nothing(
    tiny_model_dir: Path, cycles: Literal["hosted", "resident"]
) -> None:
    def make() -> NativeEngine:
        drafter = NgramDrafter(min_match=1) if cycles == "resident" else None
        strategy = Strategy(source="suffix" if drafter else "off", depth=4, top_k=1, num_verify=4)
        policy = load_policy(tiny_model_dir, device="cpu", dtype="float32")
        config = RolloutConfig(block_size=4, max_running=4)
        return NativeEngine(policy, drafter=drafter, chooser=FixedChooser(strategy), rollout=config, cycles=cycles)

    keeping, releasing = make(), make()
    for step in range(3):
        expected = roll_out(keeping, step)
        assert roll_out(releasing, step) == expected  # what was drafted too: earlier texts are still quoted
        keeping.update(step + 1)
        releasing.update(step + 1)
        releasing.release()
        assert releasing._workspace.cache is None and releasing.graph_bytes == 0
    if cycles == "resident":
        assert sum(rollout.spec.accepted for rollout in expected) > 0

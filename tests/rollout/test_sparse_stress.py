"""Whatever happens at once to sequences for which the policy drafts, samples are the dense ones."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from transformers import PreTrainedModel

from configs.schema import LayersConfig, RolloutConfig, SparseConfig
from drafter.combined import CombinedDrafter
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.selectors import make_sparse
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
SELECTORS: tuple[Literal["quest", "mean", "streaming", "verified"], ...] = ("quest", "mean", "streaming", "verified")
INNER: tuple[Literal["suffix", "eagle"] | None, ...] = (None, "suffix", "eagle")


async def disturbed(
    engine: NativeEngine, prompts: list[Prompt], sampling: Sampling, choices: random.Random, *, leave_after: int
) -> dict[Key, Rollout]:
    """Rollouts until so many have come; meanwhile all is computed anew, and sequences are given away and taken back."""
    found: dict[Key, Rollout] = {}
    rollouts = engine.generate(prompts, sampling)
    while len(found) < leave_after:
        pending = asyncio.ensure_future(anext(rollouts))
        while not pending.done():
            await asyncio.sleep(0)
            if choices.random() < 0.03:
                engine.update(engine.version + 1)
            if choices.random() < 0.03 and engine.is_generating:
                engine.adopt(engine.surrender(choices.randint(1, 3)))
        got = pending.result()
        found[got.prompt_id, got.sample] = got
    await rollouts.aclose()
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("checked_cycles")
def test_nothing_at_once_changes_what_is_sampled(
    seed: int,
    policy: PreTrainedModel,
    make_engine: Callable[..., NativeEngine],
    collect: Callable[..., dict[Key, Rollout]],
    learned_drafting: Callable[..., Any],
) -> None:
    choices = random.Random(seed)
    combined, rings = learned_drafting(policy)
    others = combined._drafters
    inner = INNER[seed % 3]
    itself = SelfDrafter() if inner is None else SelfDrafter(others[inner], source=inner, reader=rings)
    depth, block = choices.choice([1, 3, 7]), choices.choice([1, 4])
    arms = [Strategy("sparse", count, 1, count) for count in {1, depth}]
    arms += [OFF, Strategy("suffix", 4, 3, 9), Strategy("eagle", 3, 2, 4)][: choices.randint(0, 3)]
    selector = choices.choice(SELECTORS)
    config = SparseConfig(
        mode="draft", selector=selector, select_block=block, budget_tokens=choices.choice([4, 12]) * block, window=block
    )
    if seed % 2:
        config = replace(config, layers={"1": LayersConfig(choices.choice(SELECTORS), choices.choice([0, 8]) * block)})
    engine = NativeEngine(
        policy,
        drafter=CombinedDrafter({**others, "sparse": itself}),
        chooser=FixedChooser(*arms),
        rollout=RolloutConfig(
            block_size=choices.choice([4, 16]),
            max_running=choices.randint(1, 6),
            kv_tokens=choices.choice([0, 96, 160]),
            prefill_tokens=choices.choice([3, 64]),
        ),
        sparse=make_sparse(config, policy),
        reader=rings,
    )
    for _ in range(2):
        common = [choices.randrange(3, 12) for _ in range(40)]
        prompts = [
            Prompt(id=f"p{number}", token_ids=common[: choices.randint(1, 40)] + [number + 3], answer="")
            for number in range(choices.randint(1, 4))
        ]
        sampling = Sampling(
            num_samples=choices.randint(1, 3),
            max_new_tokens=choices.randint(1, 30),
            stop_token_ids=choices.choice([(), (2, 7, 11)]),
            seed=choices.randrange(100),
            step=choices.randrange(100),
            temperature=choices.choice([0.0, 0.3, 1.0]),
        )
        expected = collect(make_engine(), prompts, sampling)
        count = len(expected) if choices.random() < 0.7 else choices.randint(1, len(expected))
        found = asyncio.run(disturbed(engine, prompts, sampling, choices, leave_after=count))
        assert len(found) == count
        for key, got in found.items():
            assert got.token_ids == expected[key].token_ids, key
            assert got.finish == expected[key].finish
        assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks

"""Resident cycles under everything at once: random calls, memory, strategies, updates and exits sample the same."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from configs.schema import RolloutConfig
from drafter.ngram import NgramDrafter
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.strategy import CycleReport, FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
ARMS = [
    OFF,
    Strategy(source="suffix", depth=1, top_k=1, num_verify=1),
    Strategy(source="suffix", depth=4, top_k=1, num_verify=4),
    Strategy(source="suffix", depth=3, top_k=3, num_verify=9),
]
LEARNED = [replace(arm, source="eagle") for arm in ARMS[1:]]


class RandomChooser:
    """Another strategy at every cycle; sees that what it is told is of cycles it chose."""

    def __init__(self, choices: random.Random, arms: Sequence[Strategy]) -> None:
        self.max_num_verify = max(arm.num_verify for arm in arms)
        self._choices = choices
        self._arms = arms

    def choose(self, *, batch: int, context: float) -> Strategy:
        assert batch > 0
        return self._choices.choice(self._arms)

    def observe(self, report: CycleReport) -> None:
        assert report.strategy in self._arms
        assert 0 < report.batch <= report.bucket
        assert report.batch * report.strategy.num_verify >= sum(report.proposed_by_depth)
        assert all(a <= p for a, p in zip(report.accepted_by_depth, report.proposed_by_depth, strict=True))
        assert report.rows_with_draft <= report.batch

    def policy_changed(self) -> None:
        """Nothing was learned."""

    def drafter_changed(self, source: str) -> None:
        """Nothing was learned."""

    def summary(self) -> dict[str, Any]:
        return {}


def random_prompts(choices: random.Random, longest: int) -> list[Prompt]:
    """Prompts of few different tokens, so that drafts are found; all begin alike."""
    common = [choices.randrange(3, 12) for _ in range(longest)]
    prompts = []
    for number in range(choices.randint(1, 6)):
        shared = choices.randint(0, longest - 1)
        own = [choices.randrange(3, 12) for _ in range(choices.randint(1, longest - shared))]
        prompts.append(Prompt(id=f"p{number}", token_ids=common[:shared] + own, answer=""))
    return prompts


def random_sampling(choices: random.Random) -> Sampling:
    return Sampling(
        num_samples=choices.randint(1, 4),
        max_new_tokens=choices.randint(1, 40),
        stop_token_ids=choices.choice([(), (2,), (2, 7, 11)]),
        seed=choices.randrange(100),
        step=choices.randrange(100),
        temperature=choices.choice([0.0, 0.3, 1.0]),  # no filters: two tokens may be as good as equal at their border
    )


async def some_rollouts(
    engine: NativeEngine, prompts: Sequence[Prompt], sampling: Sampling, choices: random.Random, *, leave_after: int
) -> dict[Key, Rollout]:
    """Rollouts until so many have come, between updates that leave the weights as they are."""
    found: dict[Key, Rollout] = {}
    rollouts = engine.generate(prompts, sampling)
    while len(found) < leave_after:
        pending = asyncio.ensure_future(anext(rollouts))
        while not pending.done():
            await asyncio.sleep(0)
            if choices.random() < 0.03:
                engine.update(engine.version + 1)
        got = pending.result()
        found[got.prompt_id, got.sample] = got
    await rollouts.aclose()
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.usefixtures("checked_cycles")
def test_nothing_at_once_changes_what_is_sampled(
    seed: int,
    policy: PreTrainedModel,
    make_engine: MakeEngine,
    collect: Collect,
    resident_scripted: Callable[..., Any],
    learned_drafting: Callable[..., Any],
) -> None:
    choices = random.Random(seed)
    scripted = resident_scripted({}, 0.5, 259)
    combined, rings = learned_drafting(policy)
    drafter = choices.choice([None, NgramDrafter(min_match=1, max_rollouts=3), scripted, combined])
    arms = [*ARMS, *LEARNED] if drafter is combined else ARMS
    block_size = choices.choice([1, 4, 16])
    engine = NativeEngine(
        policy,
        drafter=drafter,
        chooser=FixedChooser(OFF) if drafter is None else RandomChooser(choices, arms),
        rollout=RolloutConfig(
            block_size=block_size,
            max_running=choices.randint(1, 9),
            kv_tokens=choices.choice([0, 80, 96, 160]),
            prefill_tokens=choices.choice([1, 7, 64]),
        ),
        cycles="resident",
        reader=rings if drafter is combined else None,
    )
    for _ in range(3):
        prompts, sampling = random_prompts(choices, longest=24), random_sampling(choices)
        expected = collect(make_engine(), prompts, sampling)
        scripted.truth = {key: rollout.token_ids for key, rollout in expected.items()}
        count = len(expected) if choices.random() < 0.7 else choices.randint(1, len(expected))
        found = asyncio.run(some_rollouts(engine, prompts, sampling, choices, leave_after=count))
        assert len(found) == count
        for key, got in found.items():
            assert got.token_ids == expected[key].token_ids, key
            assert got.finish == expected[key].finish
            assert got.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)
            assert sum(length for _, length in got.version_spans) == len(got.token_ids)
        assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks
        residency = engine._workspace.residency
        assert residency is not None
        assert not residency.rows.active.any()
        assert (residency.texts.groups == -1).all()
        assert len(residency._free_texts) == len(set(residency._free_texts)) == len(residency.texts.lengths) - 1
        assert not scripted.prompts, "a text is still taken"
        assert not rings._running, "a text is still read"

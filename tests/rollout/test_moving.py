"""Sequences that move between engines, or back, at any moment: their rollouts are those of engines left alone."""

import asyncio
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from configs.errors import DataError, ResourceError
from configs.schema import RolloutConfig
from drafter.ngram import NgramDrafter
from drafter.suffix import SuffixDrafter
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Partial, Prompt, Rollout, Sampling

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]
SAMPLING = Sampling(num_samples=3, max_new_tokens=24, stop_token_ids=(2,), seed=11, step=4)
KINDS = ["hosted", "resident"]


class Relay:
    """Engines that hand sequences to one another: which, how many and when is drawn."""

    def __init__(self, engines: Sequence[NativeEngine], sampling: Sampling, choices: random.Random) -> None:
        self.found: dict[Key, Rollout] = {}
        self.num_moved = 0
        self._engines = engines
        self._sampling = sampling
        self._choices = choices
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, prompts: Sequence[Prompt]) -> None:
        """All rollouts of these prompts, which the first engine is given."""
        await self._start(self._engines[0], prompts, [])
        while self._tasks:
            await asyncio.sleep(0)
            if self._choices.random() < 0.2:
                await self._move()
            if self._choices.random() < 0.02:
                engine = self._choices.choice(self._engines)
                engine.update(engine.version + 1)
            for task in [task for task in self._tasks if task.done()]:
                self._tasks.remove(task)
                await task

    async def _move(self) -> None:
        giver, taker = self._choices.choices(self._engines, k=2)
        before, count = giver.progress(), self._choices.randint(1, 5)
        # as if they crossed processes
        partials: list[Partial] = pickle.loads(pickle.dumps(giver.surrender(count)))
        assert len(partials) <= count
        assert all(before[p.prompt.id, p.sample] <= len(p.token_ids) for p in partials)
        assert giver.progress().keys() <= before.keys() - {(p.prompt.id, p.sample) for p in partials}
        self.num_moved += len(partials)
        if partials and taker.is_generating:
            taker.adopt(partials)
        elif partials:
            await self._start(taker, [], partials)

    async def _start(self, engine: NativeEngine, prompts: Sequence[Prompt], partials: Sequence[Partial]) -> None:
        self._tasks.append(asyncio.create_task(self._collect(engine, prompts, partials)))
        await asyncio.sleep(0)

    async def _collect(self, engine: NativeEngine, prompts: Sequence[Prompt], partials: Sequence[Partial]) -> None:
        async for rollout in engine.generate(prompts, self._sampling, partials=partials):
            key = (rollout.prompt_id, rollout.sample)
            assert key not in self.found
            self.found[key] = rollout


@pytest.mark.parametrize(
    ("device", "seed"),
    [
        *(("cpu", seed) for seed in range(24)),
        *(pytest.param("cuda", seed, marks=pytest.mark.gpu) for seed in range(6)),
    ],
)
def test_sequences_that_move_at_any_moment_sample_the_same(
    device: str,
    seed: int,
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    policy: PreTrainedModel,
    tiny_model_dir: Path,
    assert_same: AssertSame,
    scripted_drafter: Callable[..., Any],
    resident_scripted: Callable[..., Any],
    learned_drafting: Callable[..., Any],
    chain: Strategy,
    tree: Strategy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rollout.workspace.LENGTH_STEP", 16)  # rows soon too short for a longer prompt
    choices = random.Random(seed)
    sampling = replace(SAMPLING, temperature=choices.choice([0.0, 1.0]), stop_token_ids=choices.choice([(), (2, 7)]))
    expected = collect(make_engine(), prompts, sampling)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    model = policy if device == "cpu" else load_policy(tiny_model_dir, device=device, dtype="float32")

    def engine() -> NativeEngine:
        cycles = choices.choice(KINDS) if device == "cpu" else "resident"
        strategy = choices.choice([OFF, chain, tree])
        combined, rings = learned_drafting(model)
        drafters = {
            "hosted": [SuffixDrafter(min_match=1), scripted_drafter(truth, 0.6, 259)],
            "resident": [NgramDrafter(min_match=1), resident_scripted(truth, 0.6, 259), combined],
        }
        if device == "cuda":  # no script can be captured
            drafters["resident"] = [NgramDrafter(min_match=1), combined]
        drafter = None if strategy == OFF else choices.choice(drafters[cycles])
        eagle = replace(strategy, source="eagle")
        return NativeEngine(
            model,
            drafter=drafter,
            chooser=FixedChooser(strategy, eagle) if drafter is combined else FixedChooser(strategy),
            reader=rings if drafter is combined else None,
            rollout=RolloutConfig(
                block_size=choices.choice([1, 4, 16]),
                max_running=choices.randint(1, 9),
                kv_tokens=choices.choice([0, 64, 96, 200]),
                prefill_tokens=choices.choice([1, 7, 64]),
            ),
            cycles=cycles,  # type: ignore[arg-type]
        )

    engines = [engine() for _ in range(choices.randint(1, 3))]
    relay = Relay(engines, sampling, choices)
    asyncio.run(relay.run(prompts))
    if device == "cpu":
        assert_same(relay.found, expected)
    else:  # whose float32 sums are another processor's
        assert {key: rollout.token_ids for key, rollout in relay.found.items()} == truth
    assert relay.num_moved > 0
    for rollout in relay.found.values():
        assert sum(count for _, count in rollout.version_spans) == len(rollout.token_ids)
        assert rollout.spec.forwards + rollout.spec.accepted >= len(rollout.token_ids)
    for each in engines:
        assert not each.is_generating
        assert each._workspace.pool.num_free == each._workspace.pool.num_blocks
        if each._workspace.residency is not None:
            assert not each._workspace.residency.rows.active.any()
            assert (each._workspace.residency.texts.groups == -1).all()
            assert len(set(each._workspace.residency._free_texts)) == len(each._workspace.residency.texts.lengths) - 1


@pytest.mark.parametrize("cycles", KINDS)
def test_those_with_most_left_go_first(cycles: str, make_engine: MakeEngine, prompts: list[Prompt]) -> None:
    engine = make_engine(cycles=cycles, max_running=3)
    sampling = replace(SAMPLING, num_samples=1, stop_token_ids=())

    async def run() -> tuple[list[Partial], list[Partial], list[Rollout]]:
        assert engine.surrender(3) == []
        rollouts = engine.generate(prompts, sampling)
        pending = asyncio.ensure_future(anext(rollouts))
        for _ in range(8):
            await asyncio.sleep(0)
        first, rest = engine.surrender(1), engine.surrender(99)
        assert engine.progress() == {}
        engine.adopt([])
        engine.adopt(first)
        return first, rest, [await pending, *[rollout async for rollout in rollouts]]

    first, rest, rollouts = asyncio.run(run())
    assert [partial.prompt.id for partial in first] == ["p3"], "the one that waited"
    assert not first[0].token_ids
    left = [sampling.max_new_tokens - len(partial.token_ids) for partial in rest]
    assert len(left) == 3
    assert left == sorted(left, reverse=True)
    assert all(0 < tokens < sampling.max_new_tokens for tokens in left)
    assert [rollout.prompt_id for rollout in rollouts] == ["p3"]


@pytest.mark.parametrize("cycles", KINDS)
def test_a_longer_sequence_makes_an_engine_under_way_grow(
    cycles: str, make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], assert_same: AssertSame
) -> None:
    long = Prompt(id="long", token_ids=prompts[1].token_ids * 8, answer="")
    sampling = replace(SAMPLING, stop_token_ids=())
    expected = collect(make_engine(), [*prompts[:1], long], sampling)

    async def run(giver: NativeEngine, taker: NativeEngine) -> dict[Key, Rollout]:
        other = giver.generate([long], sampling)
        pending = asyncio.ensure_future(anext(other))
        mine = taker.generate(prompts[:1], sampling)
        first = asyncio.ensure_future(anext(mine))
        for _ in range(12):
            await asyncio.sleep(0)
        before = taker._workspace.pool.num_blocks
        partials = giver.surrender(3)
        assert all(partial.token_ids for partial in partials)
        taker.adopt(partials)
        assert taker._workspace.pool.num_blocks > before
        with pytest.raises(StopAsyncIteration):
            await pending
        return {(r.prompt_id, r.sample): r for r in [await first, *[rollout async for rollout in mine]]}

    assert_same(asyncio.run(run(make_engine(cycles=cycles), make_engine(cycles=cycles))), expected)


@pytest.mark.parametrize("cycles", KINDS)
def test_what_an_engine_cannot_hold_is_refused_and_the_rest_goes_on(
    cycles: str, make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], assert_same: AssertSame
) -> None:
    sampling = replace(SAMPLING, stop_token_ids=())
    expected = collect(make_engine(), prompts, sampling)
    engine = make_engine(cycles=cycles, kv_tokens=64)

    def partial(num_tokens: int) -> Partial:
        prompt = Prompt(id="long", token_ids=[5] * num_tokens, answer="")
        return engine._sequence(prompt, 0, sampling).partial()

    async def run() -> dict[Key, Rollout]:
        rollouts = engine.generate(prompts, sampling)
        first = await anext(rollouts)
        with pytest.raises(ResourceError, match=r"set rollout.kv_tokens=104"):
            engine.adopt([partial(80)])
        with pytest.raises(DataError, match="exceed the model's context of 512"):
            engine.adopt([partial(500)])
        return {(r.prompt_id, r.sample): r for r in [first, *[rollout async for rollout in rollouts]]}

    assert_same(asyncio.run(run()), expected)

"""The engine with its state on the device: the same rollouts as planned on the host, whatever drafts or preempts."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.errors import DivergedError
from configs.schema import RolloutConfig
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import CycleReport, FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]
SAMPLING = Sampling(num_samples=2, max_new_tokens=20, stop_token_ids=(2,), seed=3, step=5)
TRANSFORMS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "all filters": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_resident_cycles_sample_what_hosted_ones_do(
    transform: str, make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], assert_same: AssertSame
) -> None:
    sampling = replace(SAMPLING, **TRANSFORMS[transform])
    expected = collect(make_engine(), prompts, sampling)
    rollouts = collect(make_engine(cycles="resident"), prompts, sampling)
    assert_same(rollouts, expected)
    assert all(rollout.spec.forwards == len(rollout.token_ids) for rollout in rollouts.values())


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("hit_rate", [0.0, 0.6, 1.0], ids=["bad", "mixed", "oracle"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_draft_on_the_device_changes_what_is_sampled(
    transform: str,
    hit_rate: float,
    shape: str,
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    resident_scripted: type,
    request: pytest.FixtureRequest,
    assert_same: AssertSame,
) -> None:
    strategy: Strategy = request.getfixturevalue(shape)
    sampling = replace(SAMPLING, **TRANSFORMS[transform])
    expected = collect(make_engine(), prompts, sampling)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    drafter = resident_scripted(truth=truth, hit_rate=hit_rate, vocab_size=259)
    rollouts = collect(make_engine(drafter, strategy, cycles="resident"), prompts, sampling)
    assert_same(rollouts, expected)
    assert drafter.num_finished == len(rollouts)
    assert not drafter.prompts, "a text is still taken"
    accepted = sum(rollout.spec.accepted for rollout in rollouts.values())
    assert accepted == 0 if hit_rate == 0 else accepted > 0
    for rollout in rollouts.values():
        assert rollout.spec.forwards + rollout.spec.accepted >= len(rollout.token_ids)
        assert sum(rollout.spec.proposed_by_depth) == rollout.spec.proposed
        assert sum(rollout.spec.accepted_by_depth) == rollout.spec.accepted


def test_no_preemption_or_chunking_on_the_device_changes_what_is_sampled(
    options: dict[str, int],
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    resident_scripted: type,
    tree: Strategy,
    assert_same: AssertSame,
) -> None:
    expected = collect(make_engine(), prompts, SAMPLING)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    engine = make_engine(resident_scripted(truth, 0.7, 259), tree, cycles="resident", **options)
    assert_same(collect(engine, prompts, SAMPLING), expected)
    assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks


def test_a_second_call_reuses_rows_and_texts(
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    resident_scripted: type,
    chain: Strategy,
    assert_same: AssertSame,
) -> None:
    engine = make_engine(resident_scripted({}, 0.5, 259), chain, cycles="resident")
    for step in range(3):
        sampling = replace(SAMPLING, step=step, num_samples=3)
        assert_same(collect(engine, prompts, sampling), collect(make_engine(), prompts, sampling))


def test_leaving_early_vacates_all_rows_and_the_engine_goes_on_as_new(
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    resident_scripted: type,
    chain: Strategy,
    assert_same: AssertSame,
) -> None:
    drafter = resident_scripted({}, 0.5, 259)
    engine = make_engine(drafter, chain, cycles="resident")

    async def take_one() -> None:
        rollouts = engine.generate(prompts, SAMPLING)
        await anext(rollouts)
        await rollouts.aclose()

    asyncio.run(take_one())
    assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks
    assert engine._workspace.residency is not None
    assert not engine._workspace.residency.sequences
    assert not drafter.prompts
    assert not engine._workspace.residency.rows.active.any()
    assert_same(collect(engine, prompts, SAMPLING), collect(make_engine(), prompts, SAMPLING))


def test_weights_that_change_in_flight_count_from_the_next_token_on(
    tiny_model_dir: Path, prompts: list[Prompt], resident_scripted: type, chain: Strategy
) -> None:
    sampling = replace(SAMPLING, stop_token_ids=(), max_new_tokens=12, num_samples=1)

    def run(cycles: str, drafter: object, strategy: Strategy, change_after: dict[str, int]) -> dict[str, Rollout]:
        """change_after: tokens of each prompt's rollout at the change; filled where it is empty."""
        model = load_policy(tiny_model_dir, device="cpu", dtype="float32")
        engine = NativeEngine(
            model,
            drafter=drafter,  # type: ignore[arg-type]
            chooser=FixedChooser(strategy),
            rollout=RolloutConfig(block_size=4, max_running=8),
            cycles=cycles,  # type: ignore[arg-type]
        )

        async def change_half_way() -> list[Rollout]:
            rollouts = engine.generate(prompts, sampling)
            pending = asyncio.ensure_future(anext(rollouts))
            for _ in range(6):
                await asyncio.sleep(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.3)
            engine.update(7)
            return [await pending, *[rollout async for rollout in rollouts]]

        return {rollout.prompt_id: rollout for rollout in asyncio.run(change_half_way())}

    resident = run("resident", resident_scripted({}, 0.5, 259), chain, {})
    assert {tuple(version for version, _ in r.version_spans) for r in resident.values()} == {(0, 7)}
    for prompt in prompts:
        old = resident[prompt.id].version_spans[0][1]
        model = load_policy(tiny_model_dir, device="cpu", dtype="float32")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        # the noise is that of the position, so the rest is what a fresh engine samples after the same beginning
        tokens = [*prompt.token_ids, *resident[prompt.id].token_ids[:old]]
        again = replace(prompt, token_ids=tokens)
        engine = NativeEngine(
            model, drafter=None, chooser=FixedChooser(OFF), rollout=RolloutConfig(block_size=4), cycles="hosted"
        )

        async def rest(engine: NativeEngine, prompt: Prompt, left: int) -> Rollout:
            return await anext(engine.generate([prompt], replace(sampling, max_new_tokens=left)))

        assert asyncio.run(rest(engine, again, 12 - old)).token_ids == resident[prompt.id].token_ids[old:]


def test_a_policy_that_turned_to_nan_stops_resident_rollouts(
    tiny_model_dir: Path, collect: Collect, prompts: list[Prompt]
) -> None:
    broken = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)
    engine = NativeEngine(
        broken, drafter=None, chooser=FixedChooser(OFF), rollout=RolloutConfig(block_size=4), cycles="resident"
    )
    for _ in range(2):  # nothing of a refused call is still under way
        with pytest.raises(DivergedError, match="not finite"):
            collect(engine, prompts, SAMPLING)
        engine.update(1)


def test_prompts_a_little_longer_keep_rows_and_graphs(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], assert_same: AssertSame
) -> None:
    engine = make_engine(cycles="resident", kv_tokens=400)
    collect(engine, prompts, SAMPLING)
    residency, clears = engine._workspace.residency, 0

    def count() -> None:
        nonlocal clears
        clears += 1

    engine._workspace.graphs.clear = count  # type: ignore[method-assign]
    longer = [replace(prompt, token_ids=prompt.token_ids * 2) for prompt in prompts]
    assert_same(collect(engine, longer, SAMPLING), collect(make_engine(), longer, SAMPLING))
    assert clears == 0
    assert engine._workspace.residency is residency


def test_a_strategy_is_chosen_for_the_rows_that_will_run(
    policy: PreTrainedModel, collect: Collect, prompts: list[Prompt]
) -> None:
    class Recorder(FixedChooser):
        def __init__(self) -> None:
            super().__init__(OFF)
            self.asked: list[tuple[int, float]] = []
            self.told: list[tuple[int, float]] = []

        def choose(self, *, batch: int, context: float) -> Strategy:
            self.asked.append((batch, context))
            return super().choose(batch=batch, context=context)

        def observe(self, report: CycleReport) -> None:
            self.told.append((report.batch, report.context))

    chooser = Recorder()
    engine = NativeEngine(
        policy,
        drafter=None,
        chooser=chooser,
        rollout=RolloutConfig(block_size=4, max_running=8),
        cycles="resident",
    )
    sampling = replace(SAMPLING, stop_token_ids=(), num_samples=1)
    collect(engine, prompts[1:], sampling)
    assert chooser.asked[0] == (1, 0.0)  # before the prompts are computed
    assert chooser.asked[1] == chooser.told[0]
    assert chooser.told[0][0] == 3

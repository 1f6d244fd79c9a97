"""What an engine says it does, and which tokens of a rollout it says were drafts."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from drafter.types import OFF, Strategy
from rollout.activity import LONG_S, Tally, label
from rollout.engine import NativeEngine
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
SAMPLING = Sampling(num_samples=3, max_new_tokens=16, stop_token_ids=(2,), seed=11, step=4)


def spans(tally: Tally, *, is_generating: bool = False) -> list[tuple[str, float, float]]:
    activity = tally.activity(running=0, waiting=0, preempted=0, is_generating=is_generating)
    return [(span.kind, span.begin, span.end) for span in activity.spans]


def cycles(tally: Tally, *ends: tuple[float, bool], begin: float = 0.0) -> None:
    """Cycles one after another, each until a time; whether it computed prompts."""
    for end, prefills in ends:
        tally.cycle(OFF, prefills=prefills)
        tally.spent(begin, end)
        begin = end


def test_cycles_of_a_kind_are_one_span() -> None:
    tally = Tally(0)
    cycles(tally, (0.2, True), (0.3, True), (0.5, False), (0.9, False))
    assert spans(tally) == [("prefill", 0.0, 0.3), ("decode", 0.3, 0.9)]


def test_short_alternations_join_their_neighbours() -> None:
    tally = Tally(0)
    cycles(tally, (0.1, False), (0.12, True), (0.2, False), (0.21, True), (0.3, False))
    assert spans(tally) == [("decode", 0.0, 0.3)]
    tally = Tally(0)
    cycles(tally, (0.01, True), (0.02, False), (0.03, True), (0.04, False), (0.2, False))
    assert spans(tally) == [("decode", 0.0, 0.2)]


def test_a_pause_ends_a_span_and_a_long_one_is_told_while_it_goes_on() -> None:
    tally = Tally(0)
    cycles(tally, (0.2, False))
    cycles(tally, (0.6, False), begin=0.4)
    assert spans(tally) == [("decode", 0.0, 0.2), ("decode", 0.4, 0.6)]
    tally = Tally(0)
    cycles(tally, *((number / 10, False) for number in range(1, 161)))
    told = spans(tally, is_generating=True)
    assert [end for _, _, end in told] == pytest.approx([LONG_S, 2 * LONG_S, 3 * LONG_S], abs=0.35)
    everything = spans(tally)
    assert everything[:3] == told and everything[-1][2] == 16.0
    assert all(before[2] == after[1] for before, after in zip(everything, everything[1:], strict=False))


def test_a_strategy_has_a_short_name(tree: Strategy) -> None:
    assert label(OFF) == "off"
    assert label(tree) == "suffix d4 k3 v9"


@pytest.mark.parametrize("kind", ["hosted", "resident"])
def test_an_engine_counts_what_it_does(
    kind: str, make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]
) -> None:
    engine = make_engine(cycles=kind, max_running=5)
    assert engine.activity()[0].step is None

    async def look_half_way() -> int:
        seen = 0
        async for _ in engine.generate(prompts, SAMPLING):
            (activity,) = engine.activity()
            assert activity.step == 4
            assert 0 <= activity.running <= 5
            seen = max(seen, activity.running + activity.waiting)
        return seen

    assert asyncio.run(look_half_way()) > 5
    (first,) = engine.activity()
    tokens = sum(len(rollout.token_ids) for rollout in collect(make_engine(), prompts, SAMPLING).values())
    assert (first.running, first.waiting, first.tokens) == (0, 0, tokens)
    assert set(first.cycles) == {"off"} and first.cycles["off"] >= 16
    assert first.spans and first.spans[0].begin < first.spans[-1].end
    # another generate of the same step counts on, as on a worker that takes over; that of another begins anew
    collect(engine, prompts, SAMPLING)
    assert engine.activity()[0].tokens == 2 * tokens
    collect(engine, prompts[:1], replace(SAMPLING, step=5))
    assert 0 < engine.activity()[0].tokens <= 48
    # an evaluation after an update has the same number as the one before it
    engine.update(1)
    collect(engine, prompts, replace(SAMPLING, step=5))
    assert engine.activity()[0].tokens <= 12 * 16


def test_an_engine_counts_whom_it_sends_back(make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]) -> None:
    engine = make_engine(kv_tokens=48)
    collect(engine, prompts, replace(SAMPLING, stop_token_ids=()))
    assert engine.activity()[0].preempted > 0
    collect(engine, prompts[:1], replace(SAMPLING, step=5))
    assert engine.activity()[0].preempted == 0


@pytest.mark.parametrize("kind", ["hosted", "resident"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_rollout_tells_which_of_its_tokens_were_drafts(
    kind: str,
    shape: str,
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    scripted_drafter: type,
    resident_scripted: type,
    request: pytest.FixtureRequest,
) -> None:
    strategy: Strategy = request.getfixturevalue(shape)
    truth = {key: rollout.token_ids for key, rollout in collect(make_engine(), prompts, SAMPLING).items()}
    make = scripted_drafter if kind == "hosted" else resident_scripted
    engine = make_engine(make(truth=truth, hit_rate=0.7, vocab_size=259), strategy, cycles=kind)
    rollouts = collect(engine, prompts, SAMPLING)
    assert engine.activity()[0].cycles["suffix"] > 0
    for rollout in rollouts.values():
        spec, length = rollout.spec, len(rollout.token_ids)
        assert sum(count for _, count in spec.drafted) == spec.accepted
        reached = 0
        for first, count in spec.drafted:
            assert reached <= first and 0 < count <= strategy.depth
            # a forward commits one token that nobody drafted after those that were, but where the response ends
            reached = first + count + 1
        assert reached <= length + 1
        # all others were sampled one a forward
        assert spec.forwards - (length - spec.accepted) == (reached == length + 1)
    assert any(rollout.spec.drafted for rollout in rollouts.values())


@pytest.mark.parametrize("kind", ["hosted", "resident"])
def test_drafts_are_remembered_when_a_rollout_moves(
    kind: str,
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    scripted_drafter: type,
    resident_scripted: type,
    chain: Strategy,
) -> None:
    truth = {key: rollout.token_ids for key, rollout in collect(make_engine(), prompts, SAMPLING).items()}
    make = scripted_drafter if kind == "hosted" else resident_scripted

    def engine() -> NativeEngine:
        return make_engine(make(truth=truth, hit_rate=1.0, vocab_size=259), chain, cycles=kind, max_running=64)

    async def run() -> list[Rollout]:
        giver, taker = engine(), engine()
        stream = giver.generate(prompts, SAMPLING)
        first = await anext(stream)
        partials = giver.surrender(99)
        finished = [first, *[rollout async for rollout in stream]]
        assert any(partial.spec.drafted for partial in partials)
        return [*finished, *[rollout async for rollout in taker.generate([], SAMPLING, partials=partials)]]

    rollouts = asyncio.run(run())
    assert len(rollouts) == 12
    for rollout in rollouts:
        assert rollout.token_ids == truth[rollout.prompt_id, rollout.sample]
        assert sum(count for _, count in rollout.spec.drafted) == rollout.spec.accepted
        assert all(first + count <= len(rollout.token_ids) for first, count in rollout.spec.drafted)

"""The engine around its cycles: caches after rejections, early exits, weight updates, errors, statistics."""

import asyncio
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.errors import DataError, DivergedError, ResourceError
from configs.schema import RolloutConfig
from drafter.types import OFF, Strategy
from kernels.attention import paged_sequences
from rollout.engine import NativeEngine
from rollout.model import PagedCache, forward_paged, load_policy
from rollout.sequence import Sequence
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling
from rollout.workspace import Workspace

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
SAMPLING = Sampling(num_samples=3, max_new_tokens=16, stop_token_ids=(2,), seed=11, step=0)


def dense_prefill(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Keys and values of all tokens computed in one forward: [layers, 2, tokens, Hkv, D]."""
    length = len(tokens)
    cache = PagedCache(model.config, num_blocks=1, block_size=length, device="cpu", dtype=torch.float32)
    seqs = paged_sequences(
        cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen_q=length,
        context_lens=torch.zeros(1, dtype=torch.int32),
        max_context=0,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slots=torch.arange(length),
        block_size=length,
    )
    forward_paged(model, torch.tensor(tokens), torch.arange(length), seqs, cache, torch.tensor([0]))
    return cache.storage[:, :, 0]


def cached(engine: NativeEngine, sequence: Sequence) -> torch.Tensor:
    """What the engine holds for a sequence: [layers, 2, num_cached, Hkv, D]."""
    assert engine._workspace.cache is not None
    slots = [sequence.slot(index) for index in range(sequence.num_cached)]
    return engine._workspace.cache.storage.flatten(2, 3)[:, :, slots]


@pytest.mark.parametrize("hit_rate", [0.0, 0.7], ids=["all rejected", "some accepted"])
def test_the_cache_after_rejections_equals_a_fresh_prefill(
    hit_rate: float,
    make_engine: MakeEngine,
    collect: Collect,
    policy: PreTrainedModel,
    prompts: list[Prompt],
    scripted_drafter: type,
    tree: Strategy,
) -> None:
    truth = {key: rollout.token_ids for key, rollout in collect(make_engine(), prompts, SAMPLING).items()}
    engine = make_engine(scripted_drafter(truth=truth, hit_rate=hit_rate, vocab_size=259), tree, max_running=12)
    compared = 0

    async def stop_half_way() -> None:
        nonlocal compared
        rollouts = engine.generate(prompts, SAMPLING)
        async for _ in rollouts:
            assert engine._scheduler is not None
            for sequence in engine._scheduler.running:
                if sequence.num_cached == len(sequence.tokens) - 1:
                    expected = dense_prefill(policy, sequence.tokens[:-1])
                    torch.testing.assert_close(cached(engine, sequence), expected, atol=1e-4, rtol=1e-4)
                    compared += 1

    asyncio.run(stop_half_way())
    assert compared > 10


def test_leaving_early_returns_all_blocks_and_the_engine_goes_on_as_new(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], scripted_drafter: type, chain: Strategy
) -> None:
    drafter = scripted_drafter(truth={}, hit_rate=0.0, vocab_size=259)
    engine = make_engine(drafter, chain)

    async def take_one() -> None:
        rollouts = engine.generate(prompts, SAMPLING)
        await anext(rollouts)
        await rollouts.aclose()

    asyncio.run(take_one())
    assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks
    assert drafter.finished == drafter.texts.keys(), "the drafter keeps nothing in flight"
    drafter.texts.clear()
    drafter.finished.clear()
    expected = collect(make_engine(), prompts, SAMPLING)
    assert {key: rollout.token_ids for key, rollout in collect(engine, prompts, SAMPLING).items()} == {
        key: rollout.token_ids for key, rollout in expected.items()
    }


def test_weights_that_change_between_cycles_count_from_the_next_token_on(
    tiny_model_dir: Path, prompts: list[Prompt]
) -> None:
    model = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    rollout = RolloutConfig(block_size=4, max_running=8)
    engine = NativeEngine(model, drafter=None, chooser=FixedChooser(OFF), rollout=rollout)
    sampling = replace(SAMPLING, num_samples=2, temperature=0.0, stop_token_ids=(), max_new_tokens=8)
    short = Prompt(id="short", token_ids=[5, 6], answer="")

    async def change_half_way() -> list[Rollout]:
        finished = []
        # one token a cycle: after four cycles the weights change
        rollouts = engine.generate([*prompts, short], sampling)
        pending = asyncio.ensure_future(anext(rollouts))
        for _ in range(4):
            await asyncio.sleep(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        engine.update(7)
        finished.append(await pending)
        finished += [rollout async for rollout in rollouts]
        return finished

    rollouts = asyncio.run(change_half_way())
    by_id = {prompt.id: prompt for prompt in [*prompts, short]}
    changed = 0
    for rollout in rollouts:
        assert sum(count for _, count in rollout.version_spans) == len(rollout.token_ids)
        if [version for version, _ in rollout.version_spans] != [0, 7]:
            continue
        changed += 1
        old = rollout.version_spans[0][1]
        tokens = [*by_id[rollout.prompt_id].token_ids, *rollout.token_ids[:old]]
        follow_up = Prompt(id="again", token_ids=tokens, answer="")
        fresh = NativeEngine(model, drafter=None, chooser=FixedChooser(OFF), rollout=RolloutConfig(block_size=4))
        rest = replace(sampling, num_samples=1, max_new_tokens=8 - old)

        async def run(engine: NativeEngine, prompt: Prompt, sampling: Sampling) -> Rollout:
            return await anext(engine.generate([prompt], sampling))

        assert asyncio.run(run(fresh, follow_up, rest)).token_ids == rollout.token_ids[old:]
    assert changed > 0


def test_an_oracle_saves_forwards_and_is_counted_by_depth(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], scripted_drafter: type, chain: Strategy
) -> None:
    sampling = replace(SAMPLING, stop_token_ids=())
    plain = collect(make_engine(), prompts, sampling)
    truth = {key: rollout.token_ids for key, rollout in plain.items()}
    drafted = collect(make_engine(scripted_drafter(truth, 1.0, 259), chain), prompts, sampling)
    for key, rollout in drafted.items():
        spec = rollout.spec
        assert plain[key].spec.forwards == len(rollout.token_ids)
        assert spec.forwards + spec.accepted == len(rollout.token_ids), "every draft was right up to the end"
        assert spec.accepted_by_depth == sorted(spec.accepted_by_depth, reverse=True)
        assert len(spec.proposed_by_depth) <= chain.depth
    assert sum(r.spec.forwards for r in drafted.values()) < 0.6 * sum(len(r.token_ids) for r in drafted.values())


def test_a_stop_token_ends_a_rollout_inside_an_accepted_draft(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], scripted_drafter: type, chain: Strategy
) -> None:
    free = collect(make_engine(), prompts[:1], replace(SAMPLING, stop_token_ids=()))
    truth = {key: rollout.token_ids for key, rollout in free.items()}
    stop = truth["p0", 0][5]
    engine = make_engine(scripted_drafter(truth, 1.0, 259), chain)
    rollouts = collect(engine, prompts[:1], replace(SAMPLING, stop_token_ids=(stop,)))
    for key, rollout in rollouts.items():
        expected = truth[key][: truth[key].index(stop) + 1] if stop in truth[key] else truth[key]
        assert rollout.token_ids == expected
        assert rollout.finish == ("stop" if stop in truth[key] else "length")
        assert len(rollout.logprobs) == len(rollout.token_ids)
    assert rollouts["p0", 0].finish == "stop"


def test_a_policy_in_training_mode_is_handed_back_in_training_mode(
    make_engine: MakeEngine, collect: Collect, policy: PreTrainedModel, prompts: list[Prompt]
) -> None:
    policy.train()
    collect(make_engine(), prompts[:1], SAMPLING)
    assert policy.training
    policy.eval()


def test_full_garbage_collections_wait_until_the_rollouts_are_done(
    make_engine: MakeEngine, prompts: list[Prompt]
) -> None:
    before = gc.get_threshold()

    async def take_one() -> int:
        rollouts = make_engine().generate(prompts, SAMPLING)
        await anext(rollouts)
        during = gc.get_threshold()[2]
        await rollouts.aclose()
        return during

    assert asyncio.run(take_one()) > 1_000_000
    assert gc.get_threshold() == before


def test_a_later_call_that_needs_more_cache_gets_it(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]
) -> None:
    engine = make_engine()
    collect(engine, prompts[:1], replace(SAMPLING, num_samples=1))
    small = engine._workspace.pool.num_blocks
    collect(engine, prompts, SAMPLING)
    assert engine._workspace.pool.num_blocks > small


def test_saved_state_brings_back_the_drafter_and_the_size_of_the_cache(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], scripted_drafter: type, chain: Strategy
) -> None:
    engine = make_engine(scripted_drafter({}, 0.0, 259, seed=5), chain)
    collect(engine, prompts, SAMPLING)
    resumed = make_engine(scripted_drafter({}, 0.0, 259), chain)
    resumed.load_state_dict(engine.state_dict())
    assert resumed.state_dict() == engine.state_dict()
    collect(resumed, prompts[:1], SAMPLING)
    assert resumed._workspace.pool.num_blocks == engine._workspace.pool.num_blocks


def test_a_resumed_cache_grows_no_further_than_the_uninterrupted_one(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    affordable = 15
    monkeypatch.setattr(Workspace, "_affordable_blocks", lambda workspace: affordable)
    engine = make_engine()
    collect(engine, prompts[:1], replace(SAMPLING, num_samples=1))
    assert engine._workspace.pool.num_blocks < affordable
    resumed = make_engine()
    resumed.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    affordable = 1000
    for either in (engine, resumed):
        collect(either, prompts, SAMPLING)
        assert either._workspace.pool.num_blocks == 15


def test_no_prompts_give_no_rollouts(make_engine: MakeEngine, collect: Collect) -> None:
    assert collect(make_engine(), [], SAMPLING) == {}


def test_a_sequence_that_no_cache_can_hold_is_refused_with_the_size_it_needs(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]
) -> None:
    with pytest.raises(ResourceError, match=r"holds 32 tokens .* needs 40; set rollout.kv_tokens=40"):
        collect(make_engine(kv_tokens=32), prompts, SAMPLING)


def test_a_sequence_beyond_the_context_is_refused_by_name(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]
) -> None:
    with pytest.raises(DataError, match=r"'p1': 23 tokens and max_new_tokens=500 exceed .* 512"):
        collect(make_engine(), prompts, replace(SAMPLING, max_new_tokens=500))


def test_an_empty_and_a_repeated_prompt_are_refused(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]
) -> None:
    with pytest.raises(DataError, match="'e' has no tokens"):
        collect(make_engine(), [Prompt(id="e", token_ids=[], answer="")], SAMPLING)
    with pytest.raises(DataError, match="'p0' is given twice"):
        collect(make_engine(), [prompts[0], prompts[0]], SAMPLING)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_that_turned_to_nan_stops_the_rollouts(
    temperature: float, tiny_model_dir: Path, collect: Collect, prompts: list[Prompt]
) -> None:
    broken = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)
    engine = NativeEngine(broken, drafter=None, chooser=FixedChooser(OFF), rollout=RolloutConfig(block_size=4))
    with pytest.raises(DivergedError, match="not finite"):
        collect(engine, prompts, replace(SAMPLING, temperature=temperature))

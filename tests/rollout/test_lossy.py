"""Sampling under sparse attention: dense where nothing is left out, marked, and with both log-probs where rectified."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import RolloutConfig, SparseConfig
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, Rows
from kernels.attention import PackedSequences, PagedSequences, paged_sequences
from rollout.decoder import make_decoder
from rollout.engine import NativeEngine
from rollout.lossy import window
from rollout.model import PagedCache, alone, forward_packed, forward_paged
from rollout.selectors import make_sparse
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, SampledUnder, Sampling

Key = tuple[str, int]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]
MakeEngine = Callable[..., NativeEngine]
SAMPLING = Sampling(num_samples=2, max_new_tokens=41, stop_token_ids=(2,), seed=3, step=5)
BLOCK = 4
EVERYTHING, LITTLE = 4096, 12  # tokens of a budget
EVERY = 5


def sparse_config(budget: int, *, every: int = EVERY, selector: Any = "mean") -> SparseConfig:
    # the bound reads 16 blocks at least: of smaller ones, which these short sequences have more of
    block = 1 if selector == "quest" else BLOCK
    window_tokens = min(8, budget - 2 * BLOCK)
    return SparseConfig(
        mode="rectified", selector=selector, select_block=block, budget_tokens=budget, window=window_tokens, every=every
    )


@pytest.fixture
def lossy_engine(policy: PreTrainedModel) -> Callable[..., NativeEngine]:
    """An engine of the tiny policy that samples under a selector; keyword arguments are RolloutConfig's."""

    def make(under: SampledUnder, config: SparseConfig, **options: Any) -> NativeEngine:
        every = config.every if under == "rectified" else 1
        return NativeEngine(
            policy,
            drafter=SelfDrafter() if under == "rectified" else None,
            chooser=FixedChooser(window(every)),
            rollout=RolloutConfig(**({"block_size": 2 * BLOCK, "max_running": 8} | options)),
            sparse=make_sparse(config, policy),
        )

    return make


def dense_scores(policy: PreTrainedModel, prompt: Prompt, rollout: Rollout) -> list[float]:
    """The log-probs of a rollout's tokens in one packed forward, as training makes it."""
    tokens = torch.tensor([*prompt.token_ids, *rollout.token_ids])
    index = torch.arange(len(tokens))
    seqs = PackedSequences(torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    first = len(prompt.token_ids)
    with torch.no_grad():
        logits = forward_packed(policy, tokens, index, seqs, index[first - 1 : -1])
    return logits.log_softmax(dim=1).gather(1, tokens[first:, None])[:, 0].tolist()


@pytest.mark.parametrize("under", ["sparse", "rectified"])
def test_a_budget_for_everything_samples_what_dense_decoding_does(
    under: SampledUnder,
    lossy_engine: Callable[..., NativeEngine],
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    expected = collect(make_engine(), prompts, SAMPLING)
    rollouts = collect(lossy_engine(under, sparse_config(EVERYTHING)), prompts, replace(SAMPLING, under=under))
    assert_same(rollouts, expected)
    assert {rollout.sampled_under for rollout in rollouts.values()} == {under}
    for rollout in rollouts.values():
        known = rollout.dense_logprobs if under == "rectified" else []
        assert known == pytest.approx(rollout.logprobs if under == "rectified" else [], abs=1e-4)


def test_windows_of_one_token_are_dense_decoding(
    lossy_engine: Callable[..., NativeEngine],
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    expected = collect(make_engine(), prompts, SAMPLING)
    engine = lossy_engine("rectified", sparse_config(LITTLE, every=1))
    rollouts = collect(engine, prompts, replace(SAMPLING, under="rectified"))
    assert_same(rollouts, expected)
    for rollout in rollouts.values():
        assert rollout.dense_logprobs == pytest.approx(rollout.logprobs, abs=1e-4)


@pytest.mark.parametrize("selector", ["quest", "streaming", "mean", "verified"])
def test_a_rectified_rollout_knows_what_a_dense_forward_gives_its_tokens(
    selector: str,
    lossy_engine: Callable[..., NativeEngine],
    make_engine: MakeEngine,
    policy: PreTrainedModel,
    collect: Collect,
    prompts: list[Prompt],
) -> None:
    engine = lossy_engine("rectified", sparse_config(LITTLE, selector=selector))
    rollouts = collect(engine, prompts, replace(SAMPLING, under="rectified"))
    assert engine._workspace.pool.num_free == engine._workspace.pool.num_blocks
    by_id = {prompt.id: prompt for prompt in prompts}
    differences = []
    for rollout in rollouts.values():
        assert len(rollout.dense_logprobs) == len(rollout.logprobs) == len(rollout.token_ids)
        exact = dense_scores(policy, by_id[rollout.prompt_id], rollout)
        assert rollout.dense_logprobs == pytest.approx(exact, abs=1e-4)
        assert sum(count for _, count in rollout.spec.drafted) == rollout.spec.accepted == rollout.spec.proposed
        drafted = {index for first, count in rollout.spec.drafted for index in range(first, first + count)}
        for index, (p, q) in enumerate(zip(rollout.dense_logprobs, rollout.logprobs, strict=True)):
            if index not in drafted:  # the window's last, which the dense forward drew
                assert p == pytest.approx(q, abs=1e-4)
            differences.append(abs(p - q))
    assert max(differences) > 0.01, "the selector left nothing out: the test shows nothing"


def test_filters_are_of_the_sampling_and_not_of_the_policys_own_log_probs(
    lossy_engine: Callable[..., NativeEngine], policy: PreTrainedModel, collect: Collect, prompts: list[Prompt]
) -> None:
    sampling = replace(SAMPLING, under="rectified", top_k=5, num_samples=1)
    rollouts = collect(lossy_engine("rectified", sparse_config(LITTLE)), prompts, sampling)
    for prompt in prompts:
        rollout = rollouts[prompt.id, 0]
        assert rollout.dense_logprobs == pytest.approx(dense_scores(policy, prompt, rollout), abs=1e-4)


def test_a_plain_rollouts_log_probs_are_the_sparse_forwards(
    lossy_engine: Callable[..., NativeEngine], policy: PreTrainedModel, collect: Collect, prompts: list[Prompt]
) -> None:
    config = sparse_config(LITTLE)
    sampling = replace(SAMPLING, under="sparse", num_samples=1)
    rollouts = collect(lossy_engine("sparse", config), prompts, sampling)
    differences = []
    for prompt in prompts:
        rollout = rollouts[prompt.id, 0]
        assert rollout.sampled_under == "sparse" and not rollout.dense_logprobs
        assert rollout.logprobs == pytest.approx(sparse_scores(policy, config, prompt, rollout), abs=1e-4)
        exact = dense_scores(policy, prompt, rollout)
        differences += [abs(p - q) for p, q in zip(exact, rollout.logprobs, strict=True)]
    assert max(differences) > 0.01


@torch.inference_mode()
def sparse_scores(policy: PreTrainedModel, config: SparseConfig, prompt: Prompt, rollout: Rollout) -> list[float]:
    """The log-probs of a rollout's tokens, forwarded one by one under the selector after a dense prompt."""
    tokens = torch.tensor([*prompt.token_ids, *rollout.token_ids])
    size = 2 * BLOCK
    num_blocks = -(-len(tokens) // size)
    cache = PagedCache(policy.config, num_blocks=num_blocks, block_size=size, device="cpu", dtype=policy.dtype)
    table = torch.arange(num_blocks, dtype=torch.int32)[None]
    one = torch.ones(1, dtype=torch.int32)
    rows = Rows(text=0 * one, keys=one.long(), max_lengths=one, active=one, block_tables=table)
    decoder, sparse = make_decoder(policy), make_sparse(config, policy)
    decoder.reach(len(tokens))
    sparse.attach(cache, num_texts=1, num_rows=1, table_width=num_blocks)

    def sequence(begin: int, end: int) -> PagedSequences:
        return paged_sequences(
            cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32),
            max_seqlen_q=end - begin,
            context_lens=torch.tensor([begin], dtype=torch.int32),
            max_context=begin,
            block_tables=table,
            slots=torch.arange(begin, end),
            block_size=size,
        )

    first = len(prompt.token_ids)
    if first > 1:
        seqs = sequence(0, first - 1)
        decoder.forward(tokens[: first - 1], torch.arange(first - 1), seqs, cache)
        sparse.prefilled(seqs)
    scores = []
    for place in range(first - 1, len(tokens) - 1):
        seqs, at = sequence(place, place + 1), torch.tensor([place])
        hidden, _ = decoder.forward_with_aux(tokens[at], at, seqs, cache, (), sparse.forward(rows, 1))
        sparse.prefilled(seqs)
        scores.append(float(decoder.logits(hidden).log_softmax(dim=1)[0, tokens[place + 1]]))
    return scores


def test_between_windows_the_cache_is_that_of_a_dense_prefill(
    lossy_engine: Callable[..., NativeEngine], policy: PreTrainedModel, prompts: list[Prompt]
) -> None:
    engine = lossy_engine("rectified", sparse_config(LITTLE))
    sampling = replace(SAMPLING, under="rectified", num_samples=1, stop_token_ids=())
    looked = 0

    async def look() -> None:
        nonlocal looked
        task = asyncio.create_task(anext(engine.generate(prompts, sampling)))
        while not task.done():
            await asyncio.sleep(0)
            for sequence in engine._scheduler.running if engine._scheduler else ():
                if len(sequence.logprobs) > 2 * EVERY and sequence.num_cached == len(sequence.tokens) - 1:
                    slots = torch.tensor([sequence.slot(index) for index in range(sequence.num_cached)])
                    assert engine._workspace.cache is not None
                    kept = engine._workspace.cache.storage.flatten(2, 3)[:, :, slots]
                    torch.testing.assert_close(kept, dense_cache(policy, sequence.tokens[:-1]), rtol=0, atol=1e-4)
                    looked += 1
        await task

    asyncio.run(look())
    assert looked > len(prompts)


@torch.inference_mode()
def dense_cache(policy: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Keys and values of a fresh prefill, [layers, 2, tokens, Hkv, D]."""
    index = torch.arange(len(tokens))
    cache, seqs = alone(policy, num_tokens=len(tokens))
    forward_paged(policy, torch.tensor(tokens), index, seqs, cache, index[-1:])
    return cache.storage.flatten(2, 3)[:, :, : len(tokens)]


def test_no_preemption_or_chunking_changes_a_rectified_rollout(
    options: dict[str, int],
    lossy_engine: Callable[..., NativeEngine],
    collect: Collect,
    prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    # blocks of the cache hold whole selection blocks
    options = {name: value for name, value in options.items() if name != "block_size"} | {"block_size": BLOCK}
    sampling = replace(SAMPLING, under="rectified", max_new_tokens=20)
    expected = collect(lossy_engine("rectified", sparse_config(LITTLE)), prompts, sampling)
    rollouts = collect(lossy_engine("rectified", sparse_config(LITTLE), **options), prompts, sampling)
    assert_same(rollouts, expected)
    for key, rollout in rollouts.items():
        assert rollout.dense_logprobs == pytest.approx(expected[key].dense_logprobs, abs=1e-4)


def test_a_rectified_rollout_goes_on_elsewhere_as_it_would_have(
    lossy_engine: Callable[..., NativeEngine], collect: Collect, prompts: list[Prompt], assert_same: AssertSame
) -> None:
    sampling = replace(SAMPLING, under="rectified")
    expected = collect(lossy_engine("rectified", sparse_config(LITTLE)), prompts, sampling)
    giver, taker = (lossy_engine("rectified", sparse_config(LITTLE)) for _ in range(2))
    found: dict[Key, Rollout] = {}

    async def keep(engine: NativeEngine, *args: Any, **options: Any) -> None:
        async for rollout in engine.generate(*args, sampling, **options):
            found[rollout.prompt_id, rollout.sample] = rollout

    async def hand_over() -> None:
        giving = asyncio.create_task(keep(giver, prompts))
        for _ in range(5):
            await asyncio.sleep(0)
        partials = giver.surrender(4)
        assert len(partials) == 4 and any(partial.token_ids for partial in partials)
        assert all(len(partial.dense_logprobs) == len(partial.token_ids) for partial in partials)
        await asyncio.gather(giving, keep(taker, [], partials=partials))

    asyncio.run(hand_over())
    assert_same(found, expected)
    for key, rollout in found.items():
        assert rollout.dense_logprobs == pytest.approx(expected[key].dense_logprobs, abs=1e-4)


def test_one_engine_samples_densely_in_between(
    lossy_engine: Callable[..., NativeEngine],
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    assert_same: AssertSame,
) -> None:
    expected = collect(make_engine(), prompts, SAMPLING)
    for under in ("sparse", "rectified"):
        engine = lossy_engine(under, sparse_config(LITTLE))
        first = collect(engine, prompts, replace(SAMPLING, under=under))
        dense = collect(engine, prompts, SAMPLING)  # as an evaluation does: nothing sparse is found in the cache
        assert_same(dense, expected)
        assert all(r.sampled_under == "dense" and not r.dense_logprobs for r in dense.values())
        assert_same(collect(engine, prompts, replace(SAMPLING, under=under)), first)


def test_an_engine_without_a_selector_refuses_to_sample_under_one(
    make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]
) -> None:
    with pytest.raises(AssertionError, match="no selector"):
        collect(make_engine(), prompts, replace(SAMPLING, under="sparse"))


def test_a_window_drafts_all_but_its_last_token() -> None:
    assert window(1) == OFF
    assert (window(32).source, window(32).depth, window(32).num_verify) == ("sparse", 31, 31)

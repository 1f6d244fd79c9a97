"""Speculation on equals speculation off, whatever drafts, batches, preempts or restarts."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from drafter.types import Strategy
from kernels.attention import PackedSequences
from kernels.sample import noise_key, sample
from rollout.engine import NativeEngine
from rollout.model import forward_packed
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]

TRANSFORMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "cool": {"temperature": 0.7},
    "plain": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "all filters": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
}


def sampling_of(**options: Any) -> Sampling:
    defaults = Sampling(num_samples=2, max_new_tokens=20, stop_token_ids=(2,), seed=3, step=5)
    return replace(defaults, **options)


@torch.inference_mode()
def naive_rollout(
    model: PreTrainedModel, prompt: Prompt, number: int, sampling: Sampling
) -> tuple[list[int], list[float]]:
    """One sequence, one token at a time, everything recomputed each time."""
    tokens, logprobs = list(prompt.token_ids), []
    key = noise_key(seed=sampling.seed, step=sampling.step, prompt_id=prompt.id, sample=number)
    for _ in range(sampling.max_new_tokens):
        length = len(tokens)
        seqs = PackedSequences(cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length)
        logits = forward_packed(model, torch.tensor(tokens), torch.arange(length), seqs, torch.tensor([length - 1]))
        token, logprob = sample(
            logits,
            torch.tensor([key]),
            torch.tensor([length]),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        tokens.append(int(token))
        logprobs.append(float(logprob))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(prompt.token_ids) :], logprobs


@pytest.fixture(scope="module")
def plain(make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]) -> Callable[[Sampling], dict[Key, Rollout]]:
    """What is sampled without drafts; found once."""
    return cache(lambda sampling: collect(make_engine(), prompts, sampling))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_engine_equals_a_loop_without_any_cache(
    transform: str,
    plain: Callable[[Sampling], dict[Key, Rollout]],
    policy: PreTrainedModel,
    prompts: list[Prompt],
) -> None:
    sampling = sampling_of(**TRANSFORMS[transform])
    rollouts = plain(sampling)
    for prompt in prompts:
        for number in range(sampling.num_samples):
            token_ids, logprobs = naive_rollout(policy, prompt, number, sampling)
            assert rollouts[prompt.id, number].token_ids == token_ids
            assert rollouts[prompt.id, number].logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("hit_rate", [0.0, 0.6, 1.0], ids=["bad", "mixed", "oracle"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_draft_changes_what_is_sampled(
    transform: str,
    hit_rate: float,
    shape: str,
    make_engine: MakeEngine,
    plain: Callable[[Sampling], dict[Key, Rollout]],
    collect: Collect,
    prompts: list[Prompt],
    scripted_drafter: type,
    request: pytest.FixtureRequest,
    assert_same: AssertSame,
) -> None:
    strategy: Strategy = request.getfixturevalue(shape)
    sampling = sampling_of(**TRANSFORMS[transform])
    expected = plain(sampling)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    drafter = scripted_drafter(truth=truth, hit_rate=hit_rate, vocab_size=259)
    rollouts = collect(make_engine(drafter, strategy), prompts, sampling)
    assert_same(rollouts, expected)
    assert drafter.finished == rollouts.keys()
    accepted = sum(rollout.spec.accepted for rollout in rollouts.values())
    assert accepted == 0 if hit_rate == 0 else accepted > 0
    for rollout in rollouts.values():
        assert rollout.spec.forwards + rollout.spec.accepted >= len(rollout.token_ids)
        assert sum(rollout.spec.proposed_by_depth) == rollout.spec.proposed
        assert sum(rollout.spec.accepted_by_depth) == rollout.spec.accepted


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_no_batch_preemption_or_chunking_changes_what_is_sampled(
    shape: str,
    options: dict[str, int],
    make_engine: MakeEngine,
    plain: Callable[[Sampling], dict[Key, Rollout]],
    collect: Collect,
    prompts: list[Prompt],
    scripted_drafter: type,
    request: pytest.FixtureRequest,
    assert_same: AssertSame,
) -> None:
    sampling = sampling_of()
    expected = plain(sampling)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    drafter = scripted_drafter(truth=truth, hit_rate=0.7, vocab_size=259)
    assert_same(collect(make_engine(drafter, request.getfixturevalue(shape), **options), prompts, sampling), expected)


def test_another_engine_given_part_of_the_work_samples_the_same(
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    scripted_drafter: type,
    tree: Strategy,
    assert_same: AssertSame,
) -> None:
    sampling = sampling_of(num_samples=3)
    expected = collect(make_engine(), prompts, sampling)
    drafter = scripted_drafter(truth={}, hit_rate=0.0, vocab_size=259)
    part = collect(make_engine(drafter, tree, max_running=2), prompts[2:], sampling)
    assert_same(part, {key: rollout for key, rollout in expected.items() if key in part})
    assert len(part) == 6


def test_samples_and_steps_differ(make_engine: MakeEngine, collect: Collect, prompts: list[Prompt]) -> None:
    first = collect(make_engine(), prompts[:2], sampling_of())
    later = collect(make_engine(), prompts[:2], sampling_of(step=6))
    assert first["p1", 0].token_ids != first["p1", 1].token_ids
    assert first["p1", 0].token_ids != later["p1", 0].token_ids

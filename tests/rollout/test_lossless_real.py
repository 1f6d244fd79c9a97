"""Speculation on equals speculation off on a real language model, sampled at temperature 1."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from configs.schema import RolloutConfig
from drafter.suffix import SuffixDrafter
from drafter.types import OFF, Drafter, Strategy
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.pretrained import resolve
from rollout.scheduler import Scheduler
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
QUESTIONS = ["Write the numbers from 1 to 30.", "What is 17 + 25? Think step by step."]
SAMPLING = Sampling(num_samples=2, max_new_tokens=48, stop_token_ids=(2,), seed=1, step=0)


@pytest.fixture(scope="module")
def smollm() -> PreTrainedModel:
    return load_policy(resolve("smollm2-135m-instruct"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def questions() -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    prompts = []
    for number, question in enumerate(QUESTIONS):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompts.append(Prompt(id=str(number), token_ids=tokenizer.encode(text, add_special_tokens=False), answer=""))
    return prompts


@pytest.mark.slow
def test_real_rollouts_are_the_same_under_every_strategy_and_preemption(
    smollm: PreTrainedModel,
    questions: list[Prompt],
    collect: Callable[..., dict[Key, Rollout]],
    scripted_drafter: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def roll_out(drafter: Drafter | None, strategy: Strategy, *, kv_tokens: int = 0) -> dict[Key, Rollout]:
        rollout = RolloutConfig(kv_tokens=kv_tokens, prefill_tokens=50)
        engine = NativeEngine(smollm, drafter=drafter, chooser=FixedChooser(strategy), rollout=rollout)
        return collect(engine, questions, SAMPLING)

    expected = roll_out(None, OFF)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    assert len(set(map(tuple, truth.values()))) == 4, "samples of one prompt differ"
    mixed = scripted_drafter(truth=truth, hit_rate=0.7, vocab_size=1000)
    longest = max(len(prompt.token_ids) for prompt in questions) + SAMPLING.max_new_tokens
    tight = -(-longest // 16) * 16 + 64  # one sequence at its longest and a little more

    preemptions = 0
    preempt = Scheduler.preempt

    def counted(scheduler: Scheduler) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(scheduler)

    monkeypatch.setattr(Scheduler, "preempt", counted)
    chain = Strategy(source="suffix", depth=6, top_k=1, num_verify=6)
    tree = Strategy(source="suffix", depth=4, top_k=3, num_verify=8)
    runs = {
        "suffix chain": roll_out(SuffixDrafter(min_match=1), chain),
        "suffix tree, preempted": roll_out(SuffixDrafter(min_match=1), tree, kv_tokens=tight),
        "mixed tree, preempted": roll_out(mixed, tree, kv_tokens=tight),
    }
    for name, rollouts in runs.items():
        for key, rollout in rollouts.items():
            assert rollout.token_ids == expected[key].token_ids, (name, key)
            # 1e-3: float32 sums of 30 layers in another order
            torch.testing.assert_close(rollout.logprobs, expected[key].logprobs, atol=1e-3, rtol=0)
        assert sum(rollout.spec.accepted for rollout in rollouts.values()) > 0, name
    assert preemptions > 0

"""Rolling out under a clock: random prompts of a given length, an engine run to the end, seconds."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

from configs.errors import ConfigError
from configs.schema import RolloutConfig, SpecConfig
from drafter.ngram import NgramDrafter
from drafter.types import OFF, ResidentDrafter, Strategy
from launch.geometry import Subject
from rollout.engine import NativeEngine
from rollout.model import context_length
from rollout.pretrained import load_tokenizer
from rollout.strategy import Chooser, CycleReport, FixedChooser
from rollout.types import Prompt, Rollout, Sampling

BLOCK_SIZE = 16
SHORT = 16  # tokens of the run that is taken off a longer one's time: prefill and start drop out
PROBE_TOKENS = 128  # the longest sequence that verifies an engine (launch/agreement.py)
PREFILL_TOKENS = 8192  # a cycle, as vLLM's default

# the suffix drafter at the size its limits are given for: 16 tokens a row, the pending one among them
SPECULATIVE = Strategy(source="suffix", depth=8, top_k=2, num_verify=15)
QUESTIONS = (
    "What is {} + {}? Think step by step.",
    "A shop sells {} apples a day. How many does it sell in {} days? Explain how you found out.",
    "List the first numbers of the sequence that starts at {} and grows by {} each time.",
    "Write a short story about {} sheep and {} goats.",
    "Write a Python function that returns whether a number lies between {} and {}.",
)

_numbers = count()


class Contender(Protocol):
    """Something that generates under a clock: our engine, or a peer."""

    name: str

    def seconds(self, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
        """Sample new_tokens for each of batch random prompts at temperature 1, from start to end, never stopping."""


@dataclass(frozen=True, slots=True)
class Timed:
    """An engine's rollouts and the seconds they took, in all."""

    seconds: float
    rollouts: list[Rollout]


class Switch:
    """A chooser that hands on to another, so that one engine runs one strategy after another. now: whom it asks."""

    def __init__(self, *choosers: Chooser) -> None:
        self.now = choosers[0]
        self.max_num_verify = max(chooser.max_num_verify for chooser in choosers)

    def choose(self, *, batch: int, context: float) -> Strategy:
        """As the present chooser does."""
        return self.now.choose(batch=batch, context=context)

    def observe(self, report: CycleReport) -> None:
        """Tell the present chooser."""
        self.now.observe(report)

    def policy_changed(self) -> None:
        """Tell the present chooser."""
        self.now.policy_changed()

    def drafter_changed(self, source: str) -> None:
        """Tell the present chooser."""
        self.now.drafter_changed(source)

    def summary(self) -> dict[str, Any]:
        """What the present chooser knows."""
        return self.now.summary()


class Ours:
    """The native engine as a contender, without drafts."""

    name = "paceline"

    def __init__(self, model: PreTrainedModel, *, max_running: int, tokens_each: int) -> None:
        self.model = model
        self.engine = make_engine(model, max_running=max_running, tokens_each=tokens_each, chooser=FixedChooser(OFF))

    def seconds(self, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
        """As Contender says."""
        vocab_size = self.model.config.get_text_config().vocab_size
        prompts = random_prompts(batch, prompt_len, vocab_size, seed=seed)
        timed = generate(self.engine, prompts, sampling(new_tokens, seed=seed))
        assert all(len(rollout.token_ids) == new_tokens for rollout in timed.rollouts)
        return timed.seconds


def make_engine(
    model: PreTrainedModel,
    *,
    max_running: int,
    tokens_each: int,
    chooser: Chooser,
    drafter: ResidentDrafter | None = None,
    graph_mb: int = RolloutConfig().graph_mb,
) -> NativeEngine:
    """An engine whose cache holds max_running sequences of tokens_each; with a drafter, resident on a CPU too.

    Sequences may be PROBE_TOKENS long in any case: whatever is timed must first be verified.
    Raises ConfigError where a sequence is longer than the model's context.
    """
    context = context_length(model.config)
    if tokens_each > context:
        raise ConfigError(
            f"prompts and answers of {tokens_each} tokens exceed the model's context of {context}; "
            "ask for shorter prompts or fewer new tokens"
        )
    config = RolloutConfig(
        max_running=max_running,
        prefill_tokens=PREFILL_TOKENS,
        block_size=BLOCK_SIZE,
        graph_mb=graph_mb,
        kv_tokens=max_running
        * _whole_blocks(max(tokens_each, PROBE_TOKENS) + 2 * (1 + chooser.max_num_verify) + BLOCK_SIZE),
    )
    cycles: Literal["auto", "resident"] = "auto" if drafter is None else "resident"
    return NativeEngine(model, drafter=drafter, chooser=chooser, rollout=config, cycles=cycles)


def ngram_drafter() -> ResidentDrafter:
    """A drafter that quotes siblings, earlier rollouts and the text itself, and knows none yet."""
    return NgramDrafter(min_match=SpecConfig().min_match)


def sampling(new_tokens: int, *, seed: int, stop_token_ids: tuple[int, ...] = (), num_samples: int = 1) -> Sampling:
    """Temperature 1 and no filters: what reinforcement learning samples with."""
    return Sampling(
        num_samples=num_samples, max_new_tokens=new_tokens, stop_token_ids=stop_token_ids, seed=seed, step=0
    )


def random_prompts(number: int, length: int, vocab_size: int, *, seed: int) -> list[Prompt]:
    """Prompts of random tokens, new ones each time it is called with another seed, so that no cache knows them."""
    choices = random.Random(seed)
    return [
        Prompt(id=f"bench-{next(_numbers)}", token_ids=choices.choices(range(vocab_size), k=length), answer="")
        for _ in range(number)
    ]


def subject_prompts(subject: Subject, number: int, *, seed: int) -> list[Prompt]:
    """Questions in the model's own chat template, or random tokens where it has random weights."""
    if subject.folder is None:
        return random_prompts(number, 64, subject.model.config.get_text_config().vocab_size, seed=seed)
    tokenizer = load_tokenizer(subject.folder)
    choices = random.Random(seed)
    prompts = []
    for index in range(number):
        question = choices.choice(QUESTIONS).format(choices.randrange(2, 100), choices.randrange(2, 100))
        messages = [{"role": "user", "content": question}]
        token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompts.append(Prompt(id=f"bench-{seed}-{index}", token_ids=list(token_ids), answer=""))
    return prompts


def generate(engine: NativeEngine, prompts: Sequence[Prompt], sampling: Sampling) -> Timed:
    """Run an engine to the end of all rollouts, between two synchronisations with the device."""

    async def run() -> Timed:
        synchronize()
        begun = perf_counter()
        rollouts = [rollout async for rollout in engine.generate(prompts, sampling)]
        synchronize()
        return Timed(perf_counter() - begun, rollouts)

    return asyncio.run(run())


def capture(
    engine: NativeEngine,
    model: PreTrainedModel,
    batches: Sequence[int],
    *,
    seed: int,
    stop_token_ids: tuple[int, ...] = (),
) -> float:
    """Let an engine run two cycles, and so capture its graphs and replay them, at every batch size; seconds that took.

    Graphs know nothing of what rows hold: prompts of one token need no prefill and are all there in the first cycle,
    and two sampled tokens end them: the first replay takes longer than others. They do know which tokens stop.
    """
    vocab_size = model.config.get_text_config().vocab_size
    how = sampling(2, seed=seed, stop_token_ids=stop_token_ids)
    # the largest first: it sizes the memory that all graphs share
    return sum(
        generate(engine, random_prompts(batch, 1, vocab_size, seed=seed + batch), how).seconds
        for batch in reversed(batches)
    )


def step_ms(contender: Contender, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
    """Milliseconds of one decode step: SHORT + new_tokens tokens take that many steps more than SHORT tokens do."""
    shape = {"batch": batch, "prompt_len": prompt_len}
    # other prompts for the second run: the first one's are cached
    short = contender.seconds(**shape, new_tokens=SHORT, seed=2 * seed)
    long = contender.seconds(**shape, new_tokens=SHORT + new_tokens, seed=2 * seed + 1)
    return (long - short) / new_tokens * 1e3


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE

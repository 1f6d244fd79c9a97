"""Training a drafter away from its run, and measuring one."""

import copy
import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from configs.errors import ConfigError, DataError, DivergedError
from configs.schema import Config
from drafter.eagle import EagleConfig, EagleHead
from drafter.evaluate import Cycles, walk
from drafter.layouts import Layout
from drafter.trainer import DrafterStats, DrafterTrainer, choose_vocabulary, evaluate, require_unroll
from launch.drafting import starting_head, starting_shape
from launch.natural_text import tokens_of, whole_pieces
from launch.subject import Subject, Unloaded, policy_answers, sampled_texts, solved_texts
from launch.windows import Context, features, training_batches
from rl.export import newest_intact
from rl.export_drafter import export_trained, served_head
from rl.features import Text, batches
from rl.warmstart import FIRST_STEP
from rollout.model import context_length
from rollout.types import Prompt

HELDOUT = 8  # one prompt in so many is kept from training, to say how well the drafter does on others
MEASURED = 8  # batches of texts held out that this is said of, at most
PIECE_PROMPT = 16  # tokens of a text's pieces that stand for a prompt, which tells them apart
CONTEXTS: tuple[Context, ...] = ("rollout", "server")  # a drafter for both reads as both have it read

Report = Callable[[int, DrafterStats], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """A drafter and what it started as, and the accept lengths of both on answers to prompts that neither has seen:
    of the chains it was trained to draw."""

    start: EagleHead
    head: EagleHead
    before: float
    after: float


def train_drafter(
    subject: Subject, texts: Sequence[Text], *, steps: int, report: Report, contexts: Sequence[Context] = CONTEXTS
) -> Trained:
    """Train a drafter for the policy on these texts, from drafter.init or from random weights, so many updates.

    report gets every update, counted from 1. Raises ConfigError for texts of fewer than two prompts, DivergedError.
    """
    config = subject.config.drafter
    learned, heldout = split(texts)
    head = start_head(subject, learned).to(subject.device)
    start = copy.deepcopy(head)
    trainer = DrafterTrainer(head, **output_weights(subject), config=config)
    endless = training_batches(subject, learned, head.config, contexts=contexts)
    for step, batch in zip(range(steps), endless, strict=False):
        report(step + 1, trainer.step(batch))
    before, after = accept_lengths(subject, [start, head], heldout)
    if not isfinite(after):
        raise DivergedError(f"the drafter puts out no numbers after {steps} updates; lower drafter.lr={config.lr:g}")
    return Trained(start, head, before, after)


def write_trained(out: Path, trained: Trained, subject: Subject, *, layout: Layout = "eagle3") -> str | None:
    """Write a drafter trained for this policy, as export_trained does; vLLM's version where it was tried there."""
    return export_trained(
        out,
        trained.head,
        policy=subject.policy,
        model=subject.config.model,
        run=subject.run,
        step=subject.step,
        num_draft_tokens=subject.config.drafter.unroll,
        accept_length=trained.after,
        layout=layout,
    )


def split(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """What is learned from and what is held out: one prompt in HELDOUT, one at least, with all answers to it.

    By the hash of a prompt's tokens, whatever the order of the texts. Raises ConfigError for fewer than two prompts.
    """
    prompts = sorted({prompt_hash(text) for text in texts})
    if len(prompts) < 2:
        raise ConfigError(
            f"{len(texts)} texts of {len(prompts)} prompts are too few: one prompt is kept to measure by; raise --texts"
        )
    last = prompts[(len(prompts) - 1) // HELDOUT]
    learned = [text for text in texts if prompt_hash(text) > last]
    return learned, [text for text in texts if prompt_hash(text) <= last]


def prompt_hash(text: Text) -> bytes:
    """Equal for texts of equal prompts alone, and in every process."""
    return hashlib.sha256(array("q", text.token_ids[: text.num_prompt])).digest()


def accept_lengths(subject: Subject, heads: Sequence[EagleHead], texts: Sequence[Text]) -> list[float]:
    """Each head's mean over the positions of these responses, MEASURED batches of them at most."""
    config, weights = subject.config.drafter, output_weights(subject)
    totals, num_tokens = [0.0] * len(heads), 0
    for group in islice(batches(texts, config.batch_tokens), MEASURED):
        batch = features(subject, group, heads[0].config, subject.config.rollout.temperature, "rollout")
        for index, head in enumerate(heads):
            stats = evaluate(head, batch, **weights, config=config)
            totals[index] += stats.accept_length * stats.num_tokens
        num_tokens += len(batch.next_ids)
    return [total / num_tokens for total in totals]


def texts_for(subject: Subject, count: int, *, answers: Literal["policy", "solutions"]) -> list[Text]:
    """What to learn from: worked solutions, or the policy's own: of a run its samples, of a recipe new answers."""
    if answers == "solutions":
        return solved_texts(subject, count)
    if subject.run is not None:
        return sampled_texts(subject, count)
    data = subject.data(num_heldout=0)
    prompts = data.prompts(FIRST_STEP, min(count, len(data)))
    return policy_answers(subject, prompts, temperature=subject.config.rollout.temperature)[0]


def texts_of(text: str, subject: Subject, count: int, *, length: int) -> list[Text]:
    """What to learn from of a text: its first pieces of so many tokens, each begun by its first PIECE_PROMPT.

    length: as require_length allows. Raises DataError where there are fewer than two.
    """
    tokens = tokens_of(subject.tokenizer, text)
    pieces = whole_pieces(tokens, length)[:count]
    if len(pieces) < 2:
        raise DataError(
            f"--text has {len(tokens)} tokens, not two pieces of {length}; give a longer one, or a shorter --length"
        )
    return [Text(piece, num_prompt=PIECE_PROMPT) for piece in pieces]


def require_length(length: int, model_config: PretrainedConfig) -> None:
    """Raise ConfigError for more tokens than the policy has positions for."""
    if length > (limit := context_length(model_config)):
        raise ConfigError(f"--length {length} exceeds the {limit} positions of the policy; lower it")


def problems(subject: Subject, count: int) -> list[Prompt]:
    """Held-out problems, so many or all there are. Raises DataError where a table holds none out."""
    prompts = subject.data(num_heldout=count).heldout(count)
    if not prompts:
        raise DataError("no held-out problems to measure on; give more data")
    return prompts


def start_head(subject: Subject, texts: Sequence[Text]) -> EagleHead:
    """The drafter in drafter.init, or a new one that can propose the commonest tokens of these responses."""
    head = starting_head(subject.config, subject.policy.config)
    if not subject.config.drafter.init:
        tokens = [token for text in texts for token in text.token_ids[text.num_prompt :]]
        counts = torch.bincount(torch.tensor(tokens), minlength=head.config.vocab_size)
        lm_head = subject.policy.get_output_embeddings().weight.cpu()
        head.set_vocabulary(*choose_vocabulary(counts, head.config.draft_vocab), lm_head)
    return head


def drafter_shape(config: Config, model_config: PretrainedConfig) -> EagleConfig:
    """The shape of the drafter that training starts from. Of drafter.init no weight is read.

    Raises ConfigError, PreflightError, where it cannot be trained for this policy.
    """
    shape = starting_shape(config, model_config)
    require_unroll(config.drafter, window=shape.window)
    return shape


def drafter_for(subject: Subject | Unloaded, folder: Path | None) -> EagleHead:
    """The drafter in a folder, else the one its run served, else that in drafter.init. Raises PacelineError."""
    config = subject.config
    if folder is None and subject.run is not None:
        return served_head(newest_intact(subject.run))
    if folder is not None:
        config = replace(config, drafter=replace(config.drafter, init=str(folder)))
    if not config.drafter.init:
        raise ConfigError("say which drafter to measure: --drafter FOLDER, or a run directory instead of a recipe")
    return starting_head(config, subject.model_config)


def measure(
    subject: Subject,
    head: EagleHead,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    depth: int,
    context: Context,
) -> Cycles:
    """The cycles of drafts of this depth over the policy's answers to the prompts, sampled now."""
    answers = policy_answers(subject, prompts, temperature=temperature)
    return replay(subject, head, *answers, temperature=temperature, depth=depth, context=context)


def replay(
    subject: Subject,
    head: EagleHead,
    texts: Sequence[Text],
    keys: torch.Tensor,
    *,
    temperature: float,
    depth: int,
    context: Context,
) -> Cycles:
    """The cycles of drafts of this depth over texts the policy sampled, the drafter in the policy's dtype.

    keys [N] int64: the noise of each text. context "server": the drafter has read the prompt, as vLLM and SGLang have
    it; "rollout": it starts at the response.
    """
    served = copy.deepcopy(head).to(subject.device, subject.policy.dtype)
    embedding = output_weights(subject)["embedding"]
    cycles, done = Cycles(depth, [], []), 0
    for group in batches(texts, subject.config.drafter.batch_tokens):
        batch = features(subject, group, head.config, temperature, context)
        cycles += walk(
            served,
            batch,
            first=[text.num_prompt - 1 if context == "server" else 0 for text in group],
            embedding=embedding,
            depth=depth,
            keys=keys[done : done + len(group)] if temperature else None,
        )
        done += len(group)
    return cycles


def output_weights(subject: Subject) -> dict[str, torch.Tensor]:
    """The policy's embedding and lm_head, [V, H] each."""
    policy = subject.policy
    return {"embedding": policy.get_input_embeddings().weight, "lm_head": policy.get_output_embeddings().weight}

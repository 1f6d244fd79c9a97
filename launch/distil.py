"""Training gates away from a run: sequences, what the policy's attention makes of them, and how well gates then select.

The policy runs each sequence once an epoch; every layer's gate learns inside the forward, as soon as the layer has
attended, so that no layer's queries, keys and weights outlive it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from configs.errors import DataError
from drafter.gate import Gates
from drafter.gate_checkpoint import write_gates
from drafter.gate_quality import Quality, selection_quality
from drafter.gate_training import GateStats, GateTrainer, LayerSample
from kernels.attention import PackedSequences, packed_attention
from kernels.pooled_attention import block_weights, pooled_attention
from launch.bench_report import provenance
from launch.natural_text import tokens_of, whole_pieces
from launch.offline import split, texts_for
from launch.subject import Subject
from rl.export import staged
from rollout.model import forward_packed
from rollout.pretrained import hub_name

HELDOUT = 8  # one sequence in so many of a text is kept from training
MEASURED_TOKENS = 64  # of a held-out sequence, evenly from its later half: each costs a row of dense attention

Report = Callable[[int, GateStats], None]
Observe = Callable[[LayerSample, float], None]  # and the attention's scale


@dataclass(frozen=True, slots=True)
class Sequences:
    """What is learned from and what is held out, each so many tokens long."""

    learned: list[list[int]]
    heldout: list[list[int]]


def of_answers(subject: Subject, count: int, *, answers: Literal["policy", "solutions"], length: int) -> Sequences:
    """Prompts with answers, one after the other, cut to sequences; those of held-out prompts apart.

    Raises DataError, ConfigError.
    """
    texts = texts_for(subject, count, answers=answers)
    parts = ([token for text in part for token in text.token_ids] for part in split(texts))
    learned, heldout = (whole_pieces(tokens, length) for tokens in parts)
    return _require(Sequences(learned, heldout), length, "raise --texts")


def of_text(text: str, subject: Subject, length: int) -> Sequences:
    """A text, cut to sequences; the last of them held out. Raises DataError."""
    pieces = whole_pieces(tokens_of(subject.tokenizer, text), length)
    kept = max(1, len(pieces) // HELDOUT)
    return _require(Sequences(pieces[:-kept], pieces[-kept:]), length, "give a longer --text")


def train_gates(
    subject: Subject, gates: Gates, sequences: Sequences, *, steps: int, batch: int, lr: float, report: Report
) -> None:
    """Train gates on the policy's device, so many updates of so many sequences. report gets each, counted from 1."""
    trainer = GateTrainer(gates, lr=lr, num_steps=steps)
    order = _endless(sequences.learned, seed=subject.config.run.seed)
    for step in range(1, steps + 1):
        for _ in range(batch):
            harvest(
                subject.policy,
                next(order),
                lambda sample, scale: trainer.learn(sample),
                select_block=gates.config.select_block,
            )
        report(step, trainer.update())


def measure_gates(subject: Subject, gates: Gates, sequences: Sequences, *, budget_blocks: int) -> Quality:
    """How well gates select on held-out sequences, beside Quest's bound. Raises DataError where nothing is long enough.

    Of the tokens of each sequence's later half, some.
    """
    parts: list[Quality] = []

    def measure(sample: LayerSample, scale: float) -> None:
        some = torch.linspace(0, len(sample.positions) - 1, MEASURED_TOKENS, device=sample.positions.device).long()
        part = selection_quality(
            gates, sample.layer, sample.query[some], sample.positions[some], sample.keys,
            scale=scale, budget_blocks=budget_blocks,
        )  # fmt: skip
        if part is not None:
            parts.append(part)

    for token_ids in sequences.heldout:
        harvest(subject.policy, token_ids, measure, select_block=gates.config.select_block)
    if not parts:
        raise DataError(f"no sequence has more than {budget_blocks} blocks to choose from; raise --length")
    return Quality.mean(parts)


def document(
    subject: Subject,
    sequences: Sequences,
    options: Mapping[str, float],
    losses: Sequence[float],
    *,
    before: Quality,
    after: Quality,
) -> dict[str, Any]:
    """The figures of a training as JSON, with what they were measured on."""
    return {
        "policy": subject.config.model,
        "run": str(subject.run) if subject.run else None,
        "step": subject.step,
        "sequences": {"learned": len(sequences.learned), "heldout": len(sequences.heldout)},
        **options,
        "losses": list(losses),
        "untrained": asdict(before),
        "trained": asdict(after),
        "environment": provenance(device=str(subject.device), seed=subject.config.run.seed),
    }


def save_gates(out: Path, gates: Gates, subject: Subject) -> None:
    """Write gates in the policy's dtype. Raises PreflightError where OUT is taken, StorageError."""
    policy = subject.policy
    with staged(out) as staging:
        write_gates(
            staging, gates, model_config=policy.config, base_model=hub_name(subject.config.model), dtype=policy.dtype
        )


@torch.no_grad()
def harvest(policy: PreTrainedModel, token_ids: Sequence[int], observe: Observe, *, select_block: int) -> None:
    """Run the policy over one sequence, and observe every layer that attends to all of it: tokens of the later half.

    policy: one that GateConfig.of takes. Gradients may be taken inside observe.
    """
    tokens = torch.tensor(token_ids, device=policy.device)
    positions = torch.arange(len(tokens), device=policy.device)
    later = slice(len(tokens) // 2, None)
    seqs = PackedSequences(torch.tensor([0, len(tokens)], dtype=torch.int32, device=policy.device), len(tokens))
    num_layers = 0

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        nonlocal num_layers
        layer, num_layers = num_layers, num_layers + 1
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        assert softcap is None, "GateConfig.of refuses a policy that caps its scores"
        if sliding_window is not None:  # it reads a window, whatever a gate says
            return packed_attention(query, key, value, seqs, scale=scale, sliding_window=sliding_window, softcap=None)[
                None
            ]
        output, scores, lse = pooled_attention(query, key, value, seqs, scale=scale, select_block=select_block)
        weights = block_weights(scores[later], lse[later], num_kv_heads=key.shape[1])
        with torch.enable_grad():
            observe(LayerSample(layer, query[later], positions[later], key, weights), scale)
        return output[None]

    # of logits, one row: the last hidden state is computed for nothing else
    forward_packed(policy, tokens, positions, attend, positions[-1:])


def _require(sequences: Sequences, length: int, remedy: str) -> Sequences:
    if not sequences.learned or not sequences.heldout:
        counts = f"{len(sequences.learned)} and {len(sequences.heldout)}"
        raise DataError(
            f"there are {counts} sequences of {length} tokens to learn from and to measure by, and both need one; "
            f"{remedy} or lower --length"
        )
    return sequences


def _endless(sequences: Sequence[list[int]], *, seed: int) -> Iterator[list[int]]:
    """The sequences without end, in a new order every epoch."""
    random = Random(seed)
    while True:
        yield from random.sample(sequences, len(sequences))

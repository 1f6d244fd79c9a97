"""The drafter's losses beside one another: the same features, in the same order, from the same weights, by seeds.

Features are of the policy's own answers. Two accept lengths are told of answers to problems held out: expected, the
mean over positions by sum min(p, q), and replayed, drafts walked over the answers with the noise they were sampled
with, as an engine accepts them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, get_args

import torch
from rich.table import Table

from configs.errors import ConfigError
from configs.load import dump
from drafter.eagle import EagleHead
from drafter.features import FeatureBatch
from drafter.losses import Loss
from drafter.trainer import DrafterTrainer, evaluate
from launch.bench_report import WrongResultError, plain_table, provenance, say, spread
from launch.drafting import starting_shape
from launch.offline import output_weights, problems, replay, start_head
from launch.subject import Subject, load_subject, policy_answers
from launch.windows import HARVEST, cut, features
from rl.features import Text, batches
from rl.warmstart import FIRST_STEP

BASELINE: Loss = "kl"
MARKS = (0.25, 0.5, 1.0)  # of the updates, after which the heads are measured


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: so many updates by each loss and seed, on answers to `texts` prompts.

    heldout: problems that are measured by. depth: tokens of a replayed draft.
    """

    losses: tuple[Loss, ...]
    seeds: int
    steps: int
    texts: int
    heldout: int
    depth: int


@dataclass(frozen=True, slots=True)
class Material:
    """What all heads learn from, and what they are measured by: answers, the noise of each, and their features."""

    learned: list[Text]
    pool: list[FeatureBatch]
    heldout: list[Text]
    keys: torch.Tensor
    judged: list[FeatureBatch]


def chosen(text: str) -> tuple[Loss, ...]:
    """The losses of a comma-separated list. Raises ConfigError."""
    known: dict[str, Loss] = {name: name for name in get_args(Loss)}
    names = text.split(",")
    if not set(names) <= known.keys() or len(set(names)) < len(names):
        raise ConfigError(f"--losses {text!r}: name some of {', '.join(known)}, each once")
    return tuple(known[name] for name in names)


def run(source: Path, overrides: Sequence[str], job: Job) -> dict[str, Any]:
    """Train a head by every loss and seed and measure all of them; JSON-able.

    source: a recipe, whose model answers, or a run directory. Raises PacelineError; WrongResultError where heads that
    are compared did not start alike, or an update was not finite.
    """
    begun = perf_counter()
    subject = load_subject(source, overrides)
    found = {
        "what": "accept length of a drafter by its loss",
        "model": subject.config.model,
        **provenance(device=str(subject.device), seed=subject.config.run.seed),
        "config": dump(subject.config),
        **asdict(job),
    }
    material = prepare(subject, job)
    say(f"{len(material.pool)} batches, {perf_counter() - begun:.0f} s")
    runs = []
    for seed in range(job.seeds):
        of_seed = [_train(subject, material, job, loss, seed) for loss in job.losses]
        if len({each["expected"]["0"] for each in of_seed}) > 1:
            raise WrongResultError(f"heads of seed {seed} start at other accept lengths: no two can be compared")
        runs += of_seed
    return found | {
        "answers": {"learned": len(material.learned), "heldout": len(material.heldout)},
        "batches": {
            "count": len(material.pool),
            "positions": statistics.fmean(len(batch.next_ids) for batch in material.pool),
        },
        "runs": runs,
        "losses": compare(runs),
        "seconds": perf_counter() - begun,
    }


def prepare(subject: Subject, job: Job) -> Material:
    """Sample the policy's answers, and compute their features once for all heads."""
    config = subject.config
    options, temperature = config.drafter, config.rollout.temperature
    shape = starting_shape(config, subject.policy.config)
    judged_by = problems(subject, job.heldout)
    data = subject.data(num_heldout=job.heldout)
    prompts = data.prompts(FIRST_STEP, min(job.texts, len(data)))
    learned, _ = policy_answers(subject, prompts, temperature=temperature)
    heldout, keys = policy_answers(subject, judged_by, temperature=temperature)
    pool: list[FeatureBatch] = []
    for group in batches(learned, HARVEST[subject.device.type] * options.batch_tokens):
        pool += cut(
            features(subject, group, shape, temperature, "rollout"),
            window=options.feature_window,
            num_windows=max(1, options.batch_tokens // options.feature_window),
            seed=len(pool),
        )
    judged = [
        features(subject, group, shape, temperature, "rollout") for group in batches(heldout, options.batch_tokens)
    ]
    return Material(learned, pool, heldout, keys, judged)


def order(seed: int, *, num_batches: int, steps: int) -> list[int]:
    """Which batch each update learns from: every epoch in a new order, whatever the loss."""
    random, found = Random(seed), list[int]()
    while len(found) < steps:
        found += random.sample(range(num_batches), num_batches)
    return found[:steps]


def _train(subject: Subject, material: Material, job: Job, loss: Loss, seed: int) -> dict[str, Any]:
    """One head, from random weights (or drafter.init) to its figures."""
    begun = perf_counter()
    seeded = replace(subject.config, run=replace(subject.config.run, seed=seed))
    head = start_head(replace(subject, config=seeded), material.learned).to(subject.device)
    weights, options = output_weights(subject), replace(subject.config.drafter, loss=loss)
    trainer = DrafterTrainer(head, **weights, config=options)
    marks = {round(share * job.steps) for share in MARKS} - {0}
    expected = {"0": _expected(subject, head, material.judged)}  # by updates; text, as in JSON
    updates = []
    for number, index in enumerate(order(seed, num_batches=len(material.pool), steps=job.steps), 1):
        updates.append(trainer.step(material.pool[index]))
        if not updates[-1].applied:
            raise WrongResultError(f"update {number} by {loss}, seed {seed}, was not finite: its head is no contender")
        if number in marks:
            expected[str(number)] = _expected(subject, head, material.judged)
    cycles = replay(
        subject,
        head,
        material.heldout,
        material.keys,
        temperature=subject.config.rollout.temperature,
        depth=job.depth,
        context="rollout",
    )
    say(f"seed {seed}, {loss}: expected {expected[str(job.steps)]:.3f}, replayed {cycles.accept_length:.3f}")
    return {
        "seed": seed,
        "loss": loss,
        "expected": expected,
        "replayed": cycles.accept_length,
        "drafts": len(cycles.accepted),
        "by_depth": cycles.table()["by_depth"],
        "last_loss": updates[-1].loss,
        "update_ms": statistics.median(1e3 * each.seconds for each in updates),
        "seconds": perf_counter() - begun,
    }


def _expected(subject: Subject, head: EagleHead, judged: Sequence[FeatureBatch]) -> float:
    """The mean over all positions held out."""
    config, weights = subject.config.drafter, output_weights(subject)
    stats = [evaluate(head, batch, **weights, config=config) for batch in judged]
    return sum(each.accept_length * each.num_tokens for each in stats) / sum(each.num_tokens for each in stats)


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every loss's accept lengths over the seeds, and by seed how far they are over those of kl where that was run."""
    found: dict[str, Any] = {}
    for run in runs:
        at = found.setdefault(run["loss"], {"expected": [], "replayed": []})
        at["expected"].append(list(run["expected"].values())[-1])
        at["replayed"].append(run["replayed"])
    figures: dict[str, Any] = {
        loss: {name: spread(values) | {"mean": statistics.fmean(values)} for name, values in at.items()}
        for loss, at in found.items()
    }
    if BASELINE in found:
        for loss in figures.keys() - {BASELINE}:
            figures[loss][f"over_{BASELINE}"] = {
                name: [mine - theirs for mine, theirs in zip(found[loss][name], found[BASELINE][name], strict=True)]
                for name in ("expected", "replayed")
            }
    return figures


def table(result: Mapping[str, Any]) -> Table:
    """A row a loss: mean, least and greatest of both accept lengths, and the replayed one over kl's by seed."""
    shown = plain_table(
        f"{result['what']}, {result['model']}: {result['steps']} updates, seeds 0 to {result['seeds'] - 1}, "
        f"{result['answers']['heldout']} answers held out; asked: lk over {BASELINE}",
        ["loss", "expected", "min", "max", "replayed", "min", "max", f"over {BASELINE}, by seed"],
    )
    for loss, figures in result["losses"].items():
        row = [f"{figures[name][key]:.3f}" for name in ("expected", "replayed") for key in ("mean", "min", "max")]
        over = figures.get(f"over_{BASELINE}", {}).get("replayed", [])
        shown.add_row(loss, *row, " ".join(f"{value:+.3f}" for value in over))
    return shown

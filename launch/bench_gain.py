"""Whether speculation ever loses: rollouts of a model with the strategy chosen as they run, over none at all."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from configs.schema import SpecConfig
from drafter.types import OFF
from launch.agreement import verify
from launch.bench_cycle import Hopeless
from launch.bench_report import in_turns, plain_table, provenance, say, shape, spread
from launch.bench_rollout import SPECULATIVE, generate, make_engine, ngram_drafter, sampling, subject_prompts
from launch.geometry import Subject
from rollout.engine import NativeEngine
from rollout.strategy import Chooser, FixedChooser, make_chooser

LIMIT = 0.98  # tokens a second of the chosen strategy over those without drafts, at least (issue 3)
GROUP = 8  # samples of a prompt, which quote one another


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: whole rollouts of at most new_tokens tokens, batch of them at once."""

    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    seed: int


def run(subject: Subject, job: Job) -> dict[str, Any]:
    """Verify each engine, then time all of them on the same prompts with the same noise; JSON-able.

    Every round has prompts of its own: drafts from the same rollouts seen once before would be a gift.
    """
    model = subject.model
    found = provenance(device=str(model.device), seed=job.seed)
    longest = max(len(prompt.token_ids) for prompt in subject_prompts(subject, 64, seed=job.seed)) + 16
    choosers: dict[str, Chooser] = {
        "off": FixedChooser(OFF),
        "chosen": _goodput(str(model.device), job.seed),
        "never matching": _goodput(str(model.device), job.seed),
    }
    drafters = {"off": None, "chosen": ngram_drafter(), "never matching": Hopeless(ngram_drafter())}
    engines = {
        name: make_engine(
            model,
            max_running=max(*job.batches, 6),
            tokens_each=longest + job.new_tokens,
            chooser=chooser,
            drafter=drafters[name],
        )
        for name, chooser in choosers.items()
    }
    verified = {name: verify(engine, model, seed=job.seed) for name, engine in engines.items()}
    cells = [_cell(engines, subject, batch, job) for batch in job.batches]
    return {
        "what": "tokens per second of whole rollouts",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "strategy": asdict(SPECULATIVE),
        "verified": verified,
        "cells": cells,
        "choosers": {name: chooser.summary() for name, chooser in choosers.items()},
    }


def _goodput(device: str, seed: int) -> Chooser:
    """The chooser users get on a GPU, with SPECULATIVE as the widest of its arms."""
    spec = SpecConfig(
        source="suffix",
        choice="goodput",
        depth=SPECULATIVE.depth,
        top_k=SPECULATIVE.top_k,
        num_verify=SPECULATIVE.num_verify,
    )
    return make_chooser(spec, device=device, seed=seed)


def _cell(engines: dict[str, NativeEngine], subject: Subject, batch: int, job: Job) -> dict[str, Any]:
    """One batch size; in the first round the choosers learn what cycles cost."""
    samples = min(batch, GROUP)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    lengths: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    stop = subject.stop_token_ids()
    seeds = [job.seed + 1000 * batch + number for number in range(job.rounds + 1)]
    # made once a round: random prompts have new names, and so other noise, each time they are made
    prompts = [subject_prompts(subject, -(-batch // samples), seed=seed) for seed in seeds]
    for number, name in in_turns(names, job.rounds):
        how = sampling(job.new_tokens, seed=seeds[number], num_samples=samples, stop_token_ids=stop)
        timed = generate(engines[name], prompts[number], how)
        tokens = sum(len(rollout.token_ids) for rollout in timed.rollouts)
        rates[name].append(tokens / timed.seconds)
        lengths[name].append(tokens / sum(rollout.spec.forwards for rollout in timed.rollouts))
    cell: dict[str, Any] = {"batch": batch}
    for name in names:
        cell[name] = {"tokens_per_s": spread(rates[name][1:]), "accept_length": spread(lengths[name][1:])}
        # round by round, on the same prompts: their lengths differ more than the engines do
        cell[name]["gain"] = spread([a / b for a, b in zip(rates[name][1:], rates["off"][1:], strict=True)])
    gains = ", ".join(f"{name} {cell[name]['gain']['median']:.3f}" for name in names[1:])
    say(f"batch {batch}: {gains}")
    return cell


def table(result: dict[str, Any]) -> Table:
    """Tokens a second and what drafts make of them, by batch size."""
    headings = ["batch", "off tok/s", "chosen", "accept", "gain", "min", "max", "never matching", "gain", "min", "max"]
    shown = plain_table(f"{result['what']}, {result['model']}, {result['shape']['dtype']}; asked {LIMIT}", headings)
    for cell in result["cells"]:
        row = [str(cell["batch"]), f"{cell['off']['tokens_per_s']['median']:.0f}"]
        for name in ("chosen", "never matching"):
            row.append(f"{cell[name]['tokens_per_s']['median']:.0f}")
            if name == "chosen":
                row.append(f"{cell[name]['accept_length']['median']:.2f}")
            row += [f"{cell[name]['gain'][which]:.3f}" for which in ("median", "min", "max")]
        shown.add_row(*row)
    return shown

"""Whether speculation ever loses: rollouts of a model with the strategy chosen as they run, over none at all."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from configs.schema import SpecConfig
from drafter.types import OFF
from launch.agreement import verify
from launch.bench_cycle import Hopeless
from launch.bench_report import in_turns, plain_table, provenance, say, shape, spread
from launch.bench_rollout import (
    SPECULATIVE,
    Switch,
    capture,
    generate,
    make_engine,
    ngram_drafter,
    sampling,
    subject_prompts,
)
from launch.geometry import Subject
from rollout.engine import NativeEngine
from rollout.graphs import BUCKETS
from rollout.strategy import Chooser, FixedChooser, arms, make_chooser
from rollout.types import Prompt

LIMIT = 0.98  # tokens a second of the chosen strategy over those without drafts, at least (issue 3)
GROUP = 8  # samples of a prompt, which quote one another
SEQUENCES = 8  # a round at least: with one alone, where it happens to stop would decide


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
    choosers: dict[str, Switch] = {
        "off": Switch(FixedChooser(OFF)),
        "chosen": Switch(_goodput(str(model.device), job.seed), FixedChooser(SPECULATIVE)),
        "never matching": Switch(_goodput(str(model.device), job.seed), FixedChooser(SPECULATIVE)),
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
    captured = {name: _capture(engine, choosers[name], subject, job) for name, engine in engines.items()}
    cells = [_cell(engines, subject, batch, job) for batch in job.batches]
    return {
        "what": "tokens per second of whole rollouts",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "strategy": asdict(SPECULATIVE),
        "verified": verified,
        "capture_s": captured,
        "cells": cells,
        "choosers": {name: chooser.summary() for name, chooser in choosers.items()},
    }


def _spec() -> SpecConfig:
    """What users get on a GPU, with SPECULATIVE as the widest of its arms."""
    return SpecConfig(
        source="suffix",
        choice="goodput",
        depth=SPECULATIVE.depth,
        top_k=SPECULATIVE.top_k,
        num_verify=SPECULATIVE.num_verify,
    )


def _goodput(device: str, seed: int) -> Chooser:
    return make_chooser(_spec(), device=device, seed=seed)


def _capture(engine: NativeEngine, chooser: Switch, subject: Subject, job: Job) -> float:
    """Run every strategy once at every batch size that rollouts pass through, as a run has after a few steps; seconds.

    Graphs last as long as the run: rollouts of a second must not pay for them.
    """
    stop = subject.stop_token_ids()
    usual = chooser.now
    # real ones first: graphs hold for sequences no longer than these
    long = subject_prompts(subject, 4, seed=job.seed - 1)
    seconds = generate(engine, long, sampling(job.new_tokens, seed=job.seed, stop_token_ids=stop)).seconds
    strategies = arms(_spec()) if chooser.max_num_verify else (OFF,)
    batches = [size for size in BUCKETS if size <= max(job.batches)]
    for strategy in strategies:
        chooser.now = FixedChooser(strategy)
        seconds += capture(engine, subject.model, batches, seed=job.seed, stop_token_ids=stop)
    chooser.now = usual
    say(f"graphs of {len(strategies)} strategies: {seconds:.1f} s")
    return seconds


def _compile_prefill(engine: NativeEngine, prompts: list[Prompt], calls: int, samples: int) -> None:
    """Compute these prompts once, so that whoever is timed first compiles no kernel for their numbers of tokens."""
    share = len(prompts) // calls
    for call in range(calls):
        generate(engine, prompts[call * share : (call + 1) * share], sampling(1, seed=0, num_samples=samples))
    engine.update(engine.version + 1)  # forget them


def _cell(engines: dict[str, NativeEngine], subject: Subject, batch: int, job: Job) -> dict[str, Any]:
    """One batch size; in the first round the choosers learn what cycles cost."""
    samples = min(batch, GROUP)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    lengths: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    stop = subject.stop_token_ids()
    seeds = [job.seed + 1000 * batch + number for number in range(job.rounds + 1)]
    calls = -(-SEQUENCES // batch)
    # made once a round: random prompts have new names, and so other noise, each time they are made
    prompts = [subject_prompts(subject, calls * -(-batch // samples), seed=seed) for seed in seeds]
    for one in prompts:
        _compile_prefill(engines["off"], one, calls, samples)
    for number, name in in_turns(names, job.rounds):
        how = sampling(job.new_tokens, seed=seeds[number], num_samples=samples, stop_token_ids=stop)
        share = len(prompts[number]) // calls
        timed = [
            generate(engines[name], prompts[number][call * share : (call + 1) * share], how) for call in range(calls)
        ]
        rollouts = [rollout for one in timed for rollout in one.rollouts]
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        rates[name].append(tokens / sum(call.seconds for call in timed))
        lengths[name].append(tokens / sum(rollout.spec.forwards for rollout in rollouts))
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

"""Whether speculation ever loses: rollouts of a model with the strategy chosen as they run, over none at all."""

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from configs.schema import SpecConfig
from drafter.types import OFF
from launch.agreement import verify
from launch.bench_cycle import Hopeless
from launch.bench_report import plain_table, provenance, say, shape, spread
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
from launch.bench_stalls import Watch, is_busy
from launch.geometry import Subject
from rollout.engine import NativeEngine
from rollout.graphs import BUCKETS
from rollout.strategy import Chooser, FixedChooser, arms, make_chooser
from rollout.types import Prompt, Sampling

LIMIT = 0.98  # tokens a second of the chosen strategy over those without drafts, at least (issue 3)
GROUP = 8  # samples of a prompt, which quote one another
SEQUENCES, CALLS = 8, 2  # a round at least: with one alone, where it happens to stop or to stall would decide
WARM_ROUNDS = 4  # at most, until one of them compiles and captures nothing any more
SEEDS = 1000  # of a batch size: prompts of warm rounds have the last of them


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
    with Watch({name: engine.graphs for name, engine in engines.items()}) as watch:
        cells = [_cell(engines, subject, batch, job, watch) for batch in job.batches]
    gc.unfreeze()
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


def calls_each(batch: int) -> int:
    """Calls of generate that a side's figure of one round is taken over."""
    return max(-(-SEQUENCES // batch), CALLS)


def in_alternation(sides: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Every side in each round, with the round's number: in order, then in reverse, and so on."""
    return [(number, side) for number in range(rounds) for side in (sides if number % 2 == 0 else sides[::-1])]


def _prompts(subject: Subject, batch: int, *, seed: int) -> list[list[Prompt]]:
    """Prompts of one round, by call."""
    each = -(-batch // min(batch, GROUP))
    made = subject_prompts(subject, calls_each(batch) * each, seed=seed)
    return [made[start : start + each] for start in range(0, len(made), each)]


def _compile_prefill(engine: NativeEngine, prompts: Sequence[list[Prompt]], samples: int) -> None:
    """Compute these prompts once, so that whoever is timed first compiles no kernel for their numbers of tokens."""
    for call in prompts:
        generate(engine, call, sampling(2, seed=0, num_samples=samples))
    engine.update(engine.version + 1)  # forget them


@dataclass(frozen=True, slots=True)
class Side:
    """What one engine did in one round. happened: as Watch.since."""

    tokens_per_s: float
    accept_length: float
    happened: Mapping[str, Any]


def _side(engine: NativeEngine, prompts: Sequence[list[Prompt]], how: Sampling, watch: Watch) -> Side:
    """Time one engine over all calls of a round."""
    gc.collect()  # before the clock starts, rather than at a moment of its own
    watch.since()
    timed = [generate(engine, call, how) for call in prompts]
    rollouts = [rollout for one in timed for rollout in one.rollouts]
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return Side(
        tokens_per_s=tokens / sum(call.seconds for call in timed),
        accept_length=tokens / sum(rollout.spec.forwards for rollout in rollouts),
        happened=watch.since(),
    )


def _cell(engines: Mapping[str, NativeEngine], subject: Subject, batch: int, job: Job, watch: Watch) -> dict[str, Any]:
    """One batch size: rounds that count for nothing until they are quiet, in which choosers learn, then those timed."""
    samples, stop = min(batch, GROUP), subject.stop_token_ids()
    first = job.seed + SEEDS * batch

    def round_of(number: int, order: Sequence[str]) -> dict[str, Side]:
        prompts = made.get(number) or _prompts(subject, batch, seed=first + number)
        how = sampling(job.new_tokens, seed=first + number, num_samples=samples, stop_token_ids=stop)
        return {name: _side(engines[name], prompts, how, watch) for name in order}

    # made once a round: random prompts have new names, and so other noise, each time they are made
    made = {number: _prompts(subject, batch, seed=first + number) for number in range(job.rounds)}
    for prompts in made.values():
        _compile_prefill(engines["off"], prompts, samples)
    names = list(engines)
    warm: list[dict[str, Any]] = []
    while len(warm) < WARM_ROUNDS and (not warm or any(map(is_busy, warm[-1].values()))):
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # all that lasts is walked no more
        order = names if len(warm) % 2 else names[::-1]
        warm.append({name: dict(side.happened) for name, side in round_of(SEEDS - 1 - len(warm), order).items()})
    rounds: list[dict[str, Side]] = [{} for _ in range(job.rounds)]
    for number, name in in_alternation(names, job.rounds):
        rounds[number] |= round_of(number, [name])
    cell: dict[str, Any] = {"batch": batch, "calls": calls_each(batch), "warm": warm}
    for name in names:
        cell[name] = {
            "tokens_per_s": quartiles([sides[name].tokens_per_s for sides in rounds]),
            "accept_length": quartiles([sides[name].accept_length for sides in rounds]),
            # round by round, on the same prompts: their lengths differ more than the engines do
            "gain": quartiles([sides[name].tokens_per_s / sides["off"].tokens_per_s for sides in rounds]),
            "happened": [dict(sides[name].happened) for sides in rounds],
        }
    busy = [f"{name} in round {n}" for n, sides in enumerate(rounds) for name in names if is_busy(sides[name].happened)]
    if busy:
        say(f"batch {batch}: kernels or graphs were made under the clock by {', '.join(busy)}")
    gains = ", ".join(f"{name} {cell[name]['gain']['median']:.3f}" for name in names[1:])
    say(f"batch {batch}, {len(warm)} rounds before: {gains}")
    return cell


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """As spread, with the first and the third quartile."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return spread(values) | {"q1": first, "q3": third}


def table(result: dict[str, Any]) -> Table:
    """Tokens a second and what drafts make of them, by batch size."""
    headings = ["batch", "off tok/s", "chosen", "accept", "gain", "q1", "q3", "never matching", "gain", "q1", "q3"]
    shown = plain_table(f"{result['what']}, {result['model']}, {result['shape']['dtype']}; asked {LIMIT}", headings)
    for cell in result["cells"]:
        row = [str(cell["batch"]), f"{cell['off']['tokens_per_s']['median']:.0f}"]
        for name in ("chosen", "never matching"):
            row.append(f"{cell[name]['tokens_per_s']['median']:.0f}")
            if name == "chosen":
                row.append(f"{cell[name]['accept_length']['median']:.2f}")
            row += [f"{cell[name]['gain'][which]:.3f}" for which in ("median", "q1", "q3")]
        shown.add_row(*row)
    return shown

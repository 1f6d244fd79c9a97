"""Whole rollouts over long contexts, where the KV cache outweighs the weights: drafted under selectors, and lossy.

Every mode samples the same continuations of natural text: same prompts, same noise, nothing stops. So "off" and every
"draft" are to be equal, up to ties that rounding decides; what "rectified" and "plain" sample is another's.
"""

import asyncio
import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, get_args, get_type_hints

from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError
from configs.schema import Config, DrafterConfig, RolloutConfig, SelectorName, SparseConfig, SpecConfig
from drafter.types import OFF, Strategy
from launch.agreement import verify
from launch.bench_drift import Key, diverge, summary
from launch.bench_options import BY_GATES, GATE_FP8, named_by, picking_by, require_budget, require_part
from launch.bench_report import in_turns, plain_table, provenance, say, shape, spread
from launch.bench_rollout import PREFILL_TOKENS, PROBE_TOKENS, generate, random_prompts, sampling, synchronize
from launch.drafting import make_drafting, starting_shape
from launch.geometry import Subject
from rollout.engine import NativeEngine
from rollout.graphs import BUCKETS
from rollout.lossy import UNDER, window
from rollout.memory import available_bytes
from rollout.model import bytes_per_block, context_length
from rollout.selectors import make_sparse, require_sparse
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, SampledUnder, Sampling

BLOCK_SIZE = 64  # what blocks of every selector divide
GRAPH_BYTES = 1 << 30  # of an engine, at most
COMPARED = 8  # rollouts of a mode whose first difference from "off" is looked into: each takes a forward of its text
ALL_BUT = 0.9  # of the rollouts: what comes after so many have finished is the tail
LIMIT = 2.0  # tokens a second of the best drafting mode over "off", at least (issue 6)
MODES = ("off", "draft", "rectified", "plain")
SELECTORS = (*get_args(SelectorName), GATE_FP8)
INNERS = get_args(get_type_hints(SparseConfig)["inner"])
GATED = {*BY_GATES, "duo"}  # what reads --gate


@dataclass(frozen=True, slots=True)
class Job:
    """What is sampled: as many sequences, each prompt_tokens of a text and new_tokens more.

    sparse: how selectors pick, but for their name. Lossy modes go by the first of the selectors. inners: who drafts for
    the drafting policy, each in turn; drafter: folder of the head of eagle.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    modes: tuple[str, ...]
    selectors: tuple[str, ...]
    sparse: SparseConfig
    rounds: int
    seed: int
    inners: tuple[str, ...] = ("off",)
    drafter: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """One mode under one selector, and the engine that samples so."""

    name: str
    under: SampledUnder
    config: SparseConfig
    strategy: Strategy
    engine: NativeEngine


@dataclass(frozen=True, slots=True)
class Timed:
    """All rollouts by what they are of, the seconds that took, and those from ALL_BUT of them being done to the end."""

    rollouts: dict[Key, Rollout]
    seconds: float
    tail_s: float


def run(subject: Subject, job: Job, *, name: str, pieces: list[list[int]]) -> dict[str, Any]:
    """Verify every mode, then time them in turns; JSON-able. pieces: the prompts, of the text that has this name.

    Of a job that was held against the model's config. Raises PreflightError, WrongResultError.
    """
    model = subject.model
    prompts = [Prompt(id=f"long-{index}", token_ids=piece, answer="") for index, piece in enumerate(pieces)]
    sides = make_sides(model, job)
    found = provenance(device=str(model.device), seed=job.seed)
    kept = _fit_together(model, sides, job)
    verified: dict[str, dict[str, Any]] = {}
    times: dict[str, list[Timed]] = {side.name: [] for side in sides}
    prefills: dict[str, float] = {}
    for number, side in in_turns(sides, job.rounds):
        if number == 0:
            verified[side.name] = verify(side.engine, model, seed=job.seed, under=side.under)
        if number == 0 if kept else number > 0:
            prefills[side.name] = make_ready(side, model, prompts, job)
        if number > 0:
            how = replace(sampling(job.new_tokens, seed=job.seed + number), under=side.under)
            times[side.name].append(timed := roll_out(side.engine, prompts, how))
            say(f"{side.name}, round {number}: {_rate(timed):.0f} tokens a second")
        if not kept:
            side.engine.release()
    how = sampling(job.new_tokens, seed=job.seed + 1)
    return {
        "what": "tokens per second of whole rollouts over long contexts",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "text": name,
        "block_size": BLOCK_SIZE,
        "kv_bytes": kv_bytes(model, job),
        "verified": verified,
        "cells": [_cell(side, times, prefills[side.name], model, prompts, how) for side in sides],
    }


def require(job: Job) -> None:
    """Hold what was asked against what there is, before a model is looked for. Raises ConfigError."""
    if unknown := [mode for mode in job.modes if mode not in MODES]:
        raise ConfigError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    if unknown := [selector for selector in job.selectors if selector not in SELECTORS]:
        raise ConfigError(f"--selectors: {unknown[0]!r} is none of {', '.join(SELECTORS)}")
    if (trained := GATED & {*job.selectors}) and not job.sparse.gate:
        raise ConfigError(f"--selectors {min(trained)} needs --gate: what sparse.gate names in a recipe")
    if job.sparse.gate and not trained:
        raise ConfigError(f"--gate {job.sparse.gate}: nobody reads it; add gate or duo to --selectors, or leave it out")
    if "duo" in trained and len(trained) > 1:
        raise ConfigError("--selectors: gate and duo each read another --gate; measure one at a time")
    if unknown := [inner for inner in job.inners if inner not in INNERS]:
        raise ConfigError(f"--inner: {unknown[0]!r} is none of {', '.join(INNERS)}")
    if job.inners != ("off",) and "draft" not in job.modes:
        raise ConfigError(f"--inner {','.join(job.inners)}: speeds drafts up alone; add draft to --modes, or give none")
    if "eagle" in job.inners and not job.drafter:
        raise ConfigError("--inner eagle needs --drafter FOLDER, as `paceline drafter train` writes it")
    if job.drafter and "eagle" not in job.inners:
        raise ConfigError(f"--drafter {job.drafter}: nobody reads it; add eagle to --inner, or leave it out")
    if job.sparse.weights != "policy" and "draft" not in job.modes:
        raise ConfigError(f"--weights {job.sparse.weights}: drafts alone read them; add draft to --modes, or give none")
    lossy = [mode for mode in job.modes if mode in UNDER]
    if lossy and job.sparse.budget_tokens < PROBE_TOKENS:
        raise ConfigError(
            f"--budget {job.sparse.budget_tokens}: mode {lossy[0]} is proven on texts it reads whole, of up to"
            f" {PROBE_TOKENS} tokens; give that many at least"
        )
    if "plain" in job.modes and job.selectors[0] == "verified":
        raise ConfigError("--selectors: plain goes by the first, and verifies nothing; put another before verified")
    for config in configs_of(job):
        if config.mode != "off":
            if BLOCK_SIZE % config.block_tokens:
                raise ConfigError(f"--block {config.block_tokens}: blocks divide {BLOCK_SIZE}; give 16, 32 or 64")
            total = job.prompt_tokens + job.new_tokens
            require_part(
                f"--budget {config.budget_tokens}", config.budget_tokens, total, "give less, or more --prompt-tokens"
            )
            require_budget("--budget", config)


def require_fit(job: Job, model_config: PretrainedConfig) -> None:
    """Hold the job against a model's config, before its weights are read. Raises ConfigError, PreflightError."""
    total = job.prompt_tokens + job.new_tokens
    if total > (limit := context_length(model_config)):
        raise ConfigError(f"prompts and answers of {total} tokens exceed the model's context of {limit}; ask for less")
    for config in configs_of(job):
        if config.mode != "off":
            require_sparse(config, model_config)
        if config.inner == "eagle":
            starting_shape(_run(config, job), model_config)


def configs_of(job: Job) -> list[SparseConfig]:
    """What the job compares, in its order."""
    found = []
    for mode in job.modes:
        for selector in job.selectors if mode == "draft" else job.selectors[:1]:
            kind: Any = {"mode": mode}
            kind["weights"] = job.sparse.weights if mode == "draft" else "policy"
            kind["gate"] = job.sparse.gate if selector in GATED else ""
            inners: Any = job.inners if mode == "draft" else ("off",)
            found += [picking_by(selector, job.sparse, **kind, inner=inner) for inner in inners]
    return found


def make_sides(model: PreTrainedModel, job: Job) -> list[Side]:
    """An engine for each that the job compares."""
    return [_side(config, model, job) for config in configs_of(job)]


def _side(config: SparseConfig, model: PreTrainedModel, job: Job) -> Side:
    names: list[str] = ["off"] if config.mode == "off" else [config.mode, named_by(config)]
    if config.inner != "off":
        names.append(config.inner)
    strategy = OFF
    if config.mode == "draft":
        strategy = Strategy("sparse", config.depth, 1, config.depth)
    elif config.mode == "rectified":
        strategy = window(config.every)
    run, chooser = _run(config, job, reach=2 * (1 + strategy.num_verify)), FixedChooser(strategy)
    drafting = make_drafting(run, model, chooser)
    engine = NativeEngine(
        model,
        drafter=drafting.drafter,
        chooser=chooser,
        rollout=run.rollout,
        cycles="resident",
        reader=drafting.reader,
        sparse=None if config.mode == "off" else make_sparse(config, model),
    )
    return Side(" ".join(names), UNDER.get(config.mode, "dense"), config, strategy, engine)


def _run(config: SparseConfig, job: Job, *, reach: int = 0) -> Config:
    """The config of a run that would sample so. reach: tokens beyond a sequence's end that are forwarded."""
    longest = max(job.prompt_tokens + job.new_tokens, PROBE_TOKENS) + reach + BLOCK_SIZE
    rows = max(job.sequences, 6)  # what verifying takes
    return Config(
        rollout=RolloutConfig(
            max_running=rows,
            prefill_tokens=PREFILL_TOKENS,
            block_size=BLOCK_SIZE,
            kv_tokens=rows * -(-longest // BLOCK_SIZE) * BLOCK_SIZE,
        ),
        spec=SpecConfig(source="eagle" if config.inner == "eagle" else "off"),
        sparse=config,
        drafter=DrafterConfig(init=job.drafter, train=False),
    )


def kv_bytes(model: PreTrainedModel, job: Job) -> int:
    """Keys and values of all sequences when they are complete."""
    blocks = job.sequences * -(-(job.prompt_tokens + job.new_tokens) // BLOCK_SIZE)
    return blocks * bytes_per_block(model.config, BLOCK_SIZE, model.dtype)


def _fit_together(model: PreTrainedModel, sides: Sequence[Side], job: Job) -> bool:
    """Whether all engines may keep their caches and graphs while another is timed."""
    # descriptors lie beside the cache, and scoring takes some room of its own
    needed = len(sides) * (1.15 * kv_bytes(model, job) + GRAPH_BYTES)
    return needed < 0.8 * available_bytes(str(model.device))


def make_ready(side: Side, model: PreTrainedModel, prompts: Sequence[Prompt], job: Job) -> float:
    """Compile and capture all that a timed run needs; the seconds that its prompts take alone."""
    begins = replace(sampling(1, seed=job.seed), under=side.under)
    whole = replace(begins, max_new_tokens=job.new_tokens)
    # rows for the whole length, and with them the graphs, outlive all shorter calls; a token suffices to make them
    longest = Prompt("longest", [*prompts[0].token_ids, *[0] * (job.new_tokens - 1)], "")
    generate(side.engine, [longest], replace(whole, max_new_tokens=1))
    vocab_size = model.config.get_text_config().vocab_size
    for batch in reversed([size for size in BUCKETS if size <= job.sequences] + [job.sequences]):
        generate(side.engine, random_prompts(batch, 1, vocab_size, seed=batch), replace(begins, max_new_tokens=2))
    seconds = []
    for _ in range(2):  # the first compiles
        side.engine.update(side.engine.version)
        seconds.append(generate(side.engine, prompts, begins).seconds)
    return seconds[1]


def roll_out(engine: NativeEngine, prompts: Sequence[Prompt], how: Sampling) -> Timed:
    """Sample all rollouts under the clock, their prompts computed anew."""
    engine.update(engine.version)
    gc.collect()  # before the clock starts, rather than at a moment of its own

    async def run() -> Timed:
        synchronize()
        begun = perf_counter()
        rollouts, finished = {}, []
        async for rollout in engine.generate(prompts, how):
            rollouts[rollout.prompt_id, rollout.sample] = rollout
            finished.append(perf_counter() - begun)
        synchronize()
        seconds = perf_counter() - begun
        return Timed(rollouts, seconds, seconds - finished[int(ALL_BUT * (len(finished) - 1))])

    return asyncio.run(run())


def _rate(timed: Timed) -> float:
    return sum(len(rollout.token_ids) for rollout in timed.rollouts.values()) / timed.seconds


def _cell(
    side: Side,
    times: Mapping[str, list[Timed]],
    prefill_s: float,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    how: Sampling,
) -> dict[str, Any]:
    """One mode's figures. how: of the first round without drafts, in which its rollouts are held against "off"."""
    rounds = times[side.name]
    tokens = [sum(len(rollout.token_ids) for rollout in timed.rollouts.values()) for timed in rounds]
    forwards = [sum(rollout.spec.forwards for rollout in timed.rollouts.values()) for timed in rounds]
    decoding = [timed.seconds - prefill_s for timed in rounds]
    cell: dict[str, Any] = {
        "name": side.name,
        "mode": side.config.mode,
        "selector": None if side.config.mode == "off" else named_by(side.config),
        "inner": side.config.inner,
        "sampled_under": side.under,
        "strategy": asdict(side.strategy),
        "budget": None if side.config.mode == "off" else side.config.budget_tokens,
        "tokens_per_s": spread([_rate(timed) for timed in rounds]),
        # few tokens on a busy machine: less time than their prompts took by themselves says nothing of decoding
        "decoded_per_s": spread([n / s for n, s in zip(tokens, decoding, strict=True)]) if min(decoding) > 0 else None,
        "prefill_s": prefill_s,
        "tail_s": spread([timed.tail_s for timed in rounds]),
        "accept_length": spread([n / count for n, count in zip(tokens, forwards, strict=True)]),
    }
    if off := times.get("off"):
        cell["gain"] = spread([plain.seconds / timed.seconds for plain, timed in zip(off, rounds, strict=True)])
        if side.config.mode == "draft":
            cell |= _held_against(off, rounds, model, prompts, how)
    return cell


def _held_against(
    off: Sequence[Timed], on: Sequence[Timed], model: PreTrainedModel, prompts: Sequence[Prompt], how: Sampling
) -> dict[str, Any]:
    """How many rollouts with drafts equal those without, and where the first few of the first round part."""
    rounds = zip(off, on, strict=True)
    pairs = [(plain.rollouts[key], timed.rollouts[key]) for plain, timed in rounds for key in plain.rollouts]
    few = list(off[0].rollouts)[:COMPARED]
    theirs, ours = ({key: timed.rollouts[key] for key in few} for timed in (off[0], on[0]))
    return {
        "compared": len(pairs),
        "equal": sum(plain.token_ids == drafted.token_ids for plain, drafted in pairs),
        "agreement": summary(theirs, ours, diverge(model, prompts, theirs, ours, how)),
    }


def table(result: dict[str, Any]) -> Table:
    """A line a mode."""
    held = result["kv_bytes"] / result["shape"]["step_weight_bytes"]
    title = (
        f"{result['what']}, {result['model']}, {result['shape']['dtype']}: {result['sequences']} sequences of"
        f" {result['prompt_tokens']} to {result['prompt_tokens'] + result['new_tokens']} tokens,"
        f" whose keys and values become {held:.0f} times the weights"
    )
    headings = ["mode", "reads", "tok/s", "min", "max", "decoding", "gain", "asked", "accept", "tail s", "equal"]
    shown = plain_table(title, headings)
    for cell in result["cells"]:
        rate, decoded, gain = cell["tokens_per_s"], cell["decoded_per_s"], cell.get("gain")
        shown.add_row(
            cell["name"],
            "all" if cell["budget"] is None else str(cell["budget"]),
            *(f"{rate[which]:.0f}" for which in ("median", "min", "max")),
            f"{decoded['median']:.0f}" if decoded else "",
            f"{gain['median']:.2f}" if gain else "",
            f"{LIMIT}" if cell["mode"] == "draft" else "",
            f"{cell['accept_length']['median']:.2f}",
            f"{cell['tail_s']['median']:.2f}",
            f"{cell['equal']} of {cell['compared']}" if "equal" in cell else "",
        )
    return shown

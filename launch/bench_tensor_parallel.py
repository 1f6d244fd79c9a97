"""One policy over several GPUs against the same policy on one: equal rollouts first, then milliseconds per step."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from transformers import PreTrainedModel

from kernels.attention import PackedSequences
from launch.agreement import verify
from launch.bench_drift import Divergence, Key, diverge, summary
from launch.bench_report import WrongResultError, in_turns, plain_table, provenance, say, shape, spread
from launch.bench_rollout import SHORT, Ours, generate, random_prompts, sampling, step_ms
from launch.geometry import Device, Dtype, geometry, placement, random_policy
from rollout.collectives import Ranks
from rollout.model import forward_packed
from rollout.parallel import shard_policy
from rollout.ranks import run_ranks
from rollout.types import Prompt, Rollout

PROMPTS, SAMPLES = 4, 2  # that are compared token by token
COMPARED_TOKENS = 64
TIE = 1e-3  # float32: rollouts may part where the best two are nearer than this, in nats
SIDES = ("one", "shared")

Results = dict[Key, Rollout]


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: prompts of prompt_len random tokens, a step being the mean of new_tokens, rounds times.

    exact_layers: of the geometry in float32, whose rollouts must not differ at all.
    """

    geometry: str
    world: int
    batches: tuple[int, ...]
    prompt_len: int
    new_tokens: int
    rounds: int
    exact_layers: int
    seed: int


def run(job: Job, *, device: Device, dtype: Dtype) -> dict[str, Any]:
    """Hold both sides against one another, then time them in turns; JSON-able.

    Raises WrongResultError, through RankFailedError, where they differ by more than rounding explains.
    """
    geometry(job.geometry)
    where, kind = placement(device, dtype)
    assert where in ("cpu", "cuda")
    return run_ranks(job.world, "cuda" if where == "cuda" else "cpu", _measure, job, kind)[0]


def _measure(ranks: Ranks, job: Job, dtype: str) -> dict[str, Any]:
    """One rank's part. All do the same, the whole policy's share of it too, so that they name their prompts alike."""
    found = provenance(device=str(ranks.device), seed=job.seed)
    exact = _exact(ranks, job)
    _say(ranks, f"float32, {job.exact_layers} layers: {exact['sampled']['compared']} tokens sampled alike")
    whole, sides = _make_sides(ranks, job, dtype, layers=None)
    verified = {name: verify(side.engine, whole, seed=job.seed) for name, side in sides.items()}
    _say(ranks, f"{dtype}: verified, sums by {ranks.transport}")
    agreement = _agreement(ranks, whole, sides, job)
    cells = [_cell(ranks, sides, batch, job) for batch in job.batches]
    return {
        "what": "milliseconds per decode step of one policy over several GPUs",
        "model": job.geometry,
        "shape": shape(whole),
        **found,
        **asdict(job),
        "device": ranks.device.type,
        "transport": ranks.transport,
        "exact": exact,
        "verified": verified,
        "agreement": agreement,
        "cells": cells,
    }


def _make_sides(ranks: Ranks, job: Job, dtype: str, *, layers: int | None) -> tuple[PreTrainedModel, dict[str, Ours]]:
    """The whole policy, and engines over it and over this rank's share of another like it."""
    models = []
    for _ in SIDES:
        model = random_policy(job.geometry, device=str(ranks.device), dtype=dtype, seed=job.seed)
        if layers is not None:
            _shorten(model, layers)
        models.append(model)
    shard_policy(models[1], ranks)
    longest = job.prompt_len + max(SHORT + job.new_tokens, COMPARED_TOKENS)
    running = max(*job.batches, PROMPTS * SAMPLES)
    return models[0], {
        name: Ours(model, max_running=running, tokens_each=longest) for name, model in zip(SIDES, models, strict=True)
    }


def _shorten(model: PreTrainedModel, num_layers: int) -> None:
    """Drop all but the first layers."""
    config = model.config
    num_layers = min(num_layers, config.num_hidden_layers)
    model.base_model.layers = model.base_model.layers[:num_layers]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = num_layers


def _exact(ranks: Ranks, job: Job) -> dict[str, Any]:
    """A shorter policy in float32, whose rollouts part at ties alone. Raises WrongResultError."""
    whole, sides = _make_sides(ranks, job, "float32", layers=job.exact_layers)
    found = _agreement(ranks, whole, sides, job)
    del whole, sides
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    for name, told in found.items():
        if told["divergences"] and not told["gap_max"] <= TIE:
            raise WrongResultError(
                f"{name} rollouts of one GPU and {job.world} part in float32 where the best token wins by"
                f" {told['gap_max']:.2g}"
            )
    return found


def _agreement(ranks: Ranks, whole: PreTrainedModel, sides: dict[str, Ours], job: Job) -> dict[str, Any]:
    """How the rollouts of both sides compare, greedy and at temperature 1. Raises WrongResultError."""
    vocab_size = whole.config.get_text_config().vocab_size
    prompts = random_prompts(PROMPTS, job.prompt_len, vocab_size, seed=job.seed)
    plain = sampling(COMPARED_TOKENS, seed=job.seed, num_samples=SAMPLES)
    found = {}
    for name, how in (("greedy", replace(plain, temperature=0.0, num_samples=1)), ("sampled", plain)):
        results: list[Results] = []
        for side in sides.values():
            side.engine.update(side.engine.version)  # no cached prefix: both compute the same batches
            results.append({(r.prompt_id, r.sample): r for r in generate(side.engine, prompts, how).rollouts})
        one, shared = results
        _require_alike(ranks, shared)
        parted = diverge(whole, prompts, one, shared, how) if how.temperature else _parted(whole, prompts, one, shared)
        found[name] = summary(one, shared, parted) | _logprob_differences(one, shared)
    return found


def _require_alike(ranks: Ranks, results: Results) -> None:
    """Raise WrongResultError where two ranks sampled different tokens."""
    mine = {key: rollout.token_ids for key, rollout in results.items()}
    if not ranks.all(ranks.share(mine) == mine):
        raise WrongResultError("the ranks of one policy sampled different tokens")


def _parted(whole: PreTrainedModel, prompts: Sequence[Prompt], one: Results, shared: Results) -> list[Divergence]:
    """Where greedy rollouts first differ, and by how much the whole policy's best token wins there."""
    by_id = {prompt.id: prompt for prompt in prompts}
    found = []
    for key, rollout in one.items():
        index = _first_difference(rollout, shared[key])
        if index == len(rollout.token_ids):
            continue
        tokens = torch.tensor([*by_id[key[0]].token_ids, *rollout.token_ids[:index]], device=whole.device)
        positions = torch.arange(len(tokens), device=whole.device)
        cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32, device=whole.device)
        with torch.no_grad():
            seqs = PackedSequences(cu_seqlens, len(tokens))
            (logits,) = forward_packed(whole, tokens, positions, seqs, positions[-1:])
        values, best_two = torch.log_softmax(logits.float(), dim=0).topk(2)
        tie = {rollout.token_ids[index], shared[key].token_ids[index]} == set(best_two.tolist())
        found.append(Divergence(*key, index=index, gap=float(values[0] - values[1]), tie=tie))
    return found


def _logprob_differences(one: Results, shared: Results) -> dict[str, float]:
    """Of the tokens that both sides sampled after the same text, in nats; greedy tokens have log-prob 0."""
    differences = []
    for key, rollout in one.items():
        alike = _first_difference(rollout, shared[key])
        pairs = zip(rollout.logprobs[:alike], shared[key].logprobs[:alike], strict=True)
        differences += [abs(a - b) for a, b in pairs]
    return {"logprob_mean": sum(differences) / max(1, len(differences)), "logprob_max": max(differences, default=0.0)}


def _first_difference(one: Rollout, other: Rollout) -> int:
    """The index of the first token that differs; their length where none does."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(one.token_ids))


def _cell(ranks: Ranks, sides: dict[str, Ours], batch: int, job: Job) -> dict[str, Any]:
    """One batch size."""
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for number, name in in_turns(SIDES, job.rounds):
        seed = job.seed + 1000 * batch + number
        ranks.all(True)  # rank 0's clock starts when all are there
        times[name].append(
            step_ms(sides[name], batch=batch, prompt_len=job.prompt_len, new_tokens=job.new_tokens, seed=seed)
        )
    cell: dict[str, Any] = {"batch": batch}
    for name in SIDES:
        step = spread(times[name][1:])
        cell[name] = {"step_ms": step, "tokens_per_s": batch / step["median"] * 1e3}
    one, shared = (cell[name]["step_ms"]["median"] for name in SIDES)
    cell["speedup"] = one / shared
    _say(ranks, f"batch {batch}: one GPU {one:.3f} ms, {ranks.world} {shared:.3f} ms, {cell['speedup']:.2f} times")
    return cell


def _say(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        say(text)


def table(result: dict[str, Any]) -> Group:
    """Steps by batch size, and how far the rollouts of both sides agree."""
    title = f"{result['what']}, {result['model']}, {result['shape']['dtype']}, sums by {result['transport']}"
    if result["gpu"]:
        title += f", {result['gpu']['name']}"
    times = plain_table(
        title, ["batch", "one GPU", "min", "max", f"{result['world']} GPUs", "min", "max", "times as fast"]
    )
    for cell in result["cells"]:
        figures = [f"{cell[name]['step_ms'][which]:.3f}" for name in SIDES for which in ("median", "min", "max")]
        times.add_row(str(cell["batch"]), *figures, f"{cell['speedup']:.2f}")
    return Group(times, _agreement_table(result))


def _agreement_table(result: dict[str, Any]) -> Table:
    columns = {
        f"{precision}, {name}": result[where][name]
        for precision, where in ((f"float32, {result['exact_layers']} layers", "exact"), ("all layers", "agreement"))
        for name in ("greedy", "sampled")
    }
    shown = plain_table("rollouts on one GPU and on several", ["", *columns])
    told = list(columns.values())
    shown.add_row("equal to the end", *(f"{each['rollouts_equal']} of {each['rollouts']}" for each in told))
    shown.add_row("equal tokens until they part", *(f"{each['agreement']:.3%}" for each in told))
    shown.add_row("gap where they part, at most", *(_figure(each["gap_max"]) for each in told))
    shown.add_row("log-prob difference, mean", *(_figure(each["logprob_mean"]) for each in told))
    shown.add_row("log-prob difference, max", *(_figure(each["logprob_max"]) for each in told))
    return shown


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"

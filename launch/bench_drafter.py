"""Samples per second of drafter training on rollouts of long-tailed lengths: packed, and padded to the longest."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from configs.errors import ConfigError, ResourceError
from configs.schema import DrafterConfig
from drafter.eagle import INIT_STD, EagleConfig, EagleHead
from drafter.features import FeatureBatch
from drafter.trainer import DrafterTrainer
from launch.bench_report import WrongResultError, in_turns, plain_table, provenance, say, spread
from launch.bench_rollout import synchronize
from launch.geometry import geometry

WANTED = 2.5  # packed samples a second over padded ones, at least (issue 4)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of a gradient's norm; float32 and bfloat16
PER_TOKEN = ("token_ids", "next_ids", "positions", "aux", "hidden", "alt_ids", "alt_hidden")


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: num_batches updates of num_samples whole rollouts each, their lengths log-normal."""

    geometry: str
    device: str
    num_samples: int
    num_batches: int
    median_tokens: int
    sigma: float
    max_tokens: int
    rounds: int
    seed: int
    config: DrafterConfig


def run(job: Job) -> dict[str, Any]:
    """Verify that every side has the gradients of the packed one, then time all in turns; JSON-able.

    Raises ConfigError and ResourceError.
    """
    if job.max_tokens > geometry(job.geometry).max_position_embeddings:
        raise ConfigError(f"--max-tokens {job.max_tokens} is beyond the context of {job.geometry}; go below")
    found = provenance(device=job.device, seed=job.seed)
    draw = torch.Generator().manual_seed(job.seed)
    lengths = long_tail(job, draw)
    try:
        sides = _sides(job, lengths, draw)
        verified = _verify(job, sides["packed"][0], sides["padded"][0])
        trainer = random_trainer(job.geometry, job.config, device=job.device, seed=job.seed)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        step_ms: list[float] = []
        windows = _window_steps(job, draw)
        for number, name in in_turns(list(sides), job.rounds):
            begun = perf_counter()
            stats = [trainer.step(batch) for batch in sides[name]]
            synchronize()
            rates[name].append(len(lengths) / (perf_counter() - begun))
            if name == "packed" and number:
                step_ms += [1e3 * each.seconds for each in stats]
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"--samples {job.num_samples}: {job.device} cannot hold a padded batch; go below"
        ) from error
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    say(", ".join(f"{name} {median:.1f}" for name, median in medians.items()) + " samples/s")
    cells = [
        {
            "side": name,
            "samples_per_s": spread(rates[name][1:]),
            "positions": sum(len(batch.next_ids) for batch in batches),
            "gain": spread([a / b for a, b in zip(rates["packed"][1:], rates[name][1:], strict=True)]),
        }
        for name, batches in sides.items()
    ]
    return {
        "what": "drafter training, rollouts per second",
        "model": job.geometry,
        **found,
        **asdict(job),
        "lengths": {"tokens": sum(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "verified": verified,
        "packed_step_ms": spread(step_ms),
        "window_step_ms": windows,
        "cells": cells,
    }


def _window_steps(job: Job, draw: torch.Generator) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step on windows as long as a run's, in turns: as runs take it, on a GPU as CUDA graphs, and
    launched by the host."""
    window = job.config.feature_window
    windows = [window] * (job.config.batch_tokens // window)
    batch = random_features(job.geometry, windows, draw, device=job.device)
    # a trainer that expects shorter windows captures none of these
    configs = {"as trained": job.config, "launched by the host": replace(job.config, feature_window=window - 1)}
    trainers = {
        name: random_trainer(job.geometry, config, device=job.device, seed=job.seed) for name, config in configs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for number, name in in_turns(list(trainers), job.rounds):
        steps = [1e3 * trainers[name].step(batch).seconds for _ in range(job.num_batches)]
        if number:
            times[name] += steps
    return {name: spread(steps) for name, steps in times.items()}


def long_tail(job: Job, draw: torch.Generator) -> list[int]:
    """Rollout lengths in tokens: log-normal, none under 16 or above the longest."""
    count = job.num_samples * job.num_batches
    drawn = torch.randn(count, generator=draw) * job.sigma + math.log(job.median_tokens)
    return drawn.exp().round().long().clamp(16, job.max_tokens).tolist()


def padded(batch: FeatureBatch) -> FeatureBatch:
    """Every window filled up to the batch's longest, with positions that are no targets."""
    lengths = batch.cu_seqlens.diff().tolist()
    longest = max(lengths)
    starts = batch.cu_seqlens[:-1].long()[:, None]
    place = torch.arange(longest, device=starts.device)
    filled = place >= torch.tensor(lengths, device=starts.device)[:, None]
    source = (starts + place).clamp(max=len(batch.next_ids) - 1).flatten()
    tensors = {name: getattr(batch, name)[source] for name in PER_TOKEN}
    for name in ("next_ids", "alt_ids"):
        tensors[name][filled.flatten()] = -1
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32, device=starts.device) * longest
    return replace(batch, **tensors, cu_seqlens=bounds)


def _sides(job: Job, lengths: Sequence[int], draw: torch.Generator) -> dict[str, list[FeatureBatch]]:
    """The same rollouts three times. sorted: padded too, but rollouts of like lengths share a batch, which costs the
    updates their independence of length."""

    def batches(of: Sequence[int]) -> list[FeatureBatch]:
        groups = [of[first : first + job.num_samples] for first in range(0, len(of), job.num_samples)]
        return [random_features(job.geometry, group, draw, device=job.device) for group in groups]

    packed = batches(lengths)
    return {
        "packed": packed,
        "padded": [padded(batch) for batch in packed],
        "sorted": [padded(batch) for batch in batches(sorted(lengths))],
    }


def random_features(name: str, lengths: Sequence[int], draw: torch.Generator, *, device: str) -> FeatureBatch:
    """Features of whole rollouts of these lengths, of a policy of the named geometry; their values decide no time."""
    shape, total = geometry(name), sum(lengths)

    def states(width: int) -> torch.Tensor:
        return torch.randn(total, width, generator=draw).to(device, DTYPES[device])

    token_ids = torch.randint(shape.vocab_size, (total + 1,), generator=draw).to(device)
    hidden = states(shape.hidden_size)
    return FeatureBatch(
        token_ids=token_ids[:-1],
        next_ids=token_ids[1:],
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        aux=states(3 * shape.hidden_size),
        hidden=hidden,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        versions=torch.zeros(len(lengths), dtype=torch.int64, device=device),
        alt_ids=torch.full_like(token_ids[1:], -1),
        alt_hidden=hidden,
        temperature=1.0,
    )


def random_trainer(name: str, config: DrafterConfig, *, device: str, seed: int) -> DrafterTrainer:
    """A head with random weights beside the embedding and output weights of a policy of the named geometry.

    Made on the device: what a large policy has takes the host longer to draw than all that is measured.
    """
    shape = geometry(name)
    draw = torch.Generator(device).manual_seed(seed)
    weights = torch.randn(shape.vocab_size, shape.hidden_size, generator=draw, device=device).mul_(0.02)
    with torch.device("meta"):
        head = EagleHead(EagleConfig.of(shape, draft_vocab=config.draft_vocab, window=config.window))
    head.to_empty(device=device)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, INIT_STD, generator=draw)
            else:
                parameter.fill_(1)
        weights = weights.to(DTYPES[device])
        known = torch.arange(shape.vocab_size, device=device) < head.config.draft_vocab
        head.set_vocabulary(torch.zeros_like(head.d2t), known, weights)  # the first tokens
    return DrafterTrainer(head, embedding=weights, lm_head=weights, config=config)


def _verify(job: Job, packed: FeatureBatch, padded: FeatureBatch) -> dict[str, float]:
    """Raise WrongResultError where an update with padding has other gradients; returns their difference."""
    trainers = [random_trainer(job.geometry, job.config, device=job.device, seed=job.seed) for _ in range(2)]
    losses = [trainer.step(batch).loss for trainer, batch in zip(trainers, (packed, padded), strict=True)]
    ours, theirs = (
        torch.cat([parameter.grad.flatten() for parameter in trainer.head.parameters() if parameter.grad is not None])
        for trainer in trainers
    )
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= TOLERANCE[job.device]:  # written so that NaN fails
        raise WrongResultError(f"packed gradients are {error:.2g} of their norm away from padded ones")
    return {"gradient_error": error, "packed_loss": losses[0], "padded_loss": losses[1]}


def table(result: dict[str, Any]) -> Table:
    """Samples a second of every side, and what packing gains over it."""
    steps = ", ".join(f"{spread['median']:.1f} ms {name}" for name, spread in result["window_step_ms"].items())
    shown = plain_table(
        f"{result['what']}, {result['model']}, {result['lengths']['mean']:.0f} tokens on average, "
        f"{result['lengths']['max']} at most; asked {WANTED}; a step on windows: {steps}",
        ["side", "samples/s", "min", "max", "positions", "packed gains", "min", "max"],
    )
    for cell in result["cells"]:
        rate, gain = cell["samples_per_s"], cell["gain"]
        shown.add_row(
            cell["side"],
            *(f"{rate[name]:.1f}" for name in ("median", "min", "max")),
            str(cell["positions"]),
            *(f"{gain[name]:.2f}x" for name in ("median", "min", "max")),
        )
    return shown

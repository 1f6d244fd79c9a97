"""The commands of `paceline bench` that measure how a drafter learns."""

from pathlib import Path
from typing import Annotated

import typer

from launch.bench_options import Device, Geometries, Json, Rounds, Seed, names, prepare, show


def drafter_training(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="The policy's shape, random weights.")] = "smollm2-135m",
    samples: Annotated[int, typer.Option(min=2, help="Rollouts of one update.")] = 32,
    batches: Annotated[int, typer.Option(min=1, help="Updates a round.")] = 4,
    median_tokens: Annotated[int, typer.Option(min=16, help="Median of the rollouts' log-normal lengths.")] = 200,
    sigma: Annotated[float, typer.Option(min=0.0, help="Deviation of the lengths' logarithms.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longer rollouts are cut to this.")] = 2048,
    rounds: Rounds = 5,
    device: Device = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Rollouts per second of drafter training: packed, padded, and padded after sorting by length; equal gradients."""
    prepare(out)
    from configs.schema import DrafterConfig
    from launch import bench_drafter
    from launch.geometry import placement

    where, _ = placement(device, "auto")
    job = bench_drafter.Job(
        geometry, where, samples, batches, median_tokens, sigma, max_tokens, rounds, seed, DrafterConfig()
    )
    result = bench_drafter.run(job)
    show(result, bench_drafter.table(result), out)


def drafter_losses(
    source: Annotated[Path, typer.Argument(metavar="RECIPE", help="Whose model answers; or a run directory.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    losses: Annotated[str, typer.Option(help="Values of drafter.loss.")] = "lk,kl,tv",
    seeds: Annotated[int, typer.Option(min=1, help="Heads by each loss, of random weights.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Updates of a head.")] = 200,
    texts: Annotated[int, typer.Option(min=1, help="Prompts whose answers are learned from.")] = 768,
    heldout: Annotated[int, typer.Option(min=1, help="Prompts whose answers are measured by.")] = 96,
    depth: Annotated[int, typer.Option(min=1, help="Tokens of a replayed draft, a chain.")] = 6,
    out: Json = None,
) -> None:
    """Accept length of a drafter by its loss: the same answers and updates, expected and replayed, several seeds."""
    prepare(out)
    from launch import bench_losses

    job = bench_losses.Job(bench_losses.chosen(losses), seeds, steps, texts, heldout, depth)
    result = bench_losses.run(source, overrides or [], job)
    show(result, bench_losses.table(result), out)


def drafter_checkpoint(
    geometry: Geometries = "smollm2-135m,qwen3-8b",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an update.")] = 4096,
    checkpoints: Annotated[int, typer.Option(min=2, help="Checkpoints of each drafter.")] = 5,
    seconds: Annotated[
        float, typer.Option(min=0, help="From a drafter's third on, begin none that would end later; 0: no limit.")
    ] = 40,
    device: Device = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """How long a drafter's training is held up by its checkpoint, which is then written beside it and proved whole."""
    prepare(out)
    from launch import bench_checkpoint
    from launch.geometry import placement

    where, _ = placement(device, "auto")
    job = bench_checkpoint.Job(names("--geometry", geometry), where, tokens, checkpoints, seconds, seed)
    result = bench_checkpoint.run(job)
    show(result, bench_checkpoint.table(result), out)

"""The commands of `paceline bench` that measure how a drafter learns."""

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from launch.bench_options import Device, Geometries, Json, Rounds, Seed, names, prepare, show, write


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
    result = bench_checkpoint.run(job, keep=lambda so_far: write(so_far, out))
    show(result, bench_checkpoint.table(result), out)


def online(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Of the runs.")] = Path("smollm2_gpu"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each arm; they take turns, a step each.")] = 24,
    drafter_steps: Annotated[int, typer.Option(min=1, help="Updates of the drafter trained before.")] = 120,
    texts: Annotated[int, typer.Option(min=2, help="Prompts whose answers it learns from.")] = 512,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no round of turns later than that; 0: no limit.")] = 2,
    runs: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the runs and the drafter here.")] = None,
    out: Json = None,
) -> None:
    """Accept length by step of a run: a drafter kept as it is, the same learning on, and one from random weights."""
    prepare(out)
    from launch import bench_online

    job = bench_online.Job(steps, drafter_steps, texts, minutes)
    with nullcontext(runs) if runs else TemporaryDirectory(prefix="paceline-online-") as folder:
        result = bench_online.run(
            recipe, overrides or [], job, folder=Path(folder), keep=lambda so_far: write(so_far, out)
        )
    Console().print(bench_online.end_table(result))
    show(result, bench_online.table(result), out)

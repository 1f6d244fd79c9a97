"""The commands of `paceline bench` that measure runs and what stands beside them: idle workers, rewards, the page."""

import json
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from rich.console import Console

from configs.errors import ConfigError, StorageError
from launch.bench_options import (
    Device,
    Dtype,
    Geometry,
    Json,
    Model,
    Rounds,
    Seed,
    numbers,
    prepare,
    require_writable,
    show,
    write,
)


def curve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Writes OUT.json and OUT.png.")],
) -> None:
    """Keep a run's learning curve: every step and evaluation as JSON, and a picture."""
    from launch import curve as learning

    data, picture = (out.with_name(out.name + suffix) for suffix in (".json", ".png"))
    require_writable("OUT", data)
    require_writable("OUT", picture)
    result = {"command": f"paceline bench curve {run} {out}"} | learning.curve(run)
    data.write_text(json.dumps(result, indent=1) + "\n")
    learning.draw(result, picture)
    print(f"wrote {data} and {picture}")


def loop(
    peer_python: Annotated[Path, typer.Option(metavar="PATH", help="Python of an environment that has TRL.")],
    recipe: Annotated[Path, typer.Option(metavar="CONFIG", help="Recipe that names model and data.")] = Path("smoke"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    peer: Annotated[Literal["trl"], typer.Option(help="Whom to compare with.")] = "trl",
    spec: Annotated[str, typer.Option(help="Paceline's spec.source, one arm each.")] = "off,suffix",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Times every arm runs; the arms take turns.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each; 0 means all cores.")] = 0,
    peer_micro: Annotated[int, typer.Option(min=0, help="TRL's batch a device; 0: as train.micro_tokens allows.")] = 0,
    out: Json = None,
) -> None:
    """Seconds per GRPO step against TRL's GRPOTrainer: same model, prompts, lengths and optimiser, float32."""
    require_writable("--json", out)
    from launch import bench_loop

    result = bench_loop.run(
        recipe,
        overrides or [],
        peer=peer,
        peer_python=peer_python,
        sources=spec.split(","),
        steps=steps,
        rounds=rounds,
        threads=threads,
        peer_micro=peer_micro,
    )
    show(result, bench_loop.table(result), out)


def longtail(
    recipe: Annotated[Path, typer.Option(metavar="CONFIG", help="Recipe of the workload.")] = Path("longtail"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    arms: Annotated[
        str, typer.Option(help="How rollouts are drafted, the first to compare with.")
    ] = "off,suffix,tlt,ours",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each arm; they take turns, a step each.")] = 20,
    skip: Annotated[int, typer.Option(min=0, help="First steps that enter no figure: captures, compilation.")] = 4,
    drafter_steps: Annotated[
        int, typer.Option(min=0, help="Updates of the drafter that learned arms start from; 0: from random weights.")
    ] = 600,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no round of turns later than that; 0: no limit.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Start from this run's newest checkpoint: no warm start.")
    ] = None,
    drafter: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Learned arms start from this drafter: no training before.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the runs here, DIR/warm and DIR/drafter first.")
    ] = None,
    out: Json = None,
) -> None:
    """Whole steps of GRPO on a long-tailed workload, by how rollouts are drafted: one run each, from one checkpoint."""
    prepare(out)
    from launch import bench_longtail, longtail_report

    job = bench_longtail.Job(tuple(arms.split(",")), steps, skip, drafter_steps, minutes)
    with nullcontext(runs) if runs else TemporaryDirectory(prefix="paceline-longtail-") as folder:
        result = bench_longtail.run(
            recipe,
            overrides or [],
            job,
            checkpoint=checkpoint,
            drafter=drafter,
            folder=Path(folder),
            keep=lambda so_far: write(so_far, out),
        )
    if result["drafter"]:
        Console().print(longtail_report.drafter_table(result["drafter"]))
    show(result, longtail_report.table(result), out)


def longtail_picture(
    result: Annotated[Path, typer.Argument(metavar="JSON", help="What `paceline bench longtail` wrote.")],
    picture: Annotated[Path, typer.Argument(metavar="PNG", help="Where the picture goes.")],
) -> None:
    """Draw a long-tail result: where a step's seconds go, and how fast rollouts were by step."""
    from launch import longtail_report

    require_writable("PNG", picture)
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"JSON {result}: cannot be read ({error}); give what --json wrote") from error
    if not isinstance(found, dict) or found.get("what") != longtail_report.WHAT or "arms" not in found:
        raise ConfigError(f"JSON {result} is no long-tail result; give what `paceline bench longtail --json` wrote")
    longtail_report.draw(found, picture)
    print(f"wrote {picture}")


def idle(
    geometry: Geometry = None,
    model: Model = None,
    running: Annotated[int, typer.Option(min=2, help="Sequences a worker runs at a time; it has twice as many.")] = 32,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a rollout.")] = 512,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one of the drafter's optimiser steps.")] = 4096,
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Two workers of which one is idle: how much of its time is used, what that costs the other, what a kill does."""
    prepare(out)
    from launch.cluster import protect_local_ray

    protect_local_ray()
    from launch import bench_idle

    job = bench_idle.Job(geometry, model, running, prompt_len, new_tokens, batch_tokens, rounds, seed)
    result = bench_idle.run(job, device=device, dtype=dtype)
    show(result, bench_idle.table(result), out)


def reward(
    workers: Annotated[str, typer.Option(help="Reward workers.")] = "1,2",
    sandboxes: Annotated[str, typer.Option(help="Kinds of reward.sandbox.")] = "bubblewrap,landlock",
    rewards: Annotated[int, typer.Option(min=1, help="Programs scored a round, of each kind of tests.")] = 200,
    rounds: Rounds = 3,
    out: Json = None,
) -> None:
    """Model-written programs scored per second, by sandbox and number of workers, against a Python start a test."""
    counts = numbers("--workers", workers)
    prepare(out)
    from launch import bench_reward

    result = bench_reward.run(bench_reward.Job(tuple(counts), tuple(sandboxes.split(",")), rewards, rounds))
    show(result, bench_reward.table(result), out)


def monitor(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe whose run is watched.")] = Path("smoke"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 10,
    out: Json = None,
) -> None:
    """What recording, the page and a sink cost a run: steps with them, in turns with steps without."""
    prepare(out)
    from launch import bench_monitor

    with TemporaryDirectory(prefix="paceline-bench-") as folder:
        result = bench_monitor.run(recipe, overrides or [], pairs=pairs, folder=Path(folder))
    show(result, bench_monitor.table(result), out)


def memory(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE[@GEOMETRY] [a.b=c ...] ...", help="Recipes, each before its keys.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="Steps of each, and at most as many of its warm start.")] = 3,
    out: Json = None,
) -> None:
    """What `paceline plan` says of a GPU's memory, beside what a few steps of each recipe take.

    RECIPE@GEOMETRY runs on random weights of a known shape, as in smollm2_gpu@qwen3-1.7b.
    """
    prepare(out)
    from launch import bench_memory, bench_recipe

    result = bench_memory.run(bench_recipe.asked(words), steps=steps, keep=lambda so_far: write(so_far, out))
    show(result, bench_memory.table(result), out)


def scale(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE[@GEOMETRY] [a.b=c ...]", help="The recipe, and keys to set.")
    ],
    arms: Annotated[
        str, typer.Option(help="Sizes, the first to compare with; on CPUs `nodes` too: two simulated ones.")
    ] = "one,colocated,zero3,separate",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each arm.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="First steps that enter no time: captures, compilation.")] = 1,
    minutes: Annotated[float, typer.Option(min=0.01, help="An arm that takes longer is ended.")] = 10.0,
    runs: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the runs here.")] = None,
    out: Json = None,
) -> None:
    """One recipe unchanged but for its size: equal rollouts, reward and loss by step, seconds by phase, transfers.

    RECIPE@GEOMETRY runs on random weights of a known shape, as in smollm2_gpu@qwen3-1.7b.
    """
    prepare(out)
    from launch import bench_recipe, bench_scale, scale_report

    asked = bench_recipe.asked(words)
    if len(asked) > 1:
        raise ConfigError(f"{asked[1].recipe}: scale takes one recipe; give its keys as a.b=c")
    job = bench_scale.Job(tuple(arms.split(",")), steps, skip, minutes)
    with nullcontext(runs) if runs else TemporaryDirectory(prefix="paceline-scale-") as folder:
        result = bench_scale.run(asked[0], job, folder=Path(folder).absolute(), keep=lambda so_far: write(so_far, out))
    show(result, scale_report.table(result), out)

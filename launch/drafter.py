"""`paceline drafter`: train a drafter away from a run, and measure one."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from configs.errors import ConfigError
from launch.bench_options import require_writable
from launch.natural_text import read_text

if TYPE_CHECKING:
    from drafter.trainer import DrafterStats
    from launch.subject import Unloaded

app = typer.Typer(help="Train and measure drafters.")

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="A run directory, or a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set, as drafter.lr=1e-3.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Where the results go.")]

REPORT_EVERY = 10  # updates between two lines


@app.callback()
def drafter() -> None:
    """Train and measure drafters."""


@app.command()
def train(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: for drafter.init, vLLM and SGLang.")],
    overrides: Overrides = None,
    answers: Annotated[
        Literal["policy", "solutions"],
        typer.Option(help="What the policy says (of a run, its samples), or worked solutions of the problems."),
    ] = "policy",
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Learn from this text, not from answers.")] = None,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a piece of --text.")] = 1024,
    texts: Annotated[int, typer.Option(min=2, help="Responses, or pieces, to learn from, at most.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 200,
    layout: Annotated[Literal["eagle3", "speculators"], typer.Option("--format", help="Of OUT.")] = "eagle3",
) -> None:
    """Warm a drafter up: on what a policy says, on worked solutions, or on a text."""
    given = None if text is None else read_text(text)  # what is wrong with it is said before the policy is loaded
    found = find_source(source, overrides)
    from launch import offline
    from rl.export_drafter import require_drafter_place

    require_drafter_place(out, offline.drafter_shape(found.config, found.model_config))
    if given is not None:
        offline.require_length(length, found.model_config)
    subject = found.load()
    console = Console()
    if given is None:
        learned = offline.texts_for(subject, texts, answers=answers)
    else:
        learned = offline.texts_of(given, subject, texts, length=length)
    console.print(f"{len(learned)} texts, {sum(len(text.token_ids) for text in learned):,} tokens", highlight=False)

    def report(step: int, stats: "DrafterStats") -> None:
        if step % REPORT_EVERY == 0 or step == steps:
            figures = f"loss {stats.loss:.3f}, accept length {stats.accept_length:.2f}"
            console.print(f"step {step}/{steps}: {figures}, {stats.seconds * 1e3:.0f} ms", highlight=False)

    trained = offline.train_drafter(subject, learned, steps=steps, report=report)
    figures = f"{trained.before:.2f} before, {trained.after:.2f} after"
    console.print(f"accept length on answers to prompts not learned from: {figures}", highlight=False)
    version = offline.write_trained(out, trained, subject, layout=layout)
    console.print(f"wrote {out}" + (f"; vLLM {version} loads it" if version else ""), highlight=False)


@app.command(name="eval")
def evaluate(
    source: Source,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option("--drafter", metavar="FOLDER", help="An exported drafter; of a run, its own.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="Temperatures to sample at, as 0,0.7,1; 0 is greedy.")] = "",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out problems to answer.")] = 32,
    depth: Annotated[int, typer.Option(min=1, help="Tokens of a draft, a chain.")] = 4,
    context: Annotated[
        Literal["rollout", "server"],
        typer.Option(help="What the drafter has read: the response, as in rollouts, or the prompt too, as in servers."),
    ] = "rollout",
    out: Json = None,
) -> None:
    """Accept length by draft position, by position in the response and by temperature."""
    require_writable("--json", out)
    chosen = _temperatures(temperatures)
    found = find_source(source, overrides)
    from launch import offline

    head = offline.drafter_for(found, folder)
    if depth >= head.config.window:
        raise ConfigError(f"--depth {depth} does not fit the drafter's window of {head.config.window} tokens; lower it")
    subject = found.load()
    chosen = chosen or [subject.config.rollout.temperature]
    problems = offline.problems(subject, prompts)
    measured = []
    for temperature in chosen:
        cycles = offline.measure(subject, head, problems, temperature=temperature, depth=depth, context=context)
        measured.append({"temperature": temperature} | cycles.table())
    from launch.drafter_report import document, tables

    for table in tables(measured):
        Console().print(table)
    if out is not None:
        result = document(subject, folder, measured, prompts=len(problems), context=context)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {out}")


def _temperatures(text: str) -> list[float]:
    """Numbers between commas. Raises ConfigError."""
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--temperatures {text!r} is not numbers between commas, as 0,0.7,1") from None
    if any(not 0 <= value < float("inf") for value in values):
        raise ConfigError(f"--temperatures {text!r}: none may be negative or infinite")
    return values


def find_source(source: Path, overrides: list[str] | None) -> "Unloaded":
    """The policy of a run or a recipe, not loaded yet, after what comes before the first heavy import."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading a checkpoint imports DeepSpeed, which would look for one
    from launch.logs import check_kernels, quiet_libraries

    check_kernels()
    quiet_libraries()
    from launch.logs import disable_progress_bars
    from launch.subject import find_subject

    disable_progress_bars()
    return find_subject(source, list(overrides or []))

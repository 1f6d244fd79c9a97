"""`paceline gate`: train the gates that sparse attention selects blocks by."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from configs.errors import ConfigError
from launch.bench_options import prepare
from launch.drafter import Json, Overrides, Source, find_source
from launch.natural_text import read_text

if TYPE_CHECKING:
    from drafter.gate_quality import Quality
    from drafter.gate_training import GateStats

app = typer.Typer(help="Train gates for sparse attention (SeerAttention-R).")

BLOCKS = (16, 32, 64)  # keys of a block, as the published code allows
REPORT_EVERY = 10  # updates between two lines


@app.callback()
def gate() -> None:
    """Train gates for sparse attention (SeerAttention-R)."""


@app.command()
def train(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, for sparse.gate.")],
    overrides: Overrides = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Learn from this text, not from answers.")] = None,
    answers: Annotated[
        Literal["policy", "solutions"],
        typer.Option(help="What the policy says (of a run, its samples), or worked solutions of the problems."),
    ] = "policy",
    texts: Annotated[int, typer.Option(min=2, help="Answers to learn from, at most.")] = 512,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence: answers one after the other.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of an update.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate, after a warm-up.")] = 1e-3,
    block: Annotated[int, typer.Option(help="Keys of a block that is selected or not: 16, 32 or 64.")] = 64,
    budget: Annotated[int, typer.Option(min=0, help="Keys that the selection is measured with; 0 is an eighth.")] = 0,
    figures: Json = None,
) -> None:
    """Distil gates from a policy's own attention; its weights stay as they are."""
    if block not in BLOCKS:
        raise ConfigError(f"--block {block} is none of {', '.join(map(str, BLOCKS))}")
    if not 0 < lr < 1:
        raise ConfigError(f"--lr {lr:g} is not between 0 and 1")
    if 0 < budget < block:
        raise ConfigError(f"--budget {budget} holds no block of {block} keys; give {block} or more")
    num_blocks = max(1, (budget or length // 8) // block)
    if num_blocks >= (length - 1) // block and budget:
        raise ConfigError(
            f"--budget {budget} leaves nothing to select of --length {length}; give less, or a longer one"
        )
    if num_blocks >= (length - 1) // block:
        raise ConfigError(
            f"--length {length} leaves nothing to select where {num_blocks * block} keys are read; make it longer"
        )
    prepare(figures)
    from rl.export import require_free

    # before the policy is loaded, which may take minutes
    require_free(out)
    given = None if text is None else read_text(text)
    found = find_source(source, overrides)
    from drafter.gate import GateConfig, Gates
    from launch import distil, offline

    offline.require_length(length, found.model_config)
    shape = GateConfig.of(found.model_config, select_block=block)
    subject = found.load()
    gates = Gates(shape, seed=subject.config.run.seed).to(subject.device)
    console = Console(highlight=False, soft_wrap=True)
    if given is None:
        sequences = distil.of_answers(subject, texts, answers=answers, length=length)
    else:
        sequences = distil.of_text(given, subject, length)
    console.print(f"{len(sequences.learned)} sequences of {length:,} tokens, and {len(sequences.heldout)} held out")

    losses: list[float] = []

    def report(step: int, stats: "GateStats") -> None:
        losses.append(stats.loss)
        if step % REPORT_EVERY == 0 or step in (1, steps):
            console.print(f"step {step}/{steps}: loss {stats.loss:.4f}, {stats.seconds * 1e3:.0f} ms")

    before = distil.measure_gates(subject, gates, sequences, budget_blocks=num_blocks)
    distil.train_gates(subject, gates, sequences, steps=steps, batch=batch, lr=lr, report=report)
    after = distil.measure_gates(subject, gates, sequences, budget_blocks=num_blocks)
    console.print(f"on what was held out, with {num_blocks} blocks of {block} keys and the token's own:")
    for line in _lines(before, after):
        console.print(line)
    distil.save_gates(out, gates, subject)
    print(f"wrote {out}")
    if figures is not None:
        options = {
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "length": length,
            "block": block,
            "budget_blocks": num_blocks,
        }
        result = distil.document(subject, sequences, options, losses, before=before, after=after)
        figures.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {figures}")


def _lines(before: "Quality", after: "Quality") -> list[str]:
    """What was held out, in words: of the best blocks and of the attention, how much is found."""
    return [
        f"  best blocks found: {after.gate_recall:.1%} by the gates ({before.gate_recall:.1%} untrained), "
        f"{after.bound_recall:.1%} by Quest's bound",
        f"  attention read: {after.gate_mass:.1%} by the gates ({before.gate_mass:.1%} untrained), "
        f"{after.bound_mass:.1%} by the bound, {after.fine_bound_mass:.1%} by the bound over blocks of 16, "
        f"{after.recent_mass:.1%} by the newest, {after.best_mass:.1%} by the best blocks",
    ]

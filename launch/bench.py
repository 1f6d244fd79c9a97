"""`paceline bench`: measurements that prove what they time, beside a baseline from the same invocation and machine."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

app = typer.Typer(help="Measure Paceline against its peers.")

Json = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Where the results go.")]

LOG_WIDTH = 160


@app.callback()
def bench() -> None:
    """Measure Paceline against its peers."""


@app.command()
def curve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Writes OUT.json and OUT.png.")],
) -> None:
    """Keep a run's learning curve: every step and evaluation as JSON, and a picture."""
    from launch import curve as learning

    result = {"command": f"paceline bench curve {run} {out}"} | learning.curve(run)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    learning.draw(result, out.with_suffix(".png"))
    print(f"wrote {out.with_suffix('.json')} and {out.with_suffix('.png')}")


@app.command()
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
    _show(result, bench_loop.table(result), out)


def _show(result: dict[str, Any], table: Any, out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    # a pipe has no width of its own, and cut columns would be of no use in a log
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


if __name__ == "__main__":
    app()

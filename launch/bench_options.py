"""What the commands of `paceline bench` share: options, checks before a measurement, the way results go out."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from configs.errors import ConfigError, PacelineError, StorageError

if TYPE_CHECKING:
    from configs.schema import SparseConfig
    from launch.bench_peer import PeerChoice

Geometry = Annotated[str | None, typer.Option(metavar="NAME", help="A known shape, random weights: qwen3-8b, ...")]
Geometries = Annotated[str, typer.Option(metavar="NAMES", help="Known shapes, random weights: smollm2-135m,qwen3-8b")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="A model folder or a shipped name instead.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: the GPU where there is one.")]
Dtype = Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help="auto: bfloat16 on a GPU.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times every figure is measured.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, prompts and noise.")]
Vllm = Annotated[Literal["vllm"] | None, typer.Option(help="Measure this peer in a child process, in turns with us.")]
PeerPython = Annotated[Path, typer.Option(metavar="PATH", help="Python of an environment that has the peer.")]
PeerMemory = Annotated[float, typer.Option(min=0.05, max=0.95, help="Share of the GPU's memory the peer may take.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Where the results go.")]

# options by their parameters' names, and the config's keys that they stand for
STANDS_FOR = {
    "model": "model",
    "device": "compute.device",
    "dtype": "compute.dtype",
    "gate": "sparse.gate",
    "block": "sparse.select_block",
    "weights": "sparse.weights",
    "modes": "sparse.mode",
    "drafter": "drafter.init",
}
PYTHON = Path(sys.executable)
ANY_WIDTH = 1000
GATE_FP8 = "gate-fp8"  # to benchmarks, which compare them, gates under sparse.descriptors=fp8 are another selector
BY_GATES = ("gate", GATE_FP8)


def in_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose errors name its options where they would name the keys that these stand for.

    One that takes keys as well leaves what they can set as it is, but for the model and where it is.
    """
    given = signature(command).parameters
    named = STANDS_FOR.keys() & given.keys()
    if "overrides" in given:
        named &= {"model", "device", "dtype"}

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except PacelineError as error:
            text = str(error)
            for name in named:
                text = re.sub(rf"\b{re.escape(STANDS_FOR[name])}=", f"--{name} ", text)
                if name != "model":  # of which there are others
                    text = re.sub(rf"\b{re.escape(STANDS_FOR[name])}\b", f"--{name}", text)
            error.args = (text,)
            raise

    return run


def numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated list, in order. Raises ConfigError."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{option} {text!r}: give different positive numbers with commas between, as in 1,8,32")
    return numbers


def picking_by(named: str, sparse: "SparseConfig", **others: Any) -> "SparseConfig":
    """What a selector's name in a benchmark means. others: further fields that change."""
    others |= {"selector": "gate", "descriptors": "fp8"} if named == GATE_FP8 else {"selector": named}
    return replace(sparse, **others)


def named_by(sparse: "SparseConfig") -> str:
    """A selector's name in a benchmark."""
    return GATE_FP8 if sparse.descriptors == "fp8" else sparse.selector


def require_budget(option: str, sparse: "SparseConfig") -> None:
    """Raise ConfigError for a budget that the selector does not keep to, as it always reads more."""
    if sparse.budget_tokens < (least := sparse.least_tokens):
        raise ConfigError(
            f"{option} {sparse.budget_tokens}: {sparse.selector} reads {least} tokens in any case; give {least} or more"
        )


def require_part(said: str, budget: int, tokens: int, remedy: str) -> None:
    """Raise ConfigError for a budget, in the words it was given in, that is all of a text of so many tokens."""
    if budget >= tokens:
        raise ConfigError(f"{said} is all of {tokens} tokens, and nothing is left to pick; {remedy}")


def names(option: str, text: str) -> tuple[str, ...]:
    """The names of a comma-separated list, in order. Raises ConfigError."""
    found = tuple(text.split(","))
    if not all(found) or len(set(found)) < len(found):
        raise ConfigError(f"{option} {text!r}: give different names with commas between")
    return found


def prepare(
    out: Path | None, peer: str | None = None, python: Path = PYTHON, memory: float = 0.0
) -> "PeerChoice | None":
    """What comes before the first heavy import; the peer that was asked for. Raises PreflightError, StorageError."""
    from launch.bench_peer import PeerChoice, require_peer
    from launch.logs import check_kernels, disable_progress_bars, quiet_libraries

    require_writable("--json", out)
    check_kernels()
    quiet_libraries()
    disable_progress_bars()
    if peer is None:
        return None
    require_peer(python, peer)
    return PeerChoice(peer, python, memory)


def require_writable(option: str, out: Path | None) -> None:
    """Make the folder of a result before it is measured. Raises StorageError where the result could not be written."""
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{option} {out}: its folder cannot be made ({error}); give another") from error
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise StorageError(f"{option} {out}: cannot be written; name a file in a folder of yours")


def show(result: dict[str, Any], table: Any, out: Path | None) -> None:
    """Print the table, however wide, and write the result: columns that a narrow terminal cuts would be lost."""
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=ANY_WIDTH)).maximum
    Console(width=max(console.width, needed)).print(table)
    write(result, out)


def write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

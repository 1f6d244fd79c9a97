"""What `paceline drafter eval` shows and writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.bench_report import provenance
from launch.subject import Subject


def tables(measured: Sequence[dict[str, Any]]) -> list[Table]:
    """Accept length and acceptance by draft position, a row a temperature; then by position in the response."""
    depth = measured[0]["depth"]
    overall = Table(box=SIMPLE_HEAD, title="accepted up to each drafted token")
    for name in ("temperature", "drafts", "accept length", *(f"+{d + 1}" for d in range(depth))):
        overall.add_column(name, justify="right")
    for one in measured:
        length = "-" if one["accept_length"] is None else f"{one['accept_length']:.2f}"
        shares = [f"{share:.1%}" for share in one["by_depth"]]
        overall.add_row(f"{one['temperature']:g}", str(one["drafts"]), length, *shares)
    places = Table(box=SIMPLE_HEAD, title="accept length by response tokens before the draft")
    places.add_column("temperature", justify="right")
    bands = sorted({(band["from"], band["to"]) for one in measured for band in one["by_place"]})
    for low, high in bands:
        places.add_column(f"{low}-{high - 1}", justify="right")
    for one in measured:
        lengths = {band["from"]: f"{band['accept_length']:.2f}" for band in one["by_place"]}
        places.add_row(f"{one['temperature']:g}", *(lengths.get(low, "-") for low, _ in bands))
    return [overall, places]


def document(
    subject: Subject, folder: Path | None, measured: Sequence[dict[str, Any]], *, prompts: int, context: str
) -> dict[str, Any]:
    """The results as JSON, with what they were measured on."""
    config = subject.config
    return {
        "policy": config.model,
        "run": str(subject.run) if subject.run else None,
        "step": subject.step,
        "drafter": str(folder) if folder else None,
        "prompts": prompts,
        "max_new_tokens": config.rollout.max_new_tokens,
        "context": context,
        "temperatures": list(measured),
        "environment": provenance(device=str(subject.device), seed=config.run.seed),
    }

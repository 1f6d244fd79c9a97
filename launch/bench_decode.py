"""Milliseconds per decode step by batch size, ours and a peer's in turns, against the limits that were set for us."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.agreement import verify
from launch.bench_peer import PeerChoice, running
from launch.bench_report import plain_table, provenance, shape, spread
from launch.bench_rollout import SHORT, Contender, Ours, step_ms
from launch.geometry import Subject

# Our step over vLLM 0.26.0's at most, by geometry and batch size (issue 3); DEFAULT_LIMIT elsewhere.
LIMITS = {
    "smollm2-135m": {1: 0.6, 8: 0.6},
    "qwen3-1.7b": {1: 0.75, 8: 0.75},
    "qwen3-8b": {1: 0.9, 8: 0.9, 32: 0.9},
}
DEFAULT_LIMIT = 1.0
# what the peer makes itself ready for at least, as when its table in issue 3 was measured
PEER_LEN, PEER_SEQS = 1024, 512


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: prompts of prompt_len random tokens, a step being the mean of new_tokens, rounds times."""

    batches: tuple[int, ...]
    prompt_len: int
    new_tokens: int
    rounds: int
    seed: int

    @property
    def tokens_each(self) -> int:
        """The longest a sequence becomes."""
        return self.prompt_len + SHORT + self.new_tokens


def run(subject: Subject, job: Job, *, peer: PeerChoice | None) -> dict[str, Any]:
    """Verify our engine, then time both sides at every batch size; JSON-able."""
    model = subject.model
    found = provenance(device=str(model.device), seed=job.seed)
    max_running = max(job.batches)
    ours = Ours(model, max_running=max_running, tokens_each=job.tokens_each)
    drift = verify(ours.engine, model, seed=job.seed)
    with running(
        peer, subject, max_len=max(PEER_LEN, job.tokens_each), max_num_seqs=max(PEER_SEQS, max_running)
    ) as other:
        sides: list[Contender] = [ours] if other is None else [ours, other]
        cells = [_cell(sides, batch, job, subject.name) for batch in job.batches]
        about_peer = None if other is None else other.ready
    return {
        "what": "milliseconds per decode step",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "verified": drift,
        "peer": about_peer,
        "cells": cells,
    }


def _cell(sides: Sequence[Contender], batch: int, job: Job, name: str) -> dict[str, Any]:
    """One batch size. The first round is for compiling and capturing; sides take turns, another first each round."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(job.rounds + 1):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            seed = job.seed + 1000 * batch + number
            times[side.name].append(
                step_ms(side, batch=batch, prompt_len=job.prompt_len, new_tokens=job.new_tokens, seed=seed)
            )
    cell: dict[str, Any] = {"batch": batch}
    for side in sides:
        step = spread(times[side.name][1:])
        cell[side.name] = {"step_ms": step, "tokens_per_s": batch / step["median"] * 1e3}
    if len(sides) > 1:
        peer = sides[1].name
        cell["ratio"] = cell["paceline"]["step_ms"]["median"] / cell[peer]["step_ms"]["median"]
        cell["limit"] = LIMITS.get(name, {}).get(batch, DEFAULT_LIMIT)
    Console(file=sys.stderr).print(f"batch {batch}: {_figures(cell)}", highlight=False)
    return cell


def _figures(cell: dict[str, Any]) -> str:
    return ", ".join(
        f"{side} {cell[side]['step_ms']['median']:.3f} ms" for side in ("paceline", "vllm") if side in cell
    )


def table(result: dict[str, Any]) -> Table:
    """Ours and the peer's step by batch size; the ratio that was asked and the one we got."""
    peer = result["peer"] is not None
    title = f"{result['what']}, {result['model']}, {result['shape']['dtype']}"
    if result["gpu"]:
        title += f", {result['gpu']['name']}"
    headings = ["batch", "ours", "min", "max", "tok/s", "weights GB/s"]
    shown = plain_table(title, headings + (["vllm", "min", "max", "asked", "got"] if peer else []))
    for cell in result["cells"]:
        ours = cell["paceline"]["step_ms"]
        rate = result["shape"]["step_weight_bytes"] / ours["median"] / 1e6
        row = [str(cell["batch"]), *_spread(ours), f"{cell['paceline']['tokens_per_s']:.0f}", f"{rate:.0f}"]
        if peer:
            missed = "" if cell["ratio"] <= cell["limit"] else " missed"
            row += [*_spread(cell["vllm"]["step_ms"]), f"{cell['limit']:.2f}", f"{cell['ratio']:.2f}{missed}"]
        shown.add_row(*row)
    return shown


def _spread(values: dict[str, Any]) -> list[str]:
    return [f"{values[name]:.3f}" for name in ("median", "min", "max")]

"""Milliseconds per decode step by batch size, ours and a peer's in turns, against the limits that were set for us."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig

from launch.agreement import verify
from launch.bench_peer import Peer, PeerChoice, running
from launch.bench_report import in_turns, plain_table, provenance, say, shape, spread
from launch.bench_rollout import BLOCK_SIZE, SHORT, Contender, Ours, step_ms
from launch.geometry import Device, Dtype, Subject, geometry, placement
from rollout.model import bytes_per_block

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


def run(
    geometries: Sequence[str],
    model: str | None,
    job: Job,
    *,
    device: Device,
    dtype: Dtype,
    peer: PeerChoice | None,
) -> dict[str, Any]:
    """Time every geometry, or the one model; JSON-able.

    Peers take a minute to stand: those of all geometries start at once, before anything is timed.
    """
    with ExitStack() as stack:
        waiting = {name: stack.enter_context(_peer(peer, geometry(name), job)) for name in geometries}
        for other in waiting.values():
            if other is not None:
                assert other.ready
        found = provenance(device=placement(device, dtype)[0], seed=job.seed)
        models = []
        for name in (*geometries, *([model] if model else [])):
            subject = Subject.load(name if name in waiting else None, model, device=device, dtype=dtype, seed=job.seed)
            other = waiting.pop(name, None) or stack.enter_context(_peer(peer, subject.source, job))
            models.append(_model(subject, other, job))
            if other is not None:
                other.close()  # its memory is wanted by the next
            del subject
    return {"what": "milliseconds per decode step", **found, **asdict(job), "models": models}


def _peer(choice: PeerChoice | None, model: PretrainedConfig | Path, job: Job) -> AbstractContextManager[Peer | None]:
    kv_bytes = None
    if isinstance(model, PretrainedConfig):  # one of several, which cannot all measure what memory is left
        each = -(-job.tokens_each // BLOCK_SIZE) + 1
        blocks = max(each * max(job.batches), 2 * PEER_LEN // BLOCK_SIZE)
        kv_bytes = blocks * bytes_per_block(model, BLOCK_SIZE, torch.bfloat16)
    return running(
        choice,
        model,
        max_len=max(PEER_LEN, job.tokens_each),
        max_num_seqs=max(PEER_SEQS, *job.batches),
        kv_bytes=kv_bytes,
    )


def _model(subject: Subject, other: Peer | None, job: Job) -> dict[str, Any]:
    """Verify our engine, then time both sides at every batch size."""
    ours = Ours(subject.model, max_running=max(job.batches), tokens_each=job.tokens_each)
    drift = verify(ours.engine, subject.model, seed=job.seed)
    sides: list[Contender] = [ours] if other is None else [ours, other]
    return {
        "model": subject.name,
        "shape": shape(subject.model),
        "verified": drift,
        "peer": None if other is None else other.ready,
        "cells": [_cell(sides, batch, job, subject.name) for batch in job.batches],
    }


def _cell(sides: Sequence[Contender], batch: int, job: Job, name: str) -> dict[str, Any]:
    """One batch size."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number, side in in_turns(sides, job.rounds):
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
    say(f"batch {batch}: {_figures(cell)}")
    return cell


def _figures(cell: dict[str, Any]) -> str:
    return ", ".join(
        f"{side} {cell[side]['step_ms']['median']:.3f} ms" for side in ("paceline", "vllm") if side in cell
    )


def table(result: dict[str, Any]) -> Table:
    """Ours and the peer's step by model and batch size; the ratio that was asked and the one we got."""
    peer = result["models"][0]["peer"] is not None
    title = f"{result['what']}, {result['models'][0]['shape']['dtype']}"
    if result["gpu"]:
        title += f", {result['gpu']['name']}"
    headings = ["model", "batch", "ours", "min", "max", "tok/s", "weights GB/s"]
    shown = plain_table(title, headings + (["vllm", "min", "max", "asked", "got"] if peer else []))
    for model in result["models"]:
        for cell in model["cells"]:
            ours = cell["paceline"]["step_ms"]
            rate = model["shape"]["step_weight_bytes"] / ours["median"] / 1e6
            row = [model["model"], str(cell["batch"]), *_spread(ours)]
            row += [f"{cell['paceline']['tokens_per_s']:.0f}", f"{rate:.0f}"]
            if peer:
                missed = "" if cell["ratio"] <= cell["limit"] else " missed"
                row += [*_spread(cell["vllm"]["step_ms"]), f"{cell['limit']:.2f}", f"{cell['ratio']:.2f}{missed}"]
            shown.add_row(*row)
        shown.add_section()
    return shown


def _spread(values: dict[str, Any]) -> list[str]:
    return [f"{values[name]:.3f}" for name in ("median", "min", "max")]

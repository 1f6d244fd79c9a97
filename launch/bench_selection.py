"""Quality of selection on a real model: what selectors leave of its attention and of what it says, by budget.

At the last places of natural texts, whose keys and values are dense, each selector's forward of the place's token is
held against the dense one: what share of the attention the picked blocks carry, how far the distribution of the next
token moves, and how often the same noise draws the same token from both: the rate at which drafts are accepted.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError
from configs.schema import SparseConfig
from kernels.attention import PackedSequences
from kernels.sample import noise_key, sample
from launch.agreement import divergence
from launch.bench_options import BY_GATES, picking_by, require_budget, require_part
from launch.bench_report import WrongResultError, plain_table, provenance, say, shape
from launch.geometry import Subject
from launch.teacher_forced import BLOCK_SIZE, Forced, Places
from launch.weighed import BEST, Side, Weighed
from rollout.model import context_length, forward_packed
from rollout.selectors import make_sparse, require_sparse

KNOWN = ("quest", "mean", "streaming", "verified", *BY_GATES, BEST, "resa")  # the last is the first by another name
ROWS = 64  # places of a text forwarded at once
# nats by which a dense forward may differ from training's, and one that reads everything from a dense one
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: the last `places` of batch texts of so many tokens, noise drawn so many times.

    sparse: how selectors pick, but for their name and their budget; its depth is what a dense verification serves for.
    """

    batch: int
    tokens: int
    places: int
    draws: int
    selectors: tuple[str, ...]
    budgets: tuple[int, ...]
    sparse: SparseConfig
    seed: int


def run(subject: Subject, job: Job, *, name: str, pieces: list[list[int]]) -> dict[str, Any]:
    """Measure every selector under every budget; JSON-able. pieces: the texts, of what has this name.

    Of a job that was held against the model's config. Raises WrongResultError.
    """
    model = subject.model
    texts = torch.tensor(pieces, device=model.device)
    found = provenance(device=str(model.device), seed=job.seed)
    sides = [make_side(job, model, selector, budget) for budget in job.budgets for selector in job.selectors]
    everything = make_side(job, model, "quest", _everything(job))
    attentions = [side.sparse for side in (*sides, everything)]
    forced = Forced(model, texts, attentions, num_rows=ROWS, window=job.sparse.depth)
    first = job.tokens - 1 - job.places
    proven = prove(model, forced, everything, first, min(ROWS, job.places))
    totals = {side: Totals() for side in sides}
    for text in range(job.batch):
        for begin in range(first, first + job.places, ROWS):
            places = forced.places(text, begin, min(ROWS, first + job.places - begin))
            measure(forced, places, totals, job, text)
        say(f"text {text + 1} of {job.batch}: " + ", ".join(_line(side, totals[side]) for side in sides))
    return {
        "what": "quality of selection",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "text": name,
        "first_place": first,
        "verified": proven,
        "cells": [totals[side].cell(side) for side in sides],
    }


def require(job: Job) -> None:
    """Hold what was asked against what there is, before a model is looked for. Raises ConfigError."""
    if "duo" in job.selectors:
        raise ConfigError(
            "--selectors duo: it picks heads, by a calibration of their own, and no blocks by budget;"
            " `paceline bench sparse-rollout --selectors duo --gate FILE` measures it"
        )
    if unknown := [each for each in job.selectors if each not in KNOWN]:
        raise ConfigError(f"--selectors: {unknown[0]!r} is none of {', '.join(KNOWN)}")
    gated = [each for each in job.selectors if each in BY_GATES]
    if gated and not job.sparse.gate:
        raise ConfigError(f"--selectors {gated[0]} needs --gate FOLDER, as `paceline gate train` writes it")
    if job.sparse.gate and not gated:
        raise ConfigError(f"--gate {job.sparse.gate}: nobody reads it; add gate to --selectors, or leave it out")
    if job.tokens <= job.places + job.sparse.depth + 1:
        raise ConfigError(f"--tokens {job.tokens} leaves nothing before the last --places {job.places}; give more")
    for budget in job.budgets:
        require_part(f"--budgets {budget}", budget, job.tokens, "give less, or more --tokens")
        for selector in job.selectors:
            config = config_of(job, selector, budget)
            if BLOCK_SIZE % config.block_tokens:
                raise ConfigError(f"--block {config.block_tokens} does not divide {BLOCK_SIZE}; give 16, 32 or 64")
            require_budget("--budgets", config)


def require_fit(job: Job, model_config: PretrainedConfig) -> None:
    """Hold the job against a model's config, before its weights are read. Raises ConfigError, PreflightError."""
    if job.tokens > (limit := context_length(model_config)):
        raise ConfigError(f"--tokens {job.tokens} exceeds the model's context of {limit}; give fewer")
    if job.sparse.dense_layers >= (count := model_config.get_text_config().num_hidden_layers):
        raise ConfigError(
            f"--dense-layers {job.sparse.dense_layers}: no layer of {count} is left to select in; give fewer"
        )
    for selector in job.selectors:
        require_sparse(config_of(job, selector, job.budgets[0]), model_config)


def config_of(job: Job, selector: str, budget: int) -> SparseConfig:
    """How one selector picks under one budget."""
    named = "quest" if selector == BEST else selector
    return picking_by(named, job.sparse, budget_tokens=budget, gate=job.sparse.gate if named in BY_GATES else "")


def make_side(job: Job, model: PreTrainedModel, selector: str, budget: int) -> Side:
    """One selector under one budget."""
    config = config_of(job, selector, budget)
    return Side(selector, config, make_sparse(config, model))


def _everything(job: Job) -> int:
    return -(-job.tokens // BLOCK_SIZE) * BLOCK_SIZE


@torch.inference_mode()
def prove(model: PreTrainedModel, forced: Forced, everything: Side, first: int, count: int) -> dict[str, float]:
    """Dense places say what the training forward says, and a selector that may read everything changes nothing.

    Returns both divergences in nats, and the mass kept; raises WrongResultError.
    """
    places = forced.places(0, first, count)
    dense = forced.logits(places, None)
    weighed = Weighed(everything, places)
    whole = forced.logits(places, weighed)
    tokens = forced.texts[0, : first + count]
    index = torch.arange(len(tokens), device=tokens.device)
    seqs = PackedSequences(torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device), len(tokens))
    trained = forward_packed(model, tokens, index, seqs, index[first:])
    found = {
        "kl_of_training": float(divergence(trained, dense).mean()),
        "kl_of_everything": float(divergence(dense, whole).mean()),
        "mass_of_everything": min(weighed.mass.values(), default=1.0),
    }
    allowed = TOLERANCE[model.dtype]
    # written so that NaN fails
    if not (max(found["kl_of_training"], found["kl_of_everything"]) <= allowed and found["mass_of_everything"] > 0.999):
        raise WrongResultError(
            f"dense places differ from the training forward by {found['kl_of_training']:.2g} nats, reading everything"
            f" from dense places by {found['kl_of_everything']:.2g} ({allowed:g} allowed), and it reads"
            f" {found['mass_of_everything']:.2%} of the attention"
        )
    return found


class Totals:
    """Sums over the places of one side."""

    def __init__(self) -> None:
        self.mass: dict[int, float] = {}
        self.kl: list[float] = []  # by place
        self.same = self.best = 0.0

    @property
    def places(self) -> int:
        """Measured so far."""
        return len(self.kl)

    def add(self, weighed: Weighed, kl: list[float], *, same: float, best: float) -> None:
        """Some places: nats of each; equal draws and equal best tokens, summed over them."""
        for layer, mass in weighed.mass.items():
            self.mass[layer] = self.mass.get(layer, 0.0) + mass * len(kl)
        self.kl += kl
        self.same, self.best = self.same + same, self.best + best

    def cell(self, side: Side) -> dict[str, Any]:
        """Means over places; of attention also the layer that keeps least."""
        mass = {layer: total / self.places for layer, total in self.mass.items()}
        worst = min(mass, key=lambda layer: mass[layer])
        return {
            "selector": side.selector,
            "budget": side.config.budget_tokens,
            "select_block": side.config.block_tokens,
            "places": self.places,
            "mass": sum(mass.values()) / len(mass),
            "mass_of_worst_layer": mass[worst],
            "worst_layer": worst,
            "kl": sum(self.kl) / self.places,
            # few places, which need what was left out, make most of the mean
            "kl_median": statistics.median(self.kl),
            "kl_p90": sorted(self.kl)[int(0.9 * (self.places - 1))],
            "accept": self.same / self.places,
            "top1": self.best / self.places,
        }


@torch.inference_mode()
def measure(forced: Forced, places: Places, totals: dict[Side, Totals], job: Job, text: int) -> None:
    """Forward some places densely, then under every side, and add what differs."""
    dense = forced.logits(places, None)
    keys = [
        torch.full_like(places.positions, noise_key(seed=job.seed, step=number, prompt_id="selection", sample=text))
        for number in range(job.draws)
    ]
    drawn = [draw(dense, key, places.positions + 1) for key in keys]
    for side, total in totals.items():
        weighed = Weighed(side, places)
        logits = forced.logits(places, weighed)
        same = [
            draw(logits, key, places.positions + 1) == dense_draw for key, dense_draw in zip(keys, drawn, strict=True)
        ]
        total.add(
            weighed,
            divergence(dense, logits).tolist(),
            same=float(torch.stack(same).float().mean(dim=0).sum()),
            best=float((logits.argmax(dim=1) == dense.argmax(dim=1)).sum()),
        )


def draw(logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the noise of these keys draws at temperature 1, [R] int64."""
    return sample(logits, keys, positions, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)[0]


def _line(side: Side, totals: Totals) -> str:
    return f"{side.selector} {side.config.budget_tokens}: {totals.same / totals.places:.3f}"


def table(result: dict[str, Any]) -> Table:
    """A line a selector and budget."""
    title = (
        f"{result['what']}, {result['model']}, {result['shape']['dtype']}: {result['batch']} texts of"
        f" {result['tokens']} tokens, the last {result['places']} places"
    )
    headings = [
        "budget",
        "selector",
        "block",
        "attention kept",
        "worst layer",
        "KL, nats",
        "median",
        "p90",
        "accepted",
        "same best",
    ]
    shown = plain_table(title, headings)
    cells: Sequence[dict[str, Any]] = result["cells"]
    for budget in result["budgets"]:
        for cell in (cell for cell in cells if cell["budget"] == budget):
            shown.add_row(
                str(budget),
                cell["selector"],
                str(cell["select_block"]),
                f"{cell['mass']:.3f}",
                f"{cell['mass_of_worst_layer']:.3f} ({cell['worst_layer']})",
                *(f"{cell[name]:.4f}" for name in ("kl", "kl_median", "kl_p90")),
                f"{cell['accept']:.3f}",
                f"{cell['top1']:.3f}",
            )
        shown.add_section()
    return shown

"""Rollouts with drafts and without, token by token, and both against the training forward: what differs, and why."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from drafter.types import OFF
from launch.agreement import drift, score, verify
from launch.bench_report import plain_table, provenance, shape
from launch.bench_rollout import SPECULATIVE, Switch, generate, make_engine, ngram_drafter, sampling, subject_prompts
from launch.geometry import Subject
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Job:
    """What is sampled: prompts times samples rollouts of at most new_tokens tokens."""

    prompts: int
    samples: int
    new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two rollouts of one identity first differ, and how near the training forward says the choice was.

    gap: by how much the best token's log-prob plus noise wins there. tie: whether the two rollouts took its best two.
    """

    prompt_id: str
    sample: int
    index: int
    gap: float
    tie: bool


def run(subject: Subject, job: Job) -> dict[str, Any]:
    """Sample everything without drafts, then with, on one engine; JSON-able. Raises WrongResultError.

    The drafter has seen the first rollouts when it drafts the second ones: its drafts are long and mostly right, so
    that nearly every token comes out of a verification, and where rounding parts two texts wrong drafts follow.
    """
    model = subject.model
    found = provenance(device=str(model.device), seed=job.seed)
    prompts = subject_prompts(subject, job.prompts, seed=job.seed)
    longest = max(len(prompt.token_ids) for prompt in prompts) + job.new_tokens
    plain, drafting = FixedChooser(OFF), FixedChooser(SPECULATIVE)
    chooser = Switch(plain, drafting)
    engine = make_engine(
        model,
        max_running=job.prompts * job.samples,
        tokens_each=longest,
        chooser=chooser,
        drafter=ngram_drafter(),
    )
    for chooser.now in (drafting, plain):
        verify(engine, model, seed=job.seed)
    how = sampling(job.new_tokens, seed=job.seed, num_samples=job.samples, stop_token_ids=subject.stop_token_ids())
    sides: dict[str, dict[Key, Rollout]] = {}
    for name, now in (("off", plain), ("on", drafting)):
        chooser.now = now
        engine.update(engine.version)  # no cached prefix: prompts are computed in the same batches on both sides
        sides[name] = {(r.prompt_id, r.sample): r for r in generate(engine, prompts, how).rollouts}
    drifts = {name: drift(model, prompts, list(side.values()), how) for name, side in sides.items()}
    divergences = diverge(model, prompts, sides["off"], sides["on"], how)
    return {
        "what": "agreement of rollouts",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "strategy": asdict(SPECULATIVE),
        "tokens_a_forward": {name: _tokens_a_forward(side.values()) for name, side in sides.items()},
        "drift": drifts,
        **summary(sides["off"], sides["on"], divergences),
    }


def diverge(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    off: dict[Key, Rollout],
    on: dict[Key, Rollout],
    sampling: Sampling,
) -> list[Divergence]:
    """The first difference of every pair of rollouts that differ."""
    by_id = {prompt.id: prompt for prompt in prompts}
    found = []
    for key, plain in off.items():
        drafted = on[key]
        pairs = enumerate(zip(plain.token_ids, drafted.token_ids, strict=False))
        index = next((index for index, (a, b) in pairs if a != b), None)
        if index is None:
            assert len(plain.token_ids) == len(drafted.token_ids), "equal tokens end at the same place"
            continue
        scored = score(model, by_id[key[0]], plain, sampling)
        best_two = {int(scored.best[index]), int(scored.second[index])}
        tie = {plain.token_ids[index], drafted.token_ids[index]} == best_two
        found.append(Divergence(*key, index=index, gap=float(scored.gap[index]), tie=tie))
    return found


def summary(off: dict[Key, Rollout], on: dict[Key, Rollout], divergences: Sequence[Divergence]) -> dict[str, Any]:
    """How many tokens agree before rollouts part, and how near the choices were where they did.

    compared: tokens up to and with each pair's first difference, after which two texts have nothing in common.
    """
    parted = {(d.prompt_id, d.sample): d.index for d in divergences}
    compared = sum(parted[key] + 1 if key in parted else len(rollout.token_ids) for key, rollout in off.items())
    gaps = torch.tensor([d.gap for d in divergences])
    return {
        "compared": compared,
        "agreement": 1 - len(divergences) / max(compared, 1),
        "rollouts": len(off),
        "rollouts_equal": sum(rollout.token_ids == on[key].token_ids for key, rollout in off.items()),
        "between_best_two": sum(d.tie for d in divergences),
        "gap_median": float(gaps.median()) if len(gaps) else None,
        "gap_max": float(gaps.max()) if len(gaps) else None,
        "divergences": [asdict(d) for d in divergences],
    }


def _tokens_a_forward(rollouts: Any) -> float:
    """Tokens committed a forward, over all rollouts."""
    listed = list(rollouts)
    return sum(len(r.token_ids) for r in listed) / max(1, sum(r.spec.forwards for r in listed))


def table(result: dict[str, Any]) -> Table:
    """Drift and agreement, a line each."""
    shown = plain_table(f"{result['what']}, {result['model']}, {result['shape']['dtype']}", ["", "off", "on"])
    drifts = result["drift"]
    for name, heading in (("mean", "log-prob drift, mean"), ("p99", "p99"), ("max", "max")):
        shown.add_row(heading, *(f"{drifts[side][name]:.2g}" for side in ("off", "on")))
    shown.add_row("same draw as the training forward", *(f"{drifts[side]['agreement']:.3%}" for side in ("off", "on")))
    shown.add_row("tokens", *(str(drifts[side]["tokens"]) for side in ("off", "on")))
    shown.add_row("tokens a forward", *(f"{result['tokens_a_forward'][side]:.2f}" for side in ("off", "on")))
    shown.add_row("on = off, tokens until they part", "", f"{result['agreement']:.3%}")
    shown.add_row("rollouts equal to the end", "", f"{result['rollouts_equal']} of {result['rollouts']}")
    if parted := len(result["divergences"]):
        shown.add_row("parted between the best two", "", f"{result['between_best_two']} of {parted}")
        shown.add_row("gap there, median and max", "", f"{result['gap_median']:.2g}, {result['gap_max']:.2g}")
    return shown

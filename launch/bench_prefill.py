"""Tokens per second of prompt processing by prompt length: ours, the transformers module with SDPA, and a peer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from configs.errors import ConfigError
from launch.agreement import verify
from launch.bench_peer import PeerChoice, running
from launch.bench_report import in_turns, plain_table, provenance, shape, spread
from launch.bench_rollout import Contender, Ours, synchronize
from launch.geometry import Subject
from rollout.model import ATTENTION, context_length


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: as many prompts of each length as make up about total_tokens, at least one."""

    lengths: tuple[int, ...]
    total_tokens: int
    rounds: int
    seed: int

    def batch(self, length: int) -> int:
        """Prompts of this length."""
        return max(1, self.total_tokens // length)


class Module:
    """The transformers module as a contender: SDPA, a dynamic cache, the last token's logits."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def seconds(self, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
        """As Contender says, for one new token."""
        assert new_tokens == 1
        torch.manual_seed(seed)
        vocab_size = self.model.config.get_text_config().vocab_size
        token_ids = torch.randint(vocab_size, (batch, prompt_len), device=self.model.device)
        with _sdpa(self.model):
            synchronize()
            begun = perf_counter()
            logits = self.model(token_ids, use_cache=True, logits_to_keep=1).logits
            torch.multinomial(logits[:, -1].float().softmax(dim=1), 1).tolist()
            synchronize()
            return perf_counter() - begun


@contextmanager
def _sdpa(model: PreTrainedModel) -> Iterator[None]:
    """The module with torch's attention in place of ours."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


def run(subject: Subject, job: Job, *, peer: PeerChoice | None) -> dict[str, Any]:
    """Verify our engine, then time prompt and first token on every side at every length; JSON-able."""
    model = subject.model
    longest, context = max(job.lengths), context_length(model.config)
    if longest >= context:
        raise ConfigError(f"--lengths {longest}: the model's context is {context} tokens; go below")
    found = provenance(device=str(model.device), seed=job.seed)
    max_running = max(map(job.batch, job.lengths))
    # as many tokens as the fullest of the batches, spread over max_running sequences
    most = max(job.batch(length) * (length + 64) for length in job.lengths)
    ours = Ours(model, max_running=max_running, tokens_each=min(-(-most // max_running), context))
    drift = verify(ours.engine, model, seed=job.seed)
    with running(peer, subject.source, max_len=longest + 1, max_num_seqs=max_running) as other:
        sides: list[Contender] = [ours, Module(model), *([] if other is None else [other])]
        cells = [_cell(sides, length, job) for length in job.lengths]
        about_peer = None if other is None else other.ready
    return {
        "what": "tokens per second of prompt processing",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "verified": drift,
        "peer": about_peer,
        "cells": cells,
    }


def _cell(sides: Sequence[Contender], length: int, job: Job) -> dict[str, Any]:
    """One length."""
    batch = job.batch(length)
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for number, side in in_turns(sides, job.rounds):
        seconds = side.seconds(batch=batch, prompt_len=length, new_tokens=1, seed=job.seed + 1000 * length + number)
        rates[side.name].append(batch * length / seconds)
    return {"length": length, "batch": batch} | {name: spread(values[1:]) for name, values in rates.items()}


def table(result: dict[str, Any]) -> Table:
    """Every side's tokens per second by prompt length, and what ours is to the others'."""
    others = ["transformers", *(["vllm"] if result["peer"] else [])]
    title = f"{result['what']}, {result['model']}, {result['shape']['dtype']}"
    shown = plain_table(title, ["length", "prompts", "ours", "min", "max", *(x for o in others for x in (o, "gain"))])
    for cell in result["cells"]:
        ours = cell["paceline"]
        row = [str(cell["length"]), str(cell["batch"]), *(f"{ours[name]:.0f}" for name in ("median", "min", "max"))]
        for other in others:
            median = cell[other]["median"]
            row += [f"{median:.0f}", f"{ours['median'] / median:.2f}x"]
        shown.add_row(*row)
    return shown

"""What every benchmark's result holds beside its figures: medians with their spread, and where it was measured."""

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from rl.environment import environment

T = TypeVar("T")

COPY_BYTES = 1 << 30
COPY_ROUNDS = 10


class WrongResultError(RuntimeError):
    """What was to be timed computes something else than its definition: a bug, and no time is worth reporting."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest and all of some rounds' values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def provenance(*, device: str, seed: int) -> dict[str, Any]:
    """Command, commit, versions, processor and GPU, seed.

    PACELINE_COMMIT names the commit where the code came without its history, as to a machine without a network.
    """
    found = environment()
    found["commit"] = os.environ.get("PACELINE_COMMIT") or found["commit"]
    return found | {"gpu": gpu(device), "threads": torch.get_num_threads(), "seed": seed}


def gpu(device: str) -> dict[str, Any] | None:
    """The GPU's name and size, and its copy bandwidth now, in GB/s read and written; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "copy_gbps": spread(copy_gbps(device)),
    }


def copy_gbps(device: str) -> list[float]:
    """GB/s, read and written, of device-to-device copies far larger than the L2 cache; one value a round."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(COPY_ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        rates.append(2 * COPY_BYTES / begin.elapsed_time(end) / 1e6)
    return rates[1:]


def shape(model: PreTrainedModel) -> dict[str, Any]:
    """What of a model decides how fast it runs."""
    text = model.config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "type": text.model_type,
        **{name: getattr(text, name, None) for name in names},
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "vocab_size": text.vocab_size,
        "tied": bool(text.tie_word_embeddings),
        "dtype": str(model.dtype).removeprefix("torch."),
        "step_weight_bytes": step_weight_bytes(model),
    }


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one decode step reads: all but the input embedding, of which it reads a row a sequence."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if model.config.get_text_config().tie_word_embeddings:
        return total  # the same matrix makes the logits
    embedding = model.get_input_embeddings().weight
    return total - embedding.numel() * embedding.element_size()


def in_turns(sides: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Every side in each round, with the round's number; round 0, for compiling and capturing, comes on top of rounds.

    Each round begins with another side, so that a machine that warms up or fills up favours none.
    """
    for number in range(rounds + 1):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            yield number, side


def say(text: str) -> None:
    """Progress, on standard error."""
    Console(file=sys.stderr).print(text, highlight=False)


def plain_table(title: str, headings: Sequence[str]) -> Table:
    """An empty table of figures, its first column being what they belong to."""
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return shown

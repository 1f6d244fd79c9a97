"""Every kernel of a cycle against what torch offers for the same work, at the shapes of a model."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import PretrainedConfig

from configs.errors import ConfigError
from kernels.linear import gated_linear, gated_linear_reference, linear
from kernels.logprob import selected_logprobs
from kernels.sample import sample, sample_reference
from launch import bench_attention
from launch.bench_clock import compare, copies_for, row, times_us
from launch.bench_report import WrongResultError, plain_table, provenance, say
from launch.geometry import geometry

TIES = 0.02  # share of rows whose two best tokens may change places: sums are taken in another order


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured. attention: (batch, keys) each; tokens: rows of a product or a sampling; logprob_rows: T."""

    geometry: str
    device: str
    dtype: str
    attention: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    logprob_rows: int
    seed: int


def run(job: Job) -> dict[str, Any]:
    """Check each kernel against its definition or torch's, then time both; JSON-able.

    Raises ConfigError and WrongResultError.
    """
    config = geometry(job.geometry)
    verified = 1 + bench_attention.NUM_DRAFTED
    if any(keys < verified for _, keys in job.attention):
        raise ConfigError(f"--contexts: give at least {verified} keys each, the tokens that a verification adds")
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    found = provenance(device=job.device, seed=job.seed)
    torch.manual_seed(job.seed)
    heads = bench_attention.Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    sections = (
        bench_attention.rows(heads, list(job.attention), dtype=dtype, device=device),
        _linear(config, job.tokens, dtype=dtype, device=device),
        _sample(config.vocab_size, job.tokens, dtype=dtype, device=device),
        _logprob(config.vocab_size, job.logprob_rows, dtype=dtype, device=device),
    )
    cells = []
    for cell in itertools.chain(*sections):
        say(_line(cell))
        cells.append(cell)
    return {"what": "microseconds per kernel", **found, **asdict(job), "cells": cells}


def _linear(
    config: PretrainedConfig, tokens: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The products of a layer and the head, weights rotating, against cuBLAS."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    qkv = width + 2 * config.num_key_value_heads * config.head_dim
    shapes = {"qkv": (qkv, hidden), "o": (hidden, width), "down": (hidden, inner), "head": (config.vocab_size, hidden)}
    new = partial(torch.randn, dtype=dtype, device=device)
    for name, (num_out, num_in) in shapes.items():
        num_bytes = num_out * num_in * dtype.itemsize
        weights = [(new(num_out, num_in),) for _ in range(copies_for(num_bytes, device))]
        for count in tokens:
            x = new(count, num_in)
            ours, theirs = partial(linear, x), partial(F.linear, x)
            compare(ours(*weights[0]), theirs(*weights[0]), f"linear {name}, {count} tokens")
            us, baseline_us = (times_us(side, weights, device) for side in (ours, theirs))
            yield row(f"linear, {name}", f"{count} x {num_in} x {num_out}", num_bytes, us, baseline_us, "cuBLAS")
    num_bytes = 2 * inner * hidden * dtype.itemsize
    pairs = [new(2 * inner, hidden).chunk(2) for _ in range(copies_for(num_bytes, device))]
    for count in tokens:
        x = new(count, hidden)
        ours, theirs = partial(gated_linear, x), partial(gated_linear_reference, x)
        compare(ours(*pairs[0]), theirs(*pairs[0]), f"gated linear, {count} tokens")
        us, baseline_us = (times_us(side, pairs, device) for side in (ours, theirs))
        yield row("gated linear", f"{count} x {hidden} x 2 x {inner}", num_bytes, us, baseline_us, "cuBLAS, silu, mul")


def _sample(
    vocab_size: int, tokens: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Sampling with and without filters, against torch's in float32 and without."""
    for count in tokens:
        num_bytes = count * vocab_size * dtype.itemsize
        copies = copies_for(num_bytes, device)
        logits = [(3 * torch.randn(count, vocab_size, dtype=dtype, device=device),) for _ in range(copies)]
        keys = torch.randint(1 << 62, (count,), device=device)
        positions = torch.arange(count, device=device)
        theirs = times_us(_race, logits, device)
        for name, (top_k, top_p) in {"sample": (0, 1.0), "sample, top-k 50, top-p 0.95": (50, 0.95)}.items():
            how: dict[str, Any] = {"keys": keys, "positions": positions, "temperature": 1.0, "min_p": 0.0}
            how |= {"top_k": top_k, "top_p": top_p}
            drawn, wanted = sample(*logits[0], **how)[0], sample_reference(*logits[0], **how)[0]
            if int((drawn != wanted).sum()) > TIES * count:
                raise WrongResultError(f"{name}, {count} rows: other tokens than the definition's")
            ours = times_us(partial(sample, **how), logits, device)
            yield row(name, f"{count} x {vocab_size}", num_bytes, ours, theirs, "torch in float32")


def _race(logits: torch.Tensor) -> torch.Tensor:
    """A draw a row as torch.multinomial makes it, without its check, which waits for the device."""
    probs = logits.float().softmax(dim=1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=1)


def _logprob(vocab_size: int, num_rows: int, *, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Log-probs and entropy with their gradient, against log_softmax in float32."""
    logits = torch.randn(num_rows, vocab_size, dtype=dtype, device=device, requires_grad=True)
    token_ids = torch.randint(vocab_size, (num_rows,), device=device)

    def ours() -> torch.Tensor:
        logprobs, entropy = selected_logprobs(logits, token_ids, temperature=1.0)
        return torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)[0]

    def theirs() -> torch.Tensor:
        logp = torch.log_softmax(logits.float(), dim=1)
        entropy = -(logp.exp() * logp).sum(dim=1)
        return torch.autograd.grad(logp.gather(1, token_ids[:, None]).sum() + entropy.sum(), logits)[0]

    compare(ours(), theirs(), "the gradient of log-probs")
    num_bytes = 3 * num_rows * vocab_size * dtype.itemsize  # read forwards and backwards, and the gradient written
    us, baseline_us = (times_us(side, [()], device) for side in (ours, theirs))
    yield row("log-probs, gradient", f"{num_rows} x {vocab_size}", num_bytes, us, baseline_us, "torch")


def _line(cell: dict[str, Any]) -> str:
    return f"{cell['kernel']} {cell['size']}: {cell['us']['median']:.1f} us, {cell['ratio']:.2f} of {cell['baseline']}"


def table(result: dict[str, Any]) -> Table:
    """Microseconds, bandwidth and the baseline's, a line a kernel and shape."""
    copied = result["gpu"]["copy_gbps"]["median"] if result["gpu"] else None
    title = f"{result['what']}, {result['geometry']}, {result['dtype']}"
    if copied:
        title += f", {result['gpu']['name']}; a copy moves {copied:.0f} GB/s"
    headings = ["kernel", "shape", "us", "min", "max", "GB/s", "of copy", "baseline", "us", "asked", "got"]
    shown = plain_table(title, headings)
    for cell in result["cells"]:
        shown.add_row(
            cell["kernel"],
            cell["size"],
            *(f"{cell['us'][name]:.1f}" for name in ("median", "min", "max")),
            f"{cell['gbps']:.0f}",
            f"{cell['gbps'] / copied:.0%}" if copied else "",
            cell["baseline"],
            f"{cell['baseline_us']['median']:.1f}",
            f"{cell['limit']:.2f}" if "limit" in cell else "",
            f"{cell['ratio']:.2f}",
        )
    return shown

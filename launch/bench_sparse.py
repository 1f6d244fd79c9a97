"""Sparse decoding under the clock: picking blocks and attending to them, against every dense decode at hand.

The grid of SeerAttention-R (arXiv 2506.08889, fig. 7): one new token a sequence, contexts of 8 k to 128 k keys, the
share of blocks left out from 0.5 to 0.9. What is counted includes the selection, which the published figures leave out.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from configs.errors import ConfigError, PreflightError
from kernels.select import BlockLists, Choice, num_selection_blocks
from kernels.sparse_attention import sparse_attention
from launch.bench_attention import Heads
from launch.bench_clock import ROTATED_BYTES, ROUNDS, compare, copies_for, times_us
from launch.bench_report import plain_table, provenance, say, spread
from launch.sparse_operands import BLOCK_SIZE, SELECT_BLOCK, Operands, masked, operands

# Speed-ups over the fastest dense decode that issue 6 asks for at a sparsity of 0.9, by (batch, keys).
ASKED = {
    (16, 8192): 5.5,
    (16, 32768): 7.5,
    (16, 131072): 8.5,
    (4, 8192): 2.8,
    (4, 32768): 5.8,
    (4, 131072): 8.3,
    (1, 131072): 5.5,
}


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: every (batch, keys) at every share of blocks left out, blocks picked by each selector."""

    heads: Heads
    sizes: tuple[tuple[int, int], ...]
    sparsities: tuple[float, ...]
    selectors: tuple[str, ...]
    device: str
    dtype: str
    seed: int


def run(job: Job, *, fa3_python: Path | None) -> dict[str, Any]:
    """Check every sparse result against masked SDPA, then time all sides; JSON-able. Raises WrongResultError.

    fa3_python: a Python that has vLLM, for FlashAttention-3; None leaves it out.
    """
    if unknown := sorted(set(job.selectors) - set(SELECT_BLOCK)):
        raise ConfigError(f"--selectors: {unknown[0]!r} is none of {', '.join(SELECT_BLOCK)}")
    found = provenance(device=job.device, seed=job.seed)
    theirs = {} if fa3_python is None else fa3(job, fa3_python)
    torch.manual_seed(job.seed)
    cells = []
    for size in job.sizes:
        for cell in _cells(job, *size, fa3_us=theirs.get(size)):
            say(_line(cell))
            cells.append(cell)
    return {
        "what": "microseconds of one layer's sparse decode, selection included",
        **found,
        **asdict(job),
        "block_size": BLOCK_SIZE,
        "fa3": fa3_python is not None,
        "cells": cells,
    }


def _cells(job: Job, batch: int, length: int, *, fa3_us: list[float] | None) -> Iterator[dict[str, Any]]:
    """The grid of one batch and context. The dense sides are timed once for all of its lines."""
    device, dtype, heads = torch.device(job.device), getattr(torch, job.dtype), job.heads
    scale = heads.dim**-0.5
    kv_bytes = batch * length * 2 * heads.key * heads.dim * dtype.itemsize
    made = partial(operands, heads, batch, length, dtype=dtype, device=device)
    rotation = [(made("mean"),) for _ in range(copies_for(kv_bytes, device))]
    dense = {"ours": times_us(partial(Operands.dense, scale=scale), rotation, device)}
    sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    whole = [(o.query.view(batch, heads.query, 1, heads.dim), *o.whole()) for (o,) in rotation]
    compare(rotation[0][0].dense(scale), sdpa(*whole[0]).transpose(1, 2), f"dense decode, {batch} x {length}")
    dense["sdpa"] = times_us(sdpa, whole, device)
    del rotation, whole
    if fa3_us is not None:
        dense["fa3"] = fa3_us
    spreads = {name: spread(times) for name, times in dense.items()}
    fastest = min(spreads, key=lambda name: spreads[name]["median"])
    for selector in job.selectors:
        block = SELECT_BLOCK[selector]
        # by what the sparsest reads: none of it may be in the cache from the call before
        read = round(kv_bytes * (1 - max(job.sparsities)))
        rotation = [(made(selector),) for _ in range(copies_for(read, device))]
        for sparsity in job.sparsities:
            first = rotation[0][0]
            count = num_selection_blocks(first.seqs, block)
            kept = max(2, round(count * (1 - sparsity)))
            choice = Choice(max_blocks=kept, budget_blocks=kept)
            call = partial(Operands.sparse, choice=choice, select_block=block, scale=scale)
            lists = first.lists(choice, block)
            compare(call(first), masked(first, lists, scale), f"{selector}, {batch} x {length}, sparsity {sparsity}")
            # what is picked does not change from call to call: attention alone is timed over the same lists
            picked = [(o, o.lists(choice, block)) for (o,) in rotation]
            us = spread(times_us(call, rotation, device))
            yield {
                "batch": batch,
                "keys": length,
                "selector": selector,
                "select_block": block,
                "sparsity": sparsity,
                "blocks": kept,
                "us": us,
                "attention_us": spread(times_us(_attention(scale), picked, device)),
                "selection_us": spread(
                    times_us(partial(Operands.lists, choice=choice, select_block=block), rotation, device)
                ),
                "dense_us": spreads,
                "fastest": fastest,
                "speedup": spreads[fastest]["median"] / us["median"],
                "asked": ASKED.get((batch, length)) if sparsity == 0.9 else None,
            }
        del rotation


def _attention(scale: float) -> Callable[[Operands, BlockLists], torch.Tensor]:
    """Attention over lists that are there already."""

    def attend(given: Operands, lists: BlockLists) -> torch.Tensor:
        keys, values = given.storage[0]
        return sparse_attention(given.query, keys, values, given.seqs, lists, scale=scale)

    return attend


def fa3(job: Job, python: Path) -> dict[tuple[int, int], list[float]]:
    """FlashAttention-3's microseconds a round at every (batch, keys), from a process of its own.

    Raises PreflightError where that fails.
    """
    orders = [
        {
            "batch": batch,
            "keys": keys,
            "query_heads": job.heads.query,
            "key_heads": job.heads.key,
            "head_dim": job.heads.dim,
            "block_size": BLOCK_SIZE,
            "rotated_bytes": ROTATED_BYTES,
            "rounds": ROUNDS,
        }
        for batch, keys in job.sizes
    ]
    script = Path(__file__).with_name("bench_fa3.py")
    told = "".join(json.dumps(order) + "\n" for order in orders)
    done = subprocess.run([str(python), str(script)], input=told, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(answers) < len(orders):
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise PreflightError(f"--fa3-python {python}: FlashAttention-3 ended with {done.returncode}: {last[0]}")
    return {size: answer["us"] for size, answer in zip(job.sizes, answers, strict=True)}


def _line(cell: dict[str, Any]) -> str:
    asked = f", asked {cell['asked']}" if cell["asked"] else ""
    return (
        f"{cell['selector']} {cell['batch']} x {cell['keys']}, {cell['sparsity']:.0%} left out:"
        f" {cell['us']['median']:.1f} us, {cell['speedup']:.2f} of {cell['fastest']}{asked}"
    )


def table(result: dict[str, Any]) -> Table:
    """A line a cell: times of the sides, the speed-up over the fastest dense one, and what was asked."""
    heads = result["heads"]
    title = (
        f"{result['what']}, {heads['query']} query and {heads['key']} key heads of {heads['dim']}, {result['dtype']}"
    )
    names = ["ours", "sdpa", *(["fa3"] if result["fa3"] else [])]
    headings = ["selector", "batch", "keys", "left out", *names, "sparse", "min", "max", "attention", "picking"]
    shown = plain_table(title, [*headings, "asked", "got"])
    for cell in result["cells"]:
        shown.add_row(
            cell["selector"],
            str(cell["batch"]),
            str(cell["keys"]),
            f"{cell['sparsity']:.0%}",
            *(f"{cell['dense_us'][name]['median']:.1f}" for name in names),
            *(f"{cell['us'][which]:.1f}" for which in ("median", "min", "max")),
            *(f"{cell[which]['median']:.1f}" for which in ("attention_us", "selection_us")),
            f"{cell['asked']}" if cell["asked"] else "",
            f"{cell['speedup']:.2f}",
        )
    return shown

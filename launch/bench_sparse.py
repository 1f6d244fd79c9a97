"""Sparse decoding under the clock: picking blocks and attending to them, against every dense decode at hand.

The grid of SeerAttention-R (arXiv 2506.08889, fig. 7): one new token a sequence, contexts of 8 k to 128 k keys, the
share of blocks left out from 0.5 to 0.9. What is counted includes the selection, which the published figures leave out.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from configs.errors import ConfigError
from kernels.select import BlockLists, Choice, num_selection_blocks
from kernels.sparse_attention import sparse_attention
from launch.bench_attention import Heads
from launch.bench_clock import compare, copies_for, times_us
from launch.bench_report import plain_table, provenance, say, spread
from launch.sparse_operands import BLOCK_SIZE, SELECT_BLOCK, Operands, masked, operands
from launch.sparse_peers import TILE_BLOCK, TileLang, fa3, tile_cache, tilelang

LEAST_BLOCKS = 2  # the token's own, and one that is picked
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


def run(job: Job, *, fa3_at: Path | None, tilelang_file: Path | None) -> dict[str, Any]:
    """Check every sparse result against masked SDPA, then time all sides; JSON-able.

    Raises ConfigError before anything is timed, PreflightError where a peer does not do its work, WrongResultError.
    fa3_at: a Python that has vLLM, or a folder with its FlashAttention-3; None leaves it out. tilelang_file: TileLang's
    published kernel, timed over the lists of selectors of 64-token blocks; None leaves it out.
    """
    if unknown := sorted(set(job.selectors) - set(SELECT_BLOCK)):
        raise ConfigError(f"--selectors: {unknown[0]!r} is none of {', '.join(SELECT_BLOCK)}")
    for _, length in job.sizes:
        _require_blocks(job, length)
    peer = None if tilelang_file is None else _tilelang(job, tilelang_file)
    found = provenance(device=job.device, seed=job.seed)
    theirs = {} if fa3_at is None else fa3(job.heads, job.sizes, fa3_at)
    torch.manual_seed(job.seed)
    cells = []
    for size in job.sizes:
        for cell in _cells(job, *size, fa3_us=theirs[size]["us"] if theirs else None, peer=peer):
            say(_line(cell))
            cells.append(cell)
    return {
        "what": "microseconds of one layer's sparse decode, selection included",
        **found,
        **asdict(job),
        "block_size": BLOCK_SIZE,
        "fa3": [{"batch": batch, "keys": keys, **said} for (batch, keys), said in theirs.items()] or None,
        "tilelang": None if peer is None else peer.said,
        "cells": cells,
    }


def _require_blocks(job: Job, length: int) -> None:
    """Raise ConfigError for contexts of which more is read than the shares left out allow."""
    share = max(job.sparsities)
    for selector in job.selectors:
        block = SELECT_BLOCK[selector]
        if round(-(-length // block) * (1 - share)) < LEAST_BLOCKS:
            least = ceil(round(LEAST_BLOCKS / (1 - share), 6)) * block
            raise ConfigError(
                f"--contexts {length}: {selector} reads {LEAST_BLOCKS} blocks of {block} in any case, more than"
                f" --left-out {share:.0%} leaves; give {least} or more"
            )


def _cells(
    job: Job, batch: int, length: int, *, fa3_us: list[float] | None, peer: TileLang | None
) -> Iterator[dict[str, Any]]:
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
        beside = None
        if peer is not None and block == TILE_BLOCK:
            beside = partial(peer.timed, [tile_cache(o) for (o,) in rotation])
        for sparsity in job.sparsities:
            where = f"{selector}, {batch} x {length}, sparsity {sparsity}"
            first = rotation[0][0]
            count = num_selection_blocks(first.seqs, block)
            kept = round(count * (1 - sparsity))
            choice = Choice(max_blocks=kept, budget_blocks=kept)
            call = partial(Operands.sparse, choice=choice, select_block=block, scale=scale)
            lists = first.lists(choice, block)
            expected = masked(first, lists, scale)
            compare(call(first), expected, where)
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
                "tilelang": beside(expected, where, [lists for _, lists in picked]) if beside else None,
                "dense_us": spreads,
                "fastest": fastest,
                "speedup": spreads[fastest]["median"] / us["median"],
                "asked": ASKED.get((batch, length)) if sparsity == 0.9 else None,
            }
        del rotation, beside


def _attention(scale: float) -> Callable[[Operands, BlockLists], torch.Tensor]:
    """Attention over lists that are there already."""

    def attend(given: Operands, lists: BlockLists) -> torch.Tensor:
        keys, values = given.storage[0]
        return sparse_attention(given.query, keys, values, given.seqs, lists, scale=scale)

    return attend


def _tilelang(job: Job, file: Path) -> TileLang:
    """The peer, which has run over a few keys at every batch: what fails of it fails before anything is timed."""
    if not any(SELECT_BLOCK[selector] == TILE_BLOCK for selector in job.selectors):
        raise ConfigError(f"--tilelang reads blocks of {TILE_BLOCK} tokens: add gate or mean to --selectors")
    peer = tilelang(file)
    device, dtype, scale = torch.device(job.device), getattr(torch, job.dtype), job.heads.dim**-0.5
    for batch in sorted({batch for batch, _ in job.sizes}):
        given = operands(job.heads, batch, 8 * TILE_BLOCK, "mean", dtype=dtype, device=device)
        lists = given.lists(Choice(max_blocks=4, budget_blocks=4), TILE_BLOCK)
        peer.timed([tile_cache(given)], masked(given, lists, scale), f"{batch} x {8 * TILE_BLOCK}", [lists])
    return peer


def _line(cell: dict[str, Any]) -> str:
    asked = f", asked {cell['asked']}" if cell["asked"] else ""
    if cell["tilelang"]:
        asked += f"; attention alone {cell['attention_us']['median']:.1f}, TileLang's {_tile_us(cell)}"
    return (
        f"{cell['selector']} {cell['batch']} x {cell['keys']}, {cell['sparsity']:.0%} left out:"
        f" {cell['us']['median']:.1f} us, {cell['speedup']:.2f} of {cell['fastest']}{asked}"
    )


def _tile_us(cell: dict[str, Any]) -> str:
    """TileLang's time, an asterisk on what a graph did not hold; nothing where it was not asked."""
    if not cell["tilelang"]:
        return ""
    return f"{cell['tilelang']['us']['median']:.1f}" + ("" if cell["tilelang"]["how"] == "graph" else "*")


def table(result: dict[str, Any]) -> Table:
    """A line a cell: times of the sides, the speed-up over the fastest dense one, and what was asked."""
    heads, beside = result["heads"], result["tilelang"] is not None
    title = (
        f"{result['what']}, {heads['query']} query and {heads['key']} key heads of {heads['dim']}, {result['dtype']}"
    )
    names = ["ours", "sdpa", *(["fa3"] if result["fa3"] else [])]
    parts = ["attention", *(["TileLang"] if beside else []), "picking"]
    headings = ["selector", "batch", "keys", "left out", *names, "sparse", "min", "max", *parts]
    shown = plain_table(title, [*headings, "asked", "got"])
    if beside:
        shown.caption = (
            f"TileLang {result['tilelang']['tilelang']}: its kernel over our lists, float16, on a cache in order. It "
            "picks nothing, as where it was published: compare it with attention. *: without a CUDA graph"
        )
    for cell in result["cells"]:
        shown.add_row(
            cell["selector"],
            str(cell["batch"]),
            str(cell["keys"]),
            f"{cell['sparsity']:.0%}",
            *(f"{cell['dense_us'][name]['median']:.1f}" for name in names),
            *(f"{cell['us'][which]:.1f}" for which in ("median", "min", "max")),
            f"{cell['attention_us']['median']:.1f}",
            *([_tile_us(cell)] if beside else []),
            f"{cell['selection_us']['median']:.1f}",
            f"{cell['asked']}" if cell["asked"] else "",
            f"{cell['speedup']:.2f}",
        )
    return shown

"""When drafting under sparse attention pays: a cycle's parts by KV bytes over weight bytes, beside a model of its cost.

Random weights of a known shape, a few of its layers, so that keys and values of the largest ratio fit; random keys and
values, which take as long to read as others. What is accepted is no measurement then: speed-ups are those at accept
rates that are given, as published of self-speculation. TriForce (arXiv 2404.11912) reports more than 0.9 at temperature
1, of a retrieved cache of 4 k tokens out of 120 k; QuantSpec (arXiv 2502.10424) 0.9 of a quantized cache.
"""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from configs.errors import ConfigError
from configs.schema import SparseConfig
from launch import bench_sparse_rollout
from launch.agreement import verify
from launch.bench_options import require_part
from launch.bench_report import WrongResultError, plain_table, provenance, say, shape, spread, step_weight_bytes
from launch.long_rows import BLOCK_SIZE, LongRows, accept_length, rows_tokens
from rollout.model import bytes_per_block, context_length
from rollout.selectors import make_sparse
from rollout.sparse import SparseAttention


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: cycles of so many rows at every ratio of KV bytes to weight bytes, drafts of every depth."""

    ratios: tuple[int, ...]
    depths: tuple[int, ...]
    rows: int
    accept_rates: tuple[float, ...]
    sparse: SparseConfig
    rounds: int
    seed: int


def run(name: str, model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Verify such drafting on short texts, then time its parts; JSON-able.

    Raises ConfigError, ResourceError, WrongResultError.
    """
    contexts = {ratio: context_of(model, job, ratio) for ratio in job.ratios}
    budget = job.sparse.budget_tokens
    require_part(f"--budget {budget}", budget, min(contexts.values()), "give less, or fewer --rows")
    found = provenance(device=str(model.device), seed=job.seed)
    verified = prove(model, job)
    gbps = found["gpu"]["copy_gbps"]["median"] if found["gpu"] else None
    cells = []
    for ratio, tokens in contexts.items():
        cells += _cells(model, job, ratio, tokens, gbps)
    return {
        "what": "a cycle that drafts under sparse attention, by KV bytes over weight bytes",
        "model": name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "block_size": BLOCK_SIZE,
        "verified": verified,
        "cells": cells,
    }


def context_of(model: PreTrainedModel, job: Job, ratio: int) -> int:
    """Cached tokens of each row at a ratio. Raises ConfigError where they are more than the model's context."""
    tokens = rows_tokens(ratio * step_weight_bytes(model), token_bytes(model), job.rows)
    if tokens + max(job.depths) + 2 > (limit := context_length(model.config)):
        raise ConfigError(
            f"--ratios {ratio} over {job.rows} rows takes {tokens} tokens of each, and the model has room for"
            f" {limit}; give more --rows"
        )
    return tokens


def token_bytes(model: PreTrainedModel) -> int:
    """Keys and values of a token, over all layers."""
    return bytes_per_block(model.config, 1, model.dtype)


def prove(model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """What this drafting commits is what training's forward would sample. Raises WrongResultError."""
    made = bench_sparse_rollout.Job(1, 64, 64, ("draft",), (job.sparse.selector,), job.sparse, 1, job.seed)
    (side,) = bench_sparse_rollout.make_sides(model, made)
    verified = verify(side.engine, model, seed=job.seed)
    side.engine.release()
    return verified


def _cells(model: PreTrainedModel, job: Job, ratio: int, tokens: int, gbps: float | None) -> list[dict[str, Any]]:
    """One ratio: a cell a depth. gbps None: of a CPU nothing is predicted."""
    sparse = make_sparse(job.sparse, model)
    rows = LongRows(model, sparse, num_rows=job.rows, tokens=tokens, max_depth=max(job.depths), seed=job.seed)
    kv_bytes = job.rows * tokens * token_bytes(model)
    plain = spread(rows.plain_ms(job.rounds))
    cells = []
    for depth in job.depths:
        draft, check = spread(rows.draft_ms(depth, job.rounds)), spread(rows.verify_ms(depth, job.rounds))
        if min(draft["min"], check["min"]) <= 0:
            raise WrongResultError(f"a cycle of {depth} drafted tokens took no time")
        cell: dict[str, Any] = {
            "ratio": ratio,
            "rows": job.rows,
            "tokens": tokens,
            "kv_bytes": kv_bytes,
            "weight_bytes": step_weight_bytes(model),
            "depth": depth,
            "plain_ms": plain,
            "draft_ms": draft,
            "verify_ms": check,
            "predicted": None if gbps is None else predicted(model, sparse, job, tokens, depth, gbps),
        }
        cell["speedups"] = [_speedup(cell, rate) for rate in job.accept_rates]
        cells.append(cell)
        gains = ", ".join(f"{each['measured']:.2f} at {each['rate']:g}" for each in cell["speedups"])
        say(f"ratio {ratio}, {job.rows} rows of {tokens} tokens, depth {depth}: {gains}")
    sparse.release()
    return cells


def predicted(
    model: PreTrainedModel, sparse: SparseAttention, job: Job, tokens: int, depth: int, gbps: float
) -> dict[str, float]:
    """Milliseconds of a plain step, a draft and a verification, were each as fast as its bytes can be copied.

    A forward reads the weights, and of each row all keys and values; a draft's, the weights that drafts read, and in
    layers that are not dense the keys and values of the budget and the descriptors of all.
    """
    weights, kv_bytes = step_weight_bytes(model), job.rows * tokens * token_bytes(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    dense = 1 - sum(len(part.layers) for part in sparse.parts) / num_layers
    read = dense + (1 - dense) * min(job.sparse.budget_tokens, tokens) / tokens + sparse.share_of_cache(num_layers)
    drafting = weights if sparse.lowbit is None else sparse.lowbit.num_bytes
    step = drafting + kv_bytes * read
    whole = weights + kv_bytes
    return {"plain_ms": whole / gbps / 1e6, "draft_ms": depth * step / gbps / 1e6, "verify_ms": whole / gbps / 1e6}


def _speedup(cell: dict[str, Any], rate: float) -> dict[str, float | None]:
    """Plain steps' time over a cycle's for as many tokens, where drafts are accepted at this rate."""
    length = accept_length(rate, cell["depth"])
    model = cell["predicted"]
    return {
        "rate": rate,
        "accept_length": length,
        "measured": length * cell["plain_ms"]["median"] / (cell["draft_ms"]["median"] + cell["verify_ms"]["median"]),
        "predicted": model and length * model["plain_ms"] / (model["draft_ms"] + model["verify_ms"]),
    }


def table(result: dict[str, Any]) -> Table:
    """A line a ratio and depth: parts in milliseconds, and the speed-up at each accept rate with the model's."""
    layers, sparse = result["shape"]["num_hidden_layers"], result["sparse"]
    title = (
        f"{result['what']}: {result['model']} with {layers} layers, {result['shape']['dtype']}, {sparse['selector']}"
        f" reading {sparse['budget_tokens']} tokens, weights of drafts: {sparse['weights']}"
    )
    headings = ["KV/weights", "rows", "tokens", "drafted", "plain ms", "draft ms", "verify ms", "model's"]
    shown = plain_table(title, headings + [f"at {rate:g}, model's" for rate in result["accept_rates"]])
    for cell in result["cells"]:
        times = [cell[name]["median"] for name in ("plain_ms", "draft_ms", "verify_ms")]
        model = cell["predicted"]
        shown.add_row(
            f"{cell['ratio']}",
            str(cell["rows"]),
            str(cell["tokens"]),
            str(cell["depth"]),
            *(f"{time:.2f}" for time in times),
            " ".join(f"{time:.2f}" for time in model.values()) if model else "",
            *(
                f"{each['measured']:.2f}" + (f", {each['predicted']:.2f}" if each["predicted"] else "")
                for each in cell["speedups"]
            ),
        )
    return shown

"""What a speculative cycle costs, in plain steps, and how much graph memory several strategies take."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from drafter.types import OFF, Drafts, ResidentDrafter, Rows, Strategy, Texts
from launch.agreement import verify
from launch.bench_attention import two_chains
from launch.bench_report import plain_table, provenance, say, shape, spread
from launch.bench_rollout import (
    SHORT,
    SPECULATIVE,
    Switch,
    capture,
    generate,
    make_engine,
    ngram_drafter,
    random_prompts,
    sampling,
)
from launch.geometry import Subject
from rollout.engine import NativeEngine
from rollout.graphs import BUCKETS
from rollout.strategy import FixedChooser

LIMIT = 1.35  # a cycle that verifies 16 tokens, in plain steps, for the 8B geometry (issue 3)
GRAPH_LIMIT = 1.25  # graph memory of four strategies over that of one
FOUR = tuple(Strategy("suffix", depth=min(8, nodes), top_k=2, num_verify=nodes) for nodes in (15, 7, 3, 1))
GRAPH_TOKENS = 64  # of a row: graphs of all lengths up to rollout.workspace.LENGTH_STEP are the same
ALL_GRAPHS_MB = 1 << 16  # nothing is evicted while graph memory is measured
# Special tokens in every vocabulary we know: what follows them in a draft is not what a policy samples.
UNLIKELY = (5, 6)


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: cycles at batches, each figure the mean of about new_tokens cycles; graphs up to graph_batch.

    No batches time no cycles, graph_batch 0 weighs no graphs.
    """

    batches: tuple[int, ...]
    graph_batch: int
    prompt_len: int
    new_tokens: int
    rounds: int
    seed: int


class Hopeless:
    """A drafter that does all of another one's work and then proposes full trees that never match.

    It is speculation at its worst, and at its full cost: random weights quote nothing, so that the other's own drafts
    would be empty and their verification cheaper than it is.
    """

    def __init__(self, inner: ResidentDrafter) -> None:
        self._inner = inner
        self.attach, self.begin, self.refresh = inner.attach, inner.begin, inner.refresh
        self.finish, self.release = inner.finish, inner.release
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict
        self._trees: dict[tuple[Strategy, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Two chains below the pending token, the first as deep as the strategy allows; num_verify nodes in all."""
        self._inner.propose(texts, rows, strategy, out)
        device = out.token_ids.device
        if (strategy, device) not in self._trees:  # made in the eager run that comes before a capture
            values = hopeless_tree(strategy)
            self._trees[strategy, device] = (
                torch.tensor(values[0], dtype=torch.int32, device=device),
                torch.tensor(values[1], dtype=torch.int32, device=device),
            )
        token_ids, parents = self._trees[strategy, device]
        out.token_ids.copy_(token_ids.expand_as(out.token_ids))
        out.parents.copy_(parents.expand_as(out.parents))
        out.num_nodes.fill_(len(parents))


def hopeless_tree(strategy: Strategy) -> tuple[list[int], list[int]]:
    """Tokens and parents that fill a strategy, and that no policy samples."""
    parents = two_chains(strategy.num_verify, depth=strategy.depth)
    assert strategy.num_verify <= 2 * strategy.depth and parents.count(-1) <= strategy.top_k
    second = strategy.num_verify - min(strategy.depth, strategy.num_verify)
    return [UNLIKELY[0]] * (strategy.num_verify - second) + [UNLIKELY[1]] * second, parents


def run(subject: Subject, job: Job) -> dict[str, Any]:
    """Verify plain and speculative cycles, then time them; JSON-able. Their graphs are left to graph_memory."""
    model = subject.model
    found = provenance(device=str(model.device), seed=job.seed)
    verified, cells = _cells(model, job) if job.batches else ({}, [])
    return {
        "what": "milliseconds per cycle",
        "model": subject.name,
        "shape": shape(model),
        **found,
        **asdict(job),
        "strategy": asdict(SPECULATIVE),
        "verified": verified,
        "cells": cells,
        "graphs": None,
    }


def _cells(model: PreTrainedModel, job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How either kind of cycle was verified, and what it takes at every batch size."""
    kinds = {"plain": FixedChooser(OFF), "cycle": FixedChooser(SPECULATIVE)}
    chooser = Switch(*kinds.values())
    engine = make_engine(
        model,
        max_running=max(*job.batches, 6),
        tokens_each=job.prompt_len + SHORT + job.new_tokens,
        chooser=chooser,
        drafter=Hopeless(ngram_drafter()),
    )
    verified = {}
    for name, chooser.now in kinds.items():
        verified[name] = verify(engine, model, seed=job.seed)
    cells = []
    for batch in job.batches:
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(job.rounds + 1):
            for name, chooser.now in kinds.items():
                times[name].append(cycle_ms(engine, model, batch, job, seed=job.seed + 1000 * batch + number))
        cell: dict[str, Any] = {"batch": batch} | {name: spread(values[1:]) for name, values in times.items()}
        cell["ratio"] = cell["cycle"]["median"] / cell["plain"]["median"]
        say(f"batch {batch}: a cycle is {cell['ratio']:.3f} plain steps")
        cells.append(cell)
    return verified, cells


def cycle_ms(engine: NativeEngine, model: PreTrainedModel, batch: int, job: Job, *, seed: int) -> float:
    """Milliseconds of one cycle: the time of a longer run less that of a shorter one, over the cycles between them."""
    vocab_size = model.config.get_text_config().vocab_size
    seconds, cycles = [], []
    for number, new_tokens in enumerate((SHORT, SHORT + job.new_tokens)):
        prompts = random_prompts(batch, job.prompt_len, vocab_size, seed=2 * seed + number)
        timed = generate(engine, prompts, sampling(new_tokens, seed=seed))
        seconds.append(timed.seconds)
        cycles.append(max(rollout.spec.forwards for rollout in timed.rollouts))
    return (seconds[1] - seconds[0]) / (cycles[1] - cycles[0]) * 1e3


def graph_memory(model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """Bytes of all graphs over batches up to graph_batch: of the widest of four strategies, and of all four.

    A fresh engine captures the graphs of the widest first, as if it were alone, then those of the others beside them.
    0 and no ratio on a CPU, which has none.
    """
    batches = [size for size in BUCKETS if size <= job.graph_batch]
    choosers = [FixedChooser(strategy) for strategy in FOUR]
    chooser = Switch(*choosers)
    engine = make_engine(
        model,
        max_running=max(batches),
        tokens_each=GRAPH_TOKENS,
        chooser=chooser,
        drafter=Hopeless(ngram_drafter()),
        graph_mb=ALL_GRAPHS_MB,
    )
    totals = []
    for chooser.now in choosers:
        capture(engine, model, batches, seed=job.seed)
        totals.append(engine.graph_bytes)
        nodes = chooser.now.max_num_verify
        say(f"graphs that verify {1 + nodes} tokens a row: {totals[-1] / 1e6:.0f} MB with those before")
    one, four = totals[0], totals[-1]
    return {
        "batches": batches,
        "strategies": [asdict(strategy) for strategy in FOUR],
        "four_bytes": four,
        "one_bytes": one,
        "ratio": four / one if one else None,
    }


def table(result: dict[str, Any]) -> Table:
    """A cycle in plain steps by batch size, and graph memory below."""
    tokens = 1 + result["strategy"]["num_verify"]
    title = f"{result['what']} that verifies {tokens} tokens a row, {result['model']}, {result['shape']['dtype']}"
    shown = plain_table(title, ["batch", "plain", "min", "max", "cycle", "min", "max", "asked", "got"])
    for cell in result["cells"]:
        figures = [f"{cell[name][which]:.3f}" for name in ("plain", "cycle") for which in ("median", "min", "max")]
        asked = f"{LIMIT:.2f}" if result["model"] == "qwen3-8b" and cell["batch"] <= 8 else ""
        shown.add_row(str(cell["batch"]), *figures, asked, f"{cell['ratio']:.3f}")
    graphs = result["graphs"]
    if graphs and graphs["ratio"]:
        megabytes = [f"{graphs[name] / 1e6:.0f} MB" for name in ("one_bytes", "four_bytes")]
        shown.add_section()
        shown.add_row("graphs", megabytes[0], "", "", megabytes[1], "", "", f"{GRAPH_LIMIT}", f"{graphs['ratio']:.2f}")
    return shown

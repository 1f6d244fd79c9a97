"""The commands of `paceline bench` that measure long contexts, where the KV cache outweighs the weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import ConfigError
from launch.bench_options import (
    BY_GATES,
    Device,
    Dtype,
    Json,
    Rounds,
    Seed,
    names,
    numbers,
    prepare,
    require_budget,
    show,
)

Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Natural text; Python's own documentation without.")
]
RealModel = Annotated[str, typer.Option("--model", metavar="MODEL", help="A model folder or a shipped name.")]
Gate = Annotated[str, typer.Option(metavar="FOLDER", help="Trained gates, for the selector of that name.")]
Block = Annotated[int, typer.Option(min=0, help="Tokens that are picked together; 0: as each selector does.")]
GateOrHeads = Annotated[
    str,
    typer.Option("--gate", metavar="PATH", help="Of gate: trained gates; of duo: full_attention_heads.tsv."),
]
Weights = Annotated[Literal["policy", "int8", "fp8"], typer.Option(help="That drafts read: the policy's or a copy.")]
DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_DEPTH = 63  # a tree's nodes are the bits of a word


def selection(
    model: RealModel = DEFAULT_MODEL,
    selectors: Annotated[
        str,
        typer.Option(
            help="Of quest (or resa), mean, streaming, verified, gate, gate-fp8 (descriptors in FP8), and best: by "
            "hindsight. '': all. Not duo, which picks heads by a calibration of their own, not blocks by budget: see "
            "sparse-rollout."
        ),
    ] = "",
    budgets: Annotated[str, typer.Option(help="Tokens that are attended to.")] = "256,512,1024,2048",
    gate: Gate = "",
    text: Text = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts, from the end of what there is.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 8192,
    places: Annotated[int, typer.Option(min=1, help="Places at the end of each that are measured.")] = 256,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise at each place.")] = 8,
    block: Block = 0,
    dense_layers: Annotated[int, typer.Option(min=0, help="First layers that attend to everything.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Attention kept, divergence of the next token and accept rate on a real model, by selector and budget."""
    sizes, named = tuple(numbers("--budgets", budgets)), names("--selectors", selectors) if selectors else ()
    prepare(out)
    from configs.schema import SparseConfig
    from launch import bench_selection
    from launch.geometry import Subject
    from launch.natural_text import last_pieces, natural_tokens
    from rollout.model import load_config
    from rollout.pretrained import load_tokenizer, resolve

    chosen = named or tuple(name for name in bench_selection.KNOWN if name != "resa" and (name not in BY_GATES or gate))
    sparse = SparseConfig(gate=gate, select_block=block, dense_layers=dense_layers)
    job = bench_selection.Job(texts, tokens, places, draws, chosen, sizes, sparse, seed)
    bench_selection.require(job)
    folder = resolve(model)
    bench_selection.require_fit(job, load_config(folder))
    name, token_ids = natural_tokens(load_tokenizer(folder), text)
    pieces = last_pieces(name, token_ids, texts, tokens)
    subject = Subject.load(None, model, device=device, dtype=dtype, seed=seed)
    result = bench_selection.run(subject, job, name=name, pieces=pieces)
    show(result, bench_selection.table(result), out)


def sparse_rollout(
    model: RealModel = DEFAULT_MODEL,
    modes: Annotated[str, typer.Option(help="Of off, draft, rectified, plain.")] = "off,draft,rectified,plain",
    selectors: Annotated[
        str,
        typer.Option(
            help="draft goes by each of them in turn, the lossy modes by the first. gate-fp8: FP8 descriptors."
        ),
    ] = "quest,mean,streaming,verified",
    gate: GateOrHeads = "",
    text: Text = None,
    sequences: Annotated[int, typer.Option(min=1, help="Rollouts at once.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 4096,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens sampled after it; nothing stops.")] = 4096,
    budget: Annotated[int, typer.Option(min=1, help="Tokens attended to under a selector.")] = 1024,
    block: Block = 0,
    depth: Annotated[int, typer.Option(min=1, max=63, help="draft: tokens drafted.")] = 8,
    weights: Weights = "policy",
    inner: Annotated[
        str, typer.Option(help="draft: who drafts for the drafting policy, of off, suffix, eagle; each in turn.")
    ] = "off",
    drafter: Annotated[str, typer.Option(metavar="FOLDER", help="Trained drafter, for --inner eagle.")] = "",
    every: Annotated[int, typer.Option(min=1, max=64, help="rectified: tokens after which all is dense.")] = 32,
    rounds: Rounds = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Tokens per second of whole rollouts over long contexts: without drafts, drafted under selectors, and lossy."""
    mode_names, selector_names = names("--modes", modes), names("--selectors", selectors)
    inners = names("--inner", inner)
    prepare(out)
    from configs.schema import SparseConfig
    from launch import bench_sparse_rollout
    from launch.geometry import Subject
    from launch.natural_text import natural_tokens, overlapping_pieces
    from rollout.model import load_config
    from rollout.pretrained import load_tokenizer, resolve

    job = bench_sparse_rollout.Job(
        sequences,
        prompt_tokens,
        new_tokens,
        mode_names,
        selector_names,
        SparseConfig(budget_tokens=budget, select_block=block, depth=depth, every=every, weights=weights, gate=gate),
        rounds,
        seed,
        inners,
        drafter,
    )
    bench_sparse_rollout.require(job)
    folder = resolve(model)
    bench_sparse_rollout.require_fit(job, load_config(folder))
    name, token_ids = natural_tokens(load_tokenizer(folder), text)
    pieces = overlapping_pieces(name, token_ids, sequences, prompt_tokens)
    subject = Subject.load(None, model, device=device, dtype=dtype, seed=seed)
    result = bench_sparse_rollout.run(subject, job, name=name, pieces=pieces)
    show(result, bench_sparse_rollout.table(result), out)


def sparse_cycle(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="A known shape, random weights.")] = "qwen3-8b",
    layers: Annotated[int, typer.Option(min=0, help="Of the shape's; 0: all. 24 leave a ratio of 4 room.")] = 24,
    ratios: Annotated[str, typer.Option(help="Bytes of keys and values over those of weights.")] = "1,2,4",
    rows: Annotated[int, typer.Option(min=1, help="Sequences decoded together; a ratio decides their length.")] = 16,
    depths: Annotated[str, typer.Option(help="Tokens drafted.")] = "4,8,16",
    accept_rates: Annotated[str, typer.Option(help="In percent, at which speed-ups are given.")] = "70,80,90",
    selector: Annotated[
        Literal["quest", "resa", "mean", "streaming", "verified"], typer.Option(help="Who picks what is attended to.")
    ] = "quest",
    budget: Annotated[int, typer.Option(min=1, help="Tokens attended to under it.")] = 1024,
    weights: Weights = "policy",
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """The parts of a cycle that drafts under sparse attention, by KV bytes over weight bytes, beside a cost model."""
    wanted, percent, lengths = (
        numbers(option, given)
        for option, given in (("--ratios", ratios), ("--accept-rates", accept_rates), ("--depths", depths))
    )
    if max(percent) > 100:
        raise ConfigError(f"--accept-rates {accept_rates}: give percentages, of 100 at most")
    if max(lengths) > MAX_DEPTH:
        raise ConfigError(f"--depths {depths}: give numbers of {MAX_DEPTH} at most")
    prepare(out)
    from configs.schema import SparseConfig
    from launch import bench_sparse_cycle
    from launch.geometry import geometry as shape_of
    from launch.geometry import placement, random_policy

    if layers > (own := shape_of(geometry).num_hidden_layers):
        raise ConfigError(f"--layers {layers}: {geometry} has {own}; give {own} or fewer, or 0 for all")
    where, kind = placement(device, dtype)
    sparse = SparseConfig(mode="draft", selector=selector, budget_tokens=budget, depth=max(lengths), weights=weights)
    require_budget("--budget", sparse)
    rates = tuple(each / 100 for each in percent)
    job = bench_sparse_cycle.Job(tuple(wanted), tuple(lengths), rows, rates, sparse, rounds, seed)
    model = random_policy(geometry, device=where, dtype=kind, seed=seed, num_layers=layers or None)
    result = bench_sparse_cycle.run(geometry, model, job)
    show(result, bench_sparse_cycle.table(result), out)

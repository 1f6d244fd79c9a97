"""The commands of `paceline bench` that measure long contexts, where the KV cache outweighs the weights."""

from pathlib import Path
from typing import Annotated

import typer

from launch.bench_options import Device, Dtype, Json, Seed, numbers, prepare, show

Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Natural text; Python's own documentation without.")
]
RealModel = Annotated[str, typer.Option("--model", metavar="MODEL", help="A model folder or a shipped name.")]
Gate = Annotated[str, typer.Option(metavar="FOLDER", help="Trained gates, for the selector of that name.")]
DEFAULT_MODEL = "smollm2-135m-instruct"


def selection(
    model: RealModel = DEFAULT_MODEL,
    selectors: Annotated[
        str, typer.Option(help="Of quest, resa, mean, streaming, verified, gate, and best: by hindsight. '': all.")
    ] = "",
    budgets: Annotated[str, typer.Option(help="Tokens that are attended to.")] = "256,512,1024,2048",
    gate: Gate = "",
    text: Text = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts, from the end of what there is.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 8192,
    places: Annotated[int, typer.Option(min=1, help="Places at the end of each that are measured.")] = 256,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise at each place.")] = 8,
    dense_layers: Annotated[int, typer.Option(min=0, help="First layers that attend to everything.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Attention kept, divergence of the next token and accept rate on a real model, by selector and budget."""
    sizes = tuple(numbers("--budgets", budgets))
    prepare(out)
    from configs.schema import SparseConfig
    from launch import bench_selection
    from launch.geometry import Subject
    from launch.natural_text import natural_tokens
    from rollout.pretrained import load_tokenizer

    known = (*bench_selection.SELECTORS, bench_selection.BEST)
    chosen = selectors.split(",") if selectors else [name for name in known if name != "gate" or gate]
    subject = Subject.load(None, model, device=device, dtype=dtype, seed=seed)
    assert subject.folder is not None
    sparse = SparseConfig(gate=gate, dense_layers=dense_layers)
    job = bench_selection.Job(texts, tokens, places, draws, tuple(chosen), sizes, sparse, seed)
    name, token_ids = natural_tokens(load_tokenizer(subject.folder), text)
    result = bench_selection.run(subject, job, name=name, token_ids=token_ids)
    show(result, bench_selection.table(result), out)

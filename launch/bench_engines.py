"""The commands of `paceline bench` that measure the engine and its kernels."""

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import ConfigError
from launch.bench_options import (
    PYTHON,
    Device,
    Dtype,
    Geometries,
    Geometry,
    Json,
    Model,
    PeerMemory,
    PeerPython,
    Rounds,
    Seed,
    Vllm,
    names,
    numbers,
    prepare,
    show,
    write,
)


def decode(
    geometry: Geometries = "",
    model: Model = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8,32,128,256",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps a figure is the mean of.")] = 128,
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    peer: Vllm = None,
    peer_python: PeerPython = PYTHON,
    peer_memory: PeerMemory = 0.2,
    out: Json = None,
) -> None:
    """Milliseconds per decode step at temperature 1, by batch size; with --peer vllm its own beside ours."""
    sizes = numbers("--batches", batches)
    choice = prepare(out, peer, peer_python, peer_memory)
    if bool(geometry) == (model is not None):
        raise ConfigError("give --geometry NAMES for random weights or --model MODEL, as in --geometry qwen3-8b")
    from launch import bench_decode

    job = bench_decode.Job(tuple(sizes), prompt_len, new_tokens, rounds, seed)
    names = geometry.split(",") if geometry else []
    if len(set(names)) < len(names):
        raise ConfigError(f"--geometry {geometry}: names one twice; give different ones")
    result = bench_decode.run(names, model, job, device=device, dtype=dtype, peer=choice)
    show(result, bench_decode.table(result), out)


def prefill(
    geometry: Geometry = None,
    model: Model = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "128,512,2048,8192",
    total_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens at once; at least one prompt.")] = 16384,
    rounds: Rounds = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    peer: Vllm = None,
    peer_python: PeerPython = PYTHON,
    peer_memory: PeerMemory = 0.45,
    out: Json = None,
) -> None:
    """Prompt tokens per second by length, against the transformers module with SDPA, and a peer."""
    sizes = numbers("--lengths", lengths)
    choice = prepare(out, peer, peer_python, peer_memory)
    from launch import bench_prefill
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    job = bench_prefill.Job(tuple(sizes), total_tokens, rounds, seed)
    result = bench_prefill.run(subject, job, peer=choice)
    show(result, bench_prefill.table(result), out)


def start(
    geometry: Geometry = None,
    model: Model = None,
    rounds: Annotated[int, typer.Option(min=1, help="Warm starts after the cold one.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    peer: Vllm = None,
    peer_python: PeerPython = PYTHON,
    peer_memory: PeerMemory = 0.45,
    out: Json = None,
) -> None:
    """Seconds from loaded weights to the first token, in fresh processes: compilers' caches empty, then kept."""
    choice = prepare(out, peer, peer_python, peer_memory)
    from launch import bench_start

    job = bench_start.Job(geometry, model, device, dtype, seed, rounds)
    result = bench_start.run(job, peer=choice)
    show(result, bench_start.table(result), out)


def cycle(
    geometry: Geometry = None,
    model: Model = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded together; '': time no cycles.")] = "1,2,4,8",
    graph_batch: Annotated[int, typer.Option(min=0, help="Weigh the graphs up to this batch; 0: do not.")] = 256,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Cycles a figure is the mean of.")] = 64,
    rounds: Rounds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """A speculative cycle in plain steps, and the graph memory of several strategies against one's."""
    sizes = numbers("--batches", batches) if batches else []
    if not sizes and not graph_batch:
        raise ConfigError("--batches '' and --graph-batch 0 leave nothing to measure; give one of them another value")
    prepare(out)
    from launch import bench_cycle
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    job = bench_cycle.Job(tuple(sizes), graph_batch, prompt_len, new_tokens, rounds, seed)
    result = bench_cycle.run(subject, job)
    if graph_batch:
        write(result, out)  # what was timed is kept, should the graphs not fit
        result["graphs"] = bench_cycle.graph_memory(subject.model, job)
    show(result, bench_cycle.table(result), out)


def gain(
    geometry: Geometry = None,
    model: Model = None,
    batches: Annotated[str, typer.Option(help="Rollouts at once.")] = "1,8,32,128,256",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a rollout at most.")] = 512,
    rounds: Rounds = 9,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Rollouts with drafts, the strategy chosen as they run, over rollouts without; also where drafts never match."""
    sizes = numbers("--batches", batches)
    prepare(out)
    from launch import bench_gain
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    result = bench_gain.run(subject, bench_gain.Job(tuple(sizes), new_tokens, rounds, seed))
    show(result, bench_gain.table(result), out)


def drift(
    geometry: Geometry = None,
    model: Model = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to answer.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Rollouts with drafts against rollouts without, and both against the training forward: agreement and drift."""
    prepare(out)
    from launch import bench_drift
    from launch.geometry import Subject

    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    result = bench_drift.run(subject, bench_drift.Job(prompts, samples, new_tokens, seed))
    show(result, bench_drift.table(result), out)


def kernels(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="Whose heads and widths.")] = "qwen3-8b",
    batches: Annotated[str, typer.Option(help="Sequences that attend.")] = "1,4,8,16",
    contexts: Annotated[str, typer.Option(help="Keys of each.")] = "8192,32768,131072",
    max_keys: Annotated[int, typer.Option(min=1, help="Leave out batches of more keys.")] = 1 << 19,
    tokens: Annotated[str, typer.Option(help="Rows of products and samplings.")] = "1,8,16,128",
    logprob_rows: Annotated[int, typer.Option(min=1, help="Rows of log-probs.")] = 2048,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """Attention, products, sampling and log-probs against torch's, at a geometry's shapes."""
    sizes = [(batch, keys) for keys in numbers("--contexts", contexts) for batch in numbers("--batches", batches)]
    rows = numbers("--tokens", tokens)
    prepare(out)
    from launch import bench_kernels
    from launch.geometry import placement

    where, kind = placement(device, dtype)
    kept = tuple((batch, keys) for batch, keys in sizes if batch * keys <= max_keys)
    job = bench_kernels.Job(geometry, where, kind, kept, tuple(rows), logprob_rows, seed)
    result = bench_kernels.run(job)
    show(result, bench_kernels.table(result), out)


def sparse(
    heads: Annotated[str, typer.Option(metavar="Q,K,D", help="Query heads, key heads, their dimension.")] = "64,8,128",
    batches: Annotated[str, typer.Option(help="Sequences that decode.")] = "1,4,8,16",
    contexts: Annotated[str, typer.Option(help="Keys of each.")] = "8192,32768,131072",
    left_out: Annotated[str, typer.Option(help="Blocks that are not read, in percent.")] = "50,60,70,80,90",
    selectors: Annotated[
        str, typer.Option(help="Who picks the blocks: of gate, gate-fp8, quest, mean.")
    ] = "gate,quest",
    fa3: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Python with vLLM, or a wheel's vllm_flash_attn: FlashAttention-3 beside."),
    ] = None,
    tilelang: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TileLang's example of sparse GQA decode over indices: its kernel beside."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """One layer's decode over picked blocks, the picking included, against the dense decodes at hand."""
    sizes = tuple((batch, keys) for keys in numbers("--contexts", contexts) for batch in numbers("--batches", batches))
    percent, shape = numbers("--left-out", left_out), numbers("--heads", heads)
    if len(shape) != 3 or shape[0] % shape[1]:
        raise ConfigError(f"--heads {heads}: give query heads, key heads that divide them, and a dimension: 64,8,128")
    named = names("--selectors", selectors)
    if any(not 0 < share < 100 for share in percent):
        raise ConfigError(f"--left-out {left_out}: give percentages between 1 and 99")
    prepare(out)
    from launch import bench_sparse
    from launch.bench_attention import Heads
    from launch.geometry import placement

    where, kind = placement(device, dtype)
    shares = tuple(share / 100 for share in percent)
    job = bench_sparse.Job(Heads(*shape), sizes, shares, named, where, kind, seed)
    if tilelang is not None and where == "cpu":
        raise ConfigError(f"--tilelang {tilelang}: its kernel needs a GPU; leave it out with --device cpu")
    result = bench_sparse.run(job, fa3_at=fa3, tilelang_file=tilelang)
    show(result, bench_sparse.table(result), out)


def sparse_drift(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[sparse.b=c ...]", help="Keys to set.")] = None,
    geometry: Geometry = None,
    model: Model = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each, its prompt included.")] = 8192,
    bin_tokens: Annotated[int, typer.Option(min=1, help="Positions that share a figure.")] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """KL per token, by position, of sparse decoding from dense, rectified (ReSA) and not (SeerAttention-R).

    Without --geometry and --model it is smollm2-135m-instruct. sparse.budget_tokens, sparse.every and the like are
    those of a recipe.
    """
    from configs.load import parse

    fixed = ["data.name=none", "rollout.block_size=64", "spec.source=off", "sparse.mode=rectified"]
    given = overrides or []
    if stray := [each for each in given if not each.startswith(("sparse.", "rollout.block_size="))]:
        raise ConfigError(f"{stray[0]}: only sparse.* changes what is measured; leave it out, or see --help")
    if unread := [each for each in given if each.startswith("sparse.depth=")]:
        raise ConfigError(f"{unread[0]}: is of drafts, which are not measured; leave it out")
    sparse = parse("", [*fixed, *given], origin="sparse-drift").sparse
    if sparse.mode != "rectified":
        raise ConfigError(f"sparse.mode={sparse.mode}: rectified and plain are both measured; leave it out")
    prepare(out)
    from launch import bench_sparse_drift
    from launch.geometry import Subject, config_of

    if geometry is None and model is None:
        model = "smollm2-135m-instruct"
    job = bench_sparse_drift.Job(batch, tokens, bin_tokens, sparse, seed)
    bench_sparse_drift.require_fit(job, config_of(geometry, model))
    subject = Subject.load(geometry, model, device=device, dtype=dtype, seed=seed)
    result = bench_sparse_drift.run(subject, job)
    show(result, bench_sparse_drift.table(result), out)


def tensor_parallel(
    geometry: Annotated[str, typer.Option(metavar="NAME", help="A known shape, random weights.")] = "qwen3-8b",
    world: Annotated[int, typer.Option(min=2, help="GPUs that share the policy.")] = 2,
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8,32",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps a figure is the mean of.")] = 128,
    rounds: Rounds = 3,
    exact_layers: Annotated[int, typer.Option(min=1, help="Layers compared token by token in float32.")] = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Json = None,
) -> None:
    """A policy over several GPUs against the same on one: whether rollouts agree, and milliseconds per step."""
    sizes = tuple(numbers("--batches", batches))
    prepare(out)
    from launch import bench_tensor_parallel

    job = bench_tensor_parallel.Job(geometry, world, sizes, prompt_len, new_tokens, rounds, exact_layers, seed)
    result = bench_tensor_parallel.run(job, device=device, dtype=dtype)
    show(result, bench_tensor_parallel.table(result), out)

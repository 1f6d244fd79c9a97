"""What a configuration comes to: batch sizes, placement and memory, derived without starting anything."""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from transformers import PretrainedConfig

from configs.layers import by_layer, runs
from configs.schema import Config, SparseConfig
from drafter.gate_checkpoint import read_gate_config
from drafter.memory import NO_DRAFTER, DrafterBytes, GateBytes, drafter_bytes, learned_gate_bytes
from drafter.trainer import require_unroll
from drafter.types import OFF
from launch.drafting import chooser_for, starting_shape
from launch.memory import Memory, Sizes, memory_of, saved_bytes
from launch.shares import count_parameters, empty_model, share_of
from rl.ulysses import require_heads
from rollout.gate_sampler import sample_bytes
from rollout.lowbit import LowBitPolicy, require_fp8, require_readable
from rollout.memory import available_bytes, cache_budget
from rollout.model import bytes_per_block, context_length, kv_shape, require_groups, resolve_compute
from rollout.selectors import require_sparse, share_of_cache
from rollout.strategy import configured
from rollout.verified import weight_bytes
from rollout.workspace import room_for

NOTES = {
    "optimiser": "Adam moments and float32 masters",
    "reference": "for the KL term",
    "uncut": "the largest parameter, of which a rank keeps a share",
    "whole copy": "that rollouts are sampled from",
    "CUDA graphs": "at most",
    "block weights": "of sequences that run, that selector verified goes by",
    "drafter": "its copies and optimiser",
    "drafter's lessons": "gradients, CUDA graphs and copies for checkpoints",
    "drafter's cache": "of sequences that run",
    "gates": "that pick blocks, and the copy that learns, if one does",
    "gates' lessons": "gradients and optimiser",
    "gate samples": "keys and queries of verifications, at most",
    "8-bit copy": "of the policy, that drafts read",
    "features": "hidden states to draft from and learn from",
}

# What a run makes once its engine has a KV cache, of the memory that the cache's share leaves free.
AFTER_CACHE = {
    "CUDA graphs",
    "block weights",
    "reference",
    "drafter's cache",
    "drafter's lessons",
    "features",
    "gates' lessons",
    "gate samples",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Derived sizes of one run. Bytes are estimates."""

    model: str
    parameters: int
    backend: str
    placement: str
    workers: int
    rollout_workers: int  # that sample; workers too, where these do both
    tensor_parallel: int  # of those that sample, how many share an engine
    device: str
    dtype: str
    rollouts_per_step: int
    max_sequence_tokens: int
    running_sequences: int
    speculation: str
    kv_blocks: int
    kv_tokens: int
    steps: int
    updates_per_step: int
    max_tokens_per_step: int
    max_microbatches_per_step: int
    epochs: float | None  # None where the data's size is known only once it is read
    memory: dict[str, Memory]  # by kind of process
    available_bytes: int  # for one process
    warnings: tuple[str, ...]


def derive(config: Config, model_config: PretrainedConfig) -> Plan:
    """Every size that follows from a configuration and its model on this machine. Raises PreflightError."""
    device, dtype = resolve_compute(config.compute)
    require_groups(model_config, device=device, dtype=dtype)
    require_heads(model_config, config.train.sequence_parallel)
    if config.sparse.mode != "off":
        require_sparse(config.sparse, model_config)
        if config.sparse.descriptors != "policy" and "gate" in _selectors(config.sparse, model_config):
            require_fp8(torch.device(device), key="sparse.descriptors", instead="policy")
    if config.sparse.weights != "policy":
        require_readable(config.sparse.weights, torch.device(device))
    itemsize = getattr(torch, dtype).itemsize
    compute, rollout, train = config.compute, config.rollout, config.train
    is_separate = compute.placement == "separate"
    samplers = compute.rollout_workers // rollout.tensor_parallel if is_separate else compute.workers
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    rollouts = rollout.prompts_per_step * rollout.group_size
    running = min(rollout.max_running, ceil(rollout.prompts_per_step / samplers) * rollout.group_size)
    micro_tokens = min(max(train.micro_tokens, ceil(longest / train.sequence_parallel)), rollouts * longest)
    groups = compute.workers // train.sequence_parallel
    sizes = Sizes(
        parameters=count_parameters(model_config),
        dtype=getattr(torch, dtype),
        device=device,
        ranks=compute.workers,
        tokens=micro_tokens,
        rows=running,
        kv_bytes=0,
        drafter=_drafter_bytes(config, model_config, device, itemsize),
        share=share_of(model_config, rollout.tensor_parallel),
        lowbit=lowbit_bytes(config.sparse, model_config),
        gates=gate_bytes(config.sparse, model_config, itemsize=itemsize, longest=longest),
        watched=watched_bytes(config, model_config, device=device, longest=longest),
        saved=saved_bytes(model_config, micro_tokens, getattr(torch, dtype)),
    )
    kv_blocks = _kv_blocks(config, model_config, sizes, longest=longest)
    block_bytes = _block_bytes(config, sizes.share.config, getattr(torch, dtype))
    memory = memory_of(config, model_config, replace(sizes, kv_bytes=kv_blocks * block_bytes))
    processes = compute.workers + (compute.rollout_workers if is_separate else 0)
    available = available_bytes(device) // (1 if device == "cuda" else processes)
    warnings = [
        *_context_warnings(longest, context_length(model_config)),
        *_sparse_warnings(config.sparse, kv_shape(model_config)[0], longest),
        *_kv_warnings(kv_blocks, ceil(longest / rollout.block_size), running),
        *_memory_warnings(memory, available, device, drafts=sizes.drafter.total > 0),
    ]
    return Plan(
        model=config.model,
        parameters=sizes.parameters,
        backend=compute.backend,
        placement=compute.placement,
        workers=compute.workers,
        rollout_workers=compute.rollout_workers if is_separate else samplers,
        tensor_parallel=rollout.tensor_parallel,
        device=device,
        dtype=dtype,
        rollouts_per_step=rollouts,
        max_sequence_tokens=longest,
        running_sequences=running,
        speculation=_speculation(config, model_config, device),
        kv_blocks=kv_blocks,
        kv_tokens=kv_blocks * rollout.block_size,
        steps=train.steps,
        updates_per_step=train.updates_per_step,
        max_tokens_per_step=rollouts * longest,
        # a pass takes sequences while they fit, hence at least this many of the longest
        max_microbatches_per_step=ceil(rollouts / (micro_tokens * train.sequence_parallel // longest))
        + train.updates_per_step * groups
        - 1,
        epochs=_epochs(config),
        memory=memory,
        available_bytes=available,
        warnings=tuple(warnings),
    )


def _kv_blocks(config: Config, model_config: PretrainedConfig, sizes: Sizes, *, longest: int) -> int:
    """Blocks of the KV cache: as configured, else what the sequences can use, within what is free beside the rest."""
    block_size = config.rollout.block_size
    if config.rollout.kv_tokens:
        return config.rollout.kv_tokens // block_size
    sampler = list(memory_of(config, model_config, sizes).values())[-1]  # without a cache
    reserved = sum(size for name, size in sampler.always.items() if name not in AFTER_CACHE)
    affordable = cache_budget(sizes.device, reserved=reserved) // _block_bytes(config, sizes.share.config, sizes.dtype)
    return min(sizes.rows * ceil(longest / block_size), affordable)


def _block_bytes(config: Config, model_config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of a block of the KV cache, and of what sparse attention keeps beside it."""
    num_bytes = bytes_per_block(model_config, config.rollout.block_size, dtype)
    num_layers = kv_shape(model_config)[0]
    return num_bytes + ceil(share_of_cache(config.sparse, num_layers, itemsize=dtype.itemsize) * num_bytes)


def _drafter_bytes(config: Config, model_config: PretrainedConfig, device: str, itemsize: int) -> DrafterBytes:
    """What a learned drafter takes. One that cannot be read or trained is found out before anything is written."""
    apart = config.rollout.backend == "vllm"  # which has a copy and a cache of its own
    if config.spec.source not in ("eagle", "auto") or (apart and not config.drafter.train):
        return NO_DRAFTER
    shape = starting_shape(config, model_config)
    require_unroll(config.drafter, window=shape.window)
    chooser = chooser_for(config, model_config, device)
    needed = drafter_bytes(
        shape,
        config.drafter,
        num_rows=config.rollout.max_running,
        max_nodes=max(1, chooser.max_num_verify),
        itemsize=itemsize,
        on_gpu=device == "cuda",
    )
    return replace(needed, rings=0, cache=0) if apart else needed


def lowbit_bytes(sparse: SparseConfig, model_config: PretrainedConfig) -> int:
    """Of the policy's copy in eight bits, where drafts read one. Nothing is allocated. Raises PreflightError."""
    if sparse.weights == "policy":
        return 0
    return LowBitPolicy(empty_model(model_config), sparse.weights).num_bytes


def gate_bytes(sparse: SparseConfig, model_config: PretrainedConfig, *, itemsize: int, longest: int) -> GateBytes:
    """Of the gates that pick blocks, where there are any. Raises PreflightError."""
    if sparse.mode == "off" or "gate" not in _selectors(sparse, model_config):
        return GateBytes()
    shape = read_gate_config(Path(sparse.gate).expanduser(), model_config)
    if not sparse.learn:
        return GateBytes(weights=shape.num_parameters * itemsize)
    samples = sample_bytes(model_config, longest=longest, itemsize=itemsize)
    return learned_gate_bytes(shape, itemsize=itemsize, samples=samples)


def watched_bytes(config: Config, model_config: PretrainedConfig, *, device: str, longest: int) -> int:
    """Of what a selector keeps of the rows rather than of the cache's blocks: the verified one alone does."""
    num_layers = 0 if config.sparse.mode == "off" else _selectors(config.sparse, model_config).count("verified")
    if not num_layers:
        return 0
    chooser = chooser_for(config, model_config, device)
    room = room_for(longest, config.rollout, max_nodes=max(1, chooser.max_num_verify))
    select_block = replace(config.sparse, selector="verified").block_tokens
    num_blocks = room.table_width * (config.rollout.block_size // select_block)
    return weight_bytes(model_config, num_layers=num_layers, num_rows=config.rollout.max_running, num_blocks=num_blocks)


def _selectors(sparse: SparseConfig, model_config: PretrainedConfig) -> list[str]:
    """Those of the layers that are not dense."""
    return [each.selector for layers, each in runs(sparse, kv_shape(model_config)[0]) for _ in layers]


def table(plan: Plan) -> Table:
    """The plan for a person to read."""
    view = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, title_justify="left", title="Plan")
    view.add_column(style="bold")
    view.add_column(justify="right", style="cyan")
    view.add_column(style="dim")

    source, _, shape = plan.speculation.partition(": ")
    where = f"{plan.workers} x {plan.device}"
    if plan.placement == "separate":
        where = f"{plan.workers} + {plan.rollout_workers} x {plan.device}"
    if plan.tensor_parallel > 1:
        where += f", engines of {plan.tensor_parallel}"

    def section(*rows: tuple[str, str, str]) -> None:
        for row in rows:
            view.add_row(*row)
        view.add_section()

    section(
        ("model", plan.model, f"{plan.parameters / 1e6:,.1f}M parameters"),
        ("placement", where, f"{plan.backend}, {plan.placement}, {plan.dtype}"),
    )
    section(
        ("rollouts a step", f"{plan.rollouts_per_step:,}", f"{plan.running_sequences:,} decoded together an engine"),
        ("longest sequence", f"{plan.max_sequence_tokens:,}", "tokens, prompt and response"),
        ("speculation", source, shape),
        ("KV cache", f"{plan.kv_tokens:,}", f"tokens in {plan.kv_blocks:,} blocks"),
    )
    section(
        ("steps", f"{plan.steps:,}", "" if plan.epochs is None else f"{plan.epochs:.2g} passes over the prompts"),
        ("updates a step", f"{plan.updates_per_step:,}", ""),
        ("tokens a step", f"{plan.max_tokens_per_step:,}", "at most"),
        ("passes a step", f"{plan.max_microbatches_per_step:,}", "forward and backward, at most"),
    )
    for kind, memory in plan.memory.items():
        rows = [(name, size, NOTES.get(name, "")) for name, size in memory.always.items()]
        rows += [(name, size, "while rollouts are sampled") for name, size in memory.rollout.items()]
        rows += [(name, size, "while the policy trains") for name, size in memory.training.items()]
        section(*((name, _gigabytes(size), note) for name, size, note in rows if size))
        available = f"estimate; {_gigabytes(plan.available_bytes)} available"
        section((f"memory, {kind}", _gigabytes(memory.total), available))
    return view


def _epochs(config: Config) -> float | None:
    """Passes over the prompts. Of files and hub sets, data.size is only the most that are read."""
    if config.data.source != "reasoning_gym":
        return None
    return config.train.steps * config.rollout.prompts_per_step / config.data.size


def _speculation(config: Config, model_config: PretrainedConfig, device: str) -> str:
    """Where drafts come from, who chooses their shape, and the largest of each, as "source: shape"."""
    sparse = config.sparse
    strategies = configured(config.spec, sparse)
    if sparse.mode in ("plain", "rectified"):
        return f"{sparse.mode}: sampled under {_read(sparse, model_config)}, not as dense"
    if strategies == (OFF,):
        return "off: one token a forward"
    choice = chooser_for(config, model_config, device).summary()["choice"]
    sources = " and ".join(each.source for each in strategies)
    if config.spec.below:
        choice += f" below {config.spec.below} running"
    shapes = []
    for strategy in strategies:
        shape = "chains" if strategy.top_k == 1 else f"trees of {strategy.top_k} children a node"
        shape += f", up to {strategy.depth} deep, {strategy.num_verify} verified"
        shapes.append(f"{shape}, under {_read(sparse, model_config)}" if strategy.source == "sparse" else shape)
    return f"{sources}, {choice}: {'; '.join(dict.fromkeys(shapes))}"


def _read(sparse: SparseConfig, model_config: PretrainedConfig) -> str:
    """The selectors of a policy's layers, and what is read under them."""
    alike = runs(sparse, kv_shape(model_config)[0])
    read = dict.fromkeys(f"{each.selector}, {each.budget_tokens:,} tokens read" for _, each in alike)
    return ", or ".join(read) or "no selector"


def _context_warnings(longest: int, context: int) -> list[str]:
    if longest <= context:
        return []
    sizes = f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
    return [f"{sizes} exceeds the model's context of {context}; lower one of them"]


def _sparse_warnings(sparse: SparseConfig, num_layers: int, longest: int) -> list[str]:
    if sparse.mode == "off":
        return []
    budgets = {each.budget_key: each.sparse.budget_tokens for each in by_layer(sparse, num_layers) if each}
    return [
        f"{key}={budget} is all of the longest sequence's {longest} tokens; lower it, or set sparse.mode=off"
        for key, budget in budgets.items()
        if budget >= longest
    ]


def _kv_warnings(kv_blocks: int, blocks_each: int, running: int) -> list[str]:
    fit = kv_blocks // blocks_each
    if fit >= running:
        return []
    if fit == 0:
        return [f"the KV cache holds {kv_blocks} blocks and a sequence may take {blocks_each}; set rollout.kv_tokens"]
    return [f"the KV cache holds {fit} of {running} sequences at full length; the others wait or are computed again"]


def _memory_warnings(memory: dict[str, Memory], available: int, device: str, *, drafts: bool) -> list[str]:
    remedy = "lower train.micro_tokens or rollout.kv_tokens, or set train.gradient_checkpointing=true"
    if drafts:
        remedy = f"lower drafter.buffer_mb, drafter.feature_window or drafter.draft_vocab; {remedy}"
    return [
        f"the {_gigabytes(each.total)} of a {kind} may not fit in the {_gigabytes(available)} available on {device};"
        f" {remedy}"
        for kind, each in memory.items()
        if each.total > available
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

"""What a configuration comes to: batch sizes, placement and memory, derived without starting anything."""

from dataclasses import dataclass
from math import ceil

import torch
from rich import box
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from configs.schema import Config
from drafter.memory import DrafterBytes, drafter_bytes
from drafter.types import OFF
from kernels.logprob import CHUNK_ELEMENTS
from launch.drafting import starting_shape
from rollout.memory import available_bytes, cache_budget
from rollout.model import bytes_per_block, context_length, resolve_compute
from rollout.strategy import configured, make_chooser

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """Derived sizes of one run. Bytes are estimates for one worker."""

    model: str
    parameters: int
    backend: str
    workers: int
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
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    reference_bytes: int
    kv_bytes: int
    activation_bytes: int
    logits_bytes: int
    graph_bytes: int
    drafter_bytes: int
    drafter_kv_bytes: int
    feature_bytes: int
    total_bytes: int
    available_bytes: int
    warnings: tuple[str, ...]


def derive(config: Config, model_config: PretrainedConfig) -> Plan:
    """Every size that follows from a configuration and its model on this machine. Raises PreflightError."""
    device, dtype = resolve_compute(config.compute)
    drafter = _drafter_bytes(config, model_config, device, getattr(torch, dtype).itemsize)
    itemsize = getattr(torch, dtype).itemsize
    rollout, train, workers = config.rollout, config.train, config.compute.workers
    parameters = count_parameters(model_config)
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    rollouts = rollout.prompts_per_step * rollout.group_size
    running = min(rollout.max_running, ceil(rollout.prompts_per_step / workers) * rollout.group_size)

    weights = parameters * itemsize
    # bfloat16 gradients are added up in float32
    gradients = parameters * (itemsize + (FLOAT32_BYTES if dtype == "bfloat16" else 0))
    masters = 1 if dtype == "bfloat16" or train.zero_stage > 0 else 0
    optimizer = parameters * FLOAT32_BYTES * (2 + masters) // (workers if train.zero_stage > 0 else 1)
    reference = weights if train.kl_coef > 0 else 0
    micro_tokens = min(max(train.micro_tokens, longest), rollouts * longest)
    activations = micro_tokens * _activation_elements(model_config, train.gradient_checkpointing) * itemsize
    logits = max(
        _training_logits_bytes(model_config, micro_tokens, itemsize, device),
        _rollout_logits_bytes(model_config, running * (1 + configured(config.spec)[0].num_verify), itemsize, device),
    )
    graphs = rollout.graph_mb << 20 if device == "cuda" else 0
    available = available_bytes(device) // (1 if device == "cuda" else workers)

    block_bytes = bytes_per_block(model_config, rollout.block_size, getattr(torch, dtype))
    affordable = cache_budget(device, reserved=weights + optimizer + reference + drafter.weights) // block_bytes
    blocks_each = ceil(longest / rollout.block_size)
    kv_blocks = rollout.kv_tokens // rollout.block_size or min(running * blocks_each, affordable)
    kv_bytes = kv_blocks * block_bytes
    total = weights + optimizer + reference + kv_bytes + gradients + activations + logits + graphs + drafter.total
    shares = train.updates_per_step * workers
    warnings = [
        *_context_warnings(longest, context_length(model_config)),
        *_kv_warnings(kv_blocks, blocks_each, running),
        *_memory_warnings(total, available, device, drafts=drafter.total > 0),
    ]
    return Plan(
        model=config.model,
        parameters=parameters,
        backend=config.compute.backend,
        workers=workers,
        device=device,
        dtype=dtype,
        rollouts_per_step=rollouts,
        max_sequence_tokens=longest,
        running_sequences=running,
        speculation=_speculation(config, device),
        kv_blocks=kv_blocks,
        kv_tokens=kv_blocks * rollout.block_size,
        steps=train.steps,
        updates_per_step=train.updates_per_step,
        max_tokens_per_step=rollouts * longest,
        # a pass takes sequences while they fit, hence at least this many of the longest
        max_microbatches_per_step=ceil(rollouts / (micro_tokens // longest)) + shares - 1,
        epochs=_epochs(config),
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        reference_bytes=reference,
        kv_bytes=kv_bytes,
        activation_bytes=activations,
        logits_bytes=logits,
        graph_bytes=graphs,
        drafter_bytes=drafter.weights + drafter.training,
        drafter_kv_bytes=drafter.cache,
        feature_bytes=drafter.rings + drafter.buffer,
        total_bytes=total,
        available_bytes=available,
        warnings=tuple(warnings),
    )


def _drafter_bytes(config: Config, model_config: PretrainedConfig, device: str, itemsize: int) -> DrafterBytes:
    """What a learned drafter takes. One that cannot be read is found out before anything is written."""
    if config.spec.source not in ("eagle", "auto") or config.rollout.backend != "native":
        return DrafterBytes(0, 0, 0, 0, 0)
    return drafter_bytes(
        starting_shape(config, model_config),
        config.drafter,
        num_rows=config.rollout.max_running,
        max_nodes=max(1, make_chooser(config.spec, device=device, seed=config.run.seed).max_num_verify),
        itemsize=itemsize,
    )


def count_parameters(model_config: PretrainedConfig) -> int:
    """Parameters of the model, tied ones once. Nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def table(plan: Plan) -> Table:
    """The plan for a person to read."""
    view = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, title_justify="left", title="Plan")
    view.add_column(style="bold")
    view.add_column(justify="right", style="cyan")
    view.add_column(style="dim")

    source, _, shape = plan.speculation.partition(": ")

    def section(*rows: tuple[str, str, str]) -> None:
        for row in rows:
            view.add_row(*row)
        view.add_section()

    section(
        ("model", plan.model, f"{plan.parameters / 1e6:,.1f}M parameters"),
        ("placement", f"{plan.workers} x {plan.device}", f"{plan.backend}, {plan.dtype}"),
    )
    section(
        ("rollouts a step", f"{plan.rollouts_per_step:,}", f"{plan.running_sequences:,} decoded together a worker"),
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
    parts = {
        "weights": (plan.weight_bytes, plan.dtype),
        "gradients": (plan.gradient_bytes, "with their float32 sums" if plan.dtype == "bfloat16" else ""),
        "optimiser": (plan.optimizer_bytes, "Adam moments and float32 masters"),
        "reference": (plan.reference_bytes, "for the KL term"),
        "KV cache": (plan.kv_bytes, ""),
        "activations": (plan.activation_bytes, "of one pass"),
        "logits": (plan.logits_bytes, "peak"),
        "CUDA graphs": (plan.graph_bytes, "at most"),
        "drafter": (plan.drafter_bytes, "its copies, gradients and optimiser"),
        "drafter's cache": (plan.drafter_kv_bytes, "of sequences that run"),
        "features": (plan.feature_bytes, "hidden states to draft from and learn from"),
    }
    section(*((name, _gigabytes(size), note) for name, (size, note) in parts.items() if size))
    available = f"estimate; {_gigabytes(plan.available_bytes)} available"
    section(("memory a worker", _gigabytes(plan.total_bytes), available))
    return view


def _epochs(config: Config) -> float | None:
    """Passes over the prompts. Of files and hub sets, data.size is only the most that are read."""
    if config.data.source != "reasoning_gym":
        return None
    return config.train.steps * config.rollout.prompts_per_step / config.data.size


def _speculation(config: Config, device: str) -> str:
    """Where drafts come from, who chooses their shape, and the widest, as "source: shape"."""
    strategies = configured(config.spec)
    strategy = strategies[0]
    if strategy == OFF:
        return "off: one token a forward"
    shape = "chains" if strategy.top_k == 1 else f"trees of {strategy.top_k} children a node"
    choice = make_chooser(config.spec, device=device, seed=config.run.seed).summary()["choice"]
    sources = " and ".join(each.source for each in strategies)
    if config.spec.below:
        choice += f" below {config.spec.below} running"
    return f"{sources}, {choice}: {shape}, up to {strategy.depth} deep, {strategy.num_verify} verified"


def _activation_elements(model_config: PretrainedConfig, checkpointing: bool) -> int:
    """Elements a token leaves for the backward pass: norms, projections and the gated MLP of every layer."""
    text = model_config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    layer = 8 * hidden + 4 * (getattr(text, "intermediate_size", None) or 4 * hidden)
    return int(layers * hidden + layer if checkpointing else layers * layer)


def _training_logits_bytes(model_config: PretrainedConfig, tokens: int, itemsize: int, device: str) -> int:
    """Logits and their gradient; without the GPU's kernel, two float32 chunks on the way."""
    chunks = 0 if device == "cuda" else 2 * CHUNK_ELEMENTS[device] * FLOAT32_BYTES
    return int(2 * tokens * model_config.get_text_config().vocab_size * itemsize + chunks)


def _rollout_logits_bytes(model_config: PretrainedConfig, rows: int, itemsize: int, device: str) -> int:
    """Logits of one cycle; without the GPU's kernel, a float32 copy to sample from."""
    copies = 0 if device == "cuda" else FLOAT32_BYTES
    return int(rows * model_config.get_text_config().vocab_size * (itemsize + copies))


def _context_warnings(longest: int, context: int) -> list[str]:
    if longest <= context:
        return []
    sizes = f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
    return [f"{sizes} exceeds the model's context of {context}; lower one of them"]


def _kv_warnings(kv_blocks: int, blocks_each: int, running: int) -> list[str]:
    fit = kv_blocks // blocks_each
    if fit >= running:
        return []
    if fit == 0:
        return [f"the KV cache holds {kv_blocks} blocks and a sequence may take {blocks_each}; set rollout.kv_tokens"]
    return [f"the KV cache holds {fit} of {running} sequences at full length; the others wait or are computed again"]


def _memory_warnings(total: int, available: int, device: str, *, drafts: bool) -> list[str]:
    if total <= available:
        return []
    remedy = "lower train.micro_tokens or rollout.kv_tokens, or set train.gradient_checkpointing=true"
    if drafts:
        remedy = f"lower drafter.buffer_mb, drafter.feature_window or drafter.draft_vocab; {remedy}"
    return [f"{_gigabytes(total)} may not fit in the {_gigabytes(available)} available on {device}; {remedy}"]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

"""Device memory of each kind of process, by what holds it and when, derived without allocating any.

What DeepSpeed keeps is as its buffers are, seen in 0.19.8; what a forward pass leaves for the backward one is found by
running it on tensors without memory.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from configs.schema import Config
from drafter.memory import DrafterBytes, GateBytes
from kernels.logprob import CHUNK_ELEMENTS
from launch.shares import Share
from rl.zero import BUCKET_ELEMENTS, LIVE_ELEMENTS
from rollout.graphs import BUCKETS, bucket
from rollout.model import ATTENTION, forward_packed
from rollout.strategy import arms, configured

FLOAT32_BYTES = 4
GRAPH_BYTES = 35_000  # that the driver keeps of a graph's every layer: docs/results/graphs_h100.json, 54 of 30 layers


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process, by name: always there, there while rollouts are sampled, there while the policy trains."""

    always: dict[str, int] = field(default_factory=dict)
    rollout: dict[str, int] = field(default_factory=dict)
    training: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """At the worst moment."""
        return sum(self.always.values()) + max(sum(self.rollout.values()), sum(self.training.values()))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the memory of a run depends on. tokens: of a rank's forward and backward pass; rows: decoded together.

    share: what an engine's process has of the policy, where it samples apart from the trainers. saved: bytes that a
    forward pass of these tokens keeps for the backward one; lowbit: of the copy that drafts read; watched: of what a
    selector keeps of the running texts.
    """

    parameters: int
    dtype: torch.dtype
    device: str
    ranks: int
    tokens: int
    rows: int
    kv_bytes: int
    drafter: DrafterBytes
    share: Share
    saved: int
    lowbit: int = 0
    gates: GateBytes = GateBytes()
    watched: int = 0


def memory_of(config: Config, model_config: PretrainedConfig, sizes: Sizes) -> dict[str, Memory]:
    """Of a worker that trains and samples; or of a trainer and of an engine, where these are apart."""
    states, step = _states(config, sizes), _step(config, model_config, sizes)
    weights = sizes.parameters * sizes.dtype.itemsize
    cache = {
        "KV cache": sizes.kv_bytes,
        "block weights": sizes.watched,
        "CUDA graphs": 0 if sizes.device == "cpu" else graph_bytes(config, sizes.share.config, sizes),
    }
    learned = _made_by_lessons(config, sizes.drafter)
    drafter = {
        "drafter": sizes.drafter.weights + sizes.drafter.training - learned,
        "drafter's lessons": learned + sizes.drafter.graphs + sizes.drafter.checkpoint,
        "drafter's cache": sizes.drafter.cache,
        "gates": sizes.gates.weights,
        "gates' lessons": sizes.gates.training,
        "gate samples": sizes.gates.samples,
        "8-bit copy": sizes.lowbit,
        "features": sizes.drafter.rings + sizes.drafter.buffer,
    }
    sampled = {"logits": _rollout_logits(config, model_config, sizes)}
    shares = config.train.zero_stage == 3
    held = {"weights": weights // sizes.ranks if shares else weights}
    if config.compute.placement == "separate":
        bucket = {"bucket": min(config.compute.bucket_mb << 20, weights)}
        own = {"weights": sizes.share.parameters * sizes.dtype.itemsize}
        arriving = bucket | {"uncut": sizes.share.cut * sizes.dtype.itemsize}
        return {
            "trainer": Memory(always=held | states, rollout=bucket, training=step),
            "engine": Memory(always=own | cache | drafter, rollout=sampled, training=arriving),
        }
    if shares:
        held["whole copy"] = weights
    if config.train.offload == "rollout":
        return {"worker": Memory(always=held | drafter, rollout=cache | sampled, training=states | step)}
    return {"worker": Memory(always=held | states | cache | drafter, rollout=sampled, training=step)}


def _made_by_lessons(config: Config, drafter: DrafterBytes) -> int:
    """Of what training the drafter takes, what its first lesson makes: gradients, and without a head to begin with the
    weights that failures go back to. The moments are made with the head."""
    if not config.drafter.train:
        return 0
    each = drafter.training // 4  # all four are as large as the weights
    return each if config.drafter.init else 2 * each


def _states(config: Config, sizes: Sizes) -> dict[str, int]:
    """Moments, masters, the reference, and buffers of gradients that stay from step to step."""
    stage = trained_stage(config, sizes.dtype)
    masters = 1 if stage > 0 else 0
    ranks = sizes.ranks if stage > 0 else 1
    bucket = min(sizes.parameters, BUCKET_ELEMENTS) * FLOAT32_BYTES
    match stage, sizes.dtype:
        case 1, torch.bfloat16:
            gradients = sizes.parameters * FLOAT32_BYTES  # a flat buffer of them all, in float32
        case 3, _:
            gradients = sizes.parameters * FLOAT32_BYTES // ranks + bucket
        case _:
            gradients = 0
    return {
        "optimiser": sizes.parameters * FLOAT32_BYTES * (2 + masters) // ranks,
        "gradients": gradients,
        "reference": sizes.parameters * sizes.dtype.itemsize if config.train.kl_coef > 0 else 0,
    }


def trained_stage(config: Config, dtype: torch.dtype) -> int:
    """The ZeRO stage that a configuration runs as: in bfloat16 0 runs as 1."""
    return 1 if config.train.zero_stage == 0 and dtype == torch.bfloat16 else config.train.zero_stage


def _step(config: Config, model_config: PretrainedConfig, sizes: Sizes) -> dict[str, int]:
    """What one forward and backward pass adds: activations, logits and their gradient, gradients on their way."""
    stage = trained_stage(config, sizes.dtype)
    bucket = min(sizes.parameters, BUCKET_ELEMENTS) * FLOAT32_BYTES
    layers = model_config.get_text_config().num_hidden_layers
    if stage == 3:
        # parameters put together on the way; gradients as they come are those of a layer or so
        passing = min(sizes.parameters, LIVE_ELEMENTS) * sizes.dtype.itemsize
    elif stage == 1 and sizes.dtype == torch.bfloat16:
        passing = sizes.parameters * sizes.dtype.itemsize // layers
    elif stage == 2:
        passing = sizes.parameters * FLOAT32_BYTES // sizes.ranks + 2 * bucket
    else:
        passing = sizes.parameters * FLOAT32_BYTES + (bucket if stage else 0)
    layer = sizes.saved // layers
    boundary = sizes.tokens * model_config.get_text_config().hidden_size * sizes.dtype.itemsize
    activations = layers * boundary + layer if config.train.gradient_checkpointing else sizes.saved
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    responses = sizes.tokens * config.rollout.max_new_tokens // longest
    chunks = 0 if sizes.device == "cuda" else 2 * CHUNK_ELEMENTS[sizes.device] * FLOAT32_BYTES
    logits = 2 * responses * model_config.get_text_config().vocab_size * sizes.dtype.itemsize + chunks
    # the logits' gradient is gone when that of a layer is made
    return {"gradients on their way": passing, "activations": activations, "logits": max(logits, layer)}


def _rollout_logits(config: Config, model_config: PretrainedConfig, sizes: Sizes) -> int:
    """Of one cycle; without the GPU's kernel, a float32 copy to sample from."""
    rows = sizes.rows * (1 + max(each.num_verify for each in configured(config.spec, config.sparse)))
    copies = 0 if sizes.device == "cuda" else FLOAT32_BYTES
    return int(rows * model_config.get_text_config().vocab_size * (sizes.dtype.itemsize + copies))


def graph_bytes(config: Config, model_config: PretrainedConfig, sizes: Sizes) -> int:
    """Of the graphs of every strategy and batch size that rollouts pass through: what the widest cycle computes with,
    in memory that all share, and what the driver keeps of each."""
    text = model_config.get_text_config()
    strategies = arms(config.spec, config.sparse)
    num_batches = len([size for size in BUCKETS if size < sizes.rows]) + 1
    layers = text.num_hidden_layers
    targets = num_batches * len({strategy.num_verify for strategy in strategies}) * layers
    # a head has one layer, and the policy that drafts for itself all of them
    drafts = num_batches * sum(each.depth * (layers if each.source == "sparse" else 1) for each in strategies)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = 2 * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    layer = 4 * text.hidden_size + (2 * text.num_attention_heads + keys) * head_dim + 2 * text.intermediate_size
    tokens = bucket(sizes.rows) * (1 + max(strategy.num_verify for strategy in strategies))
    # twice a layer's: attention's partial results, and blocks that the allocator could not fill
    shared = tokens * (text.vocab_size + 2 * layer) * sizes.dtype.itemsize
    return int(min(config.rollout.graph_mb << 20, shared + (targets + drafts) * GRAPH_BYTES))


def saved_bytes(model_config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """What the decoder keeps of so many tokens between its forward and its backward pass, parameters apart."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
        )
        index = torch.zeros(tokens, dtype=torch.int64)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}  # kept, so that none is made where another one was

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward_packed(model, index, index, _SavedByAttention.attend, index[:1])
    return sum(storage.nbytes() for storage in seen.values())


class _SavedByAttention(torch.autograd.Function):
    """Keeps what attention over packed sequences does on a GPU: queries, keys and values of every query head, output,
    and a float32 log-sum a head; computes nothing."""

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        """As rollout.model.Attend."""
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        out: torch.Tensor = _SavedByAttention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)))
        return out[None]

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise AssertionError("nothing was computed")

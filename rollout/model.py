"""The policy: a transformers causal LM whose attention is ours, in training and in rollout alike."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from configs.errors import PreflightError
from configs.schema import ComputeConfig
from kernels.attention import PackedSequences, PagedSequences, packed_attention, paged_attention
from kernels.cache import move_kv, write_kv

ATTENTION = "paceline"


class PagedCache:
    """Keys and values of all layers, in blocks. storage [layers, 2, num_blocks, block_size, Hkv, D]."""

    def __init__(
        self, config: PretrainedConfig, *, num_blocks: int, block_size: int, device: str, dtype: torch.dtype
    ) -> None:
        layers, heads, head_dim = _kv_shape(config)
        # zeros: attention multiplies masked slots by 0, so what they hold must be finite
        self.storage = torch.zeros(layers, 2, num_blocks, block_size, heads, head_dim, device=device, dtype=dtype)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's key and value cache, [num_blocks, block_size, Hkv, D] each."""
        return self.storage[index, 0], self.storage[index, 1]

    def move(self, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
        """Copy entries between slots in every layer, all reads before all writes. [M] int64 each."""
        for index in range(len(self.storage)):
            move_kv(*self.layer(index), src_slots, dst_slots)


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What one forward's attention works on: packed sequences, or paged ones and their cache."""

    seqs: PackedSequences | PagedSequences
    cache: PagedCache | None = None


def bytes_per_block(config: PretrainedConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    layers, heads, head_dim = _kv_shape(config)
    return 2 * layers * block_size * heads * head_dim * dtype.itemsize


def context_length(config: PretrainedConfig) -> int:
    """The most tokens, prompt and response together, that the model has positions for."""
    return int(config.get_text_config().max_position_embeddings)


def resolve_compute(compute: ComputeConfig) -> tuple[str, str]:
    """The (device, dtype) that a configuration means on this machine. Raises PreflightError without a CUDA device."""
    has_cuda = torch.cuda.is_available()
    if compute.device == "cuda" and not has_cuda:
        raise PreflightError('compute.device="cuda", but torch sees no CUDA device; set compute.device=cpu')
    device = compute.device
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if compute.dtype != "auto":
        return device, compute.dtype
    # "torch.cpu" knows the processor, though not yet under public names
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, "bfloat16" if fast else "float32"


def load_policy(path: Path, *, device: str, dtype: str) -> PreTrainedModel:
    """The model in a transformers folder, without dropout, its attention ours. Raises PreflightError."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=ATTENTION,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise PreflightError(f"{path}: the weights lack {sorted(info['missing_keys'])[0]}")
    return model.to(device).eval()


def forward_packed(
    model: torch.nn.Module,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    seqs: PackedSequences,
    select: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of packed sequences, with gradients.

    model may be an engine that wraps the policy. Shapes: token_ids, positions [T] int64; select [S] int64, the tokens
    whose logits are wanted, None for all. Returns [S or T, V].
    """
    return _forward(model, token_ids, positions, AttentionContext(seqs), select)


@torch.inference_mode()
def forward_paged(
    model: torch.nn.Module,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    seqs: PagedSequences,
    cache: PagedCache,
    select: torch.Tensor,
) -> torch.Tensor:
    """Logits of new tokens over a paged cache, which their keys and values are written to.

    Shapes: token_ids, positions [T] int64; select [S] int64. Returns [S, V].
    """
    return _forward(model, token_ids, positions, AttentionContext(seqs, cache), select)


def _forward(
    model: torch.nn.Module,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    context: AttentionContext,
    select: torch.Tensor | None,
) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": token_ids[None], "position_ids": positions[None]}
    policy: Any = model if isinstance(model, PreTrainedModel) else model.module
    keeps = "logits_to_keep" in inspect.signature(policy.forward).parameters
    if select is not None and keeps:
        inputs["logits_to_keep"] = select
    logits = model(**inputs, use_cache=False, paceline=context).logits[0]
    return logits if select is None or keeps else logits[select]


def _kv_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Layers, key heads and head dimension of a model."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, heads, head_dim


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paceline: AttentionContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Our attention under transformers' contract. query [1, Hq, T, D]; key, value [1, Hkv, T, D].

    Returns ([1, T, Hq, D], None).
    """
    if paceline is None:
        raise RuntimeError("the model did not hand paceline=AttentionContext(...) down to its attention")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    seqs = paceline.seqs
    options: dict[str, Any] = {"scale": scaling, "sliding_window": sliding_window, "softcap": softcap}
    if isinstance(seqs, PackedSequences):
        return packed_attention(query, key, value, seqs, **options)[None], None
    assert paceline.cache is not None
    key_cache, value_cache = paceline.cache.layer(module.layer_idx)
    write_kv(key, value, key_cache, value_cache, seqs.slots)
    return paged_attention(query, key_cache, value_cache, seqs, **options)[None], None


def _no_mask(**kwargs: Any) -> None:
    """The mask of our attention: none, since the context says who sees whom."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)

"""The policy: a transformers causal LM whose attention is ours, in training and in rollout alike."""

import inspect
from collections.abc import Callable
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

from configs.errors import PreflightError, ResourceError
from configs.schema import ComputeConfig
from kernels.attention import (
    PackedSequences,
    PagedSequences,
    most_rows,
    packed_attention,
    paged_attention,
    paged_sequences,
)
from kernels.cache import move_kv, write_kv
from rollout.pretrained import require_weights
from rollout.projections import lay_side_by_side

ATTENTION = "paceline"  # also the keyword that carries the AttentionContext down to the layers


class PagedCache:
    """Keys and values of all layers, in blocks. storage [layers, 2, num_blocks + 1, block_size, Hkv, D].

    The last block is nobody's: rows that pad a batch write there, so that their keys need no branch.
    """

    def __init__(
        self, config: PretrainedConfig, *, num_blocks: int, block_size: int, device: str, dtype: torch.dtype
    ) -> None:
        layers, heads, head_dim = kv_shape(config)
        # zeros: attention multiplies masked slots by 0, so what they hold must be finite
        self.storage = torch.zeros(layers, 2, num_blocks + 1, block_size, heads, head_dim, device=device, dtype=dtype)
        self.dummy_block = num_blocks
        self.dummy_slot = num_blocks * block_size

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's key and value cache, [num_blocks + 1, block_size, Hkv, D] each."""
        return self.storage[index, 0], self.storage[index, 1]

    def move(self, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
        """Copy entries between slots in every layer, all reads before all writes. [M] int64 each."""
        move_kv(self.storage, src_slots, dst_slots)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int | None, float | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What one forward's attention works on: packed sequences, or paged ones and their cache.

    In its place a layer may be given a function of (query, key, value, scaling, sliding_window, softcap) that attends,
    shapes as in attend: where the layer is compiled, its attention must not be looked into.
    """

    seqs: PackedSequences | PagedSequences
    cache: PagedCache | None = None


def bytes_per_block(config: PretrainedConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    layers, heads, head_dim = kv_shape(config)
    return 2 * layers * block_size * heads * head_dim * dtype.itemsize


def context_length(config: PretrainedConfig) -> int:
    """The most tokens, prompt and response together, that the model has positions for. Raises PreflightError."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        raise PreflightError(
            f"model type {config.model_type!r} states no max_position_embeddings; add it to config.json"
        )
    return int(limit)


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


def load_config(path: Path) -> PretrainedConfig:
    """The model config of a transformers folder, without its weights. Raises PreflightError."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PreflightError(
            f"{path}/config.json is not a model config that transformers can read: {reason}"
        ) from error


def load_policy(path: Path, *, device: str, dtype: str) -> PreTrainedModel:
    """The model in a transformers folder, without dropout, its attention ours.

    Raises PreflightError, naming the file or tensor, for weights that are missing, damaged or do not fit the
    architecture and for an architecture our attention cannot serve; ResourceError when the device cannot hold it.
    """
    require_weights(path)
    config = load_config(path)
    require_groups(config, device=device, dtype=dtype)
    try:
        _drop_dropout(config)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=ATTENTION,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PreflightError(f"{path}: transformers cannot load a causal LM from it: {reason}") from error
    if info["missing_keys"]:
        raise PreflightError(f"{path}: the weights lack {_first(info['missing_keys'])}; fetch the model again")
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise PreflightError(f"{path}: {name} has shape {list(found)} where config.json means {list(wanted)}")
    try:
        model = model.to(device).eval()
        lay_side_by_side(model)
    except torch.OutOfMemoryError as error:
        gigabytes = model.get_memory_footprint() / 1e9
        raise ResourceError(f"{path}: {gigabytes:.1f} GB of {dtype} weights do not fit on {device}") from error
    try:
        _prove(model)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{path}: {device} has no memory left for activations beside the weights") from error
    except (PreflightError, RuntimeError, TypeError, AttributeError) as error:  # whatever a foreign architecture does
        raise PreflightError(f"{path}: {config.model_type!r} cannot run on paged attention: {error}") from error
    return model


def _drop_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability to 0 in place: rollouts are sampled without, so training scores them without."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def _first(names: set[str]) -> str:
    return sorted(names)[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _rope_types(config: PretrainedConfig) -> set[str]:
    """The kinds of rotary embedding a model uses; its parameters may stand once, or once a layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if "rope_type" in part}


@torch.inference_mode()
def _prove(model: PreTrainedModel) -> None:
    """Run two tokens and see that every layer attends through our cache; what cannot is refused before the run."""
    text = model.config.get_text_config()
    if other := set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise PreflightError(f"its layers include {_first(other)}")
    if getattr(text, "use_bidirectional_attention", None):
        raise PreflightError("its attention is not causal")
    if adaptive := _rope_types(text) & {"dynamic", "longrope"}:
        # their frequencies follow the longest position of the whole forward: a token would depend on its neighbours
        raise PreflightError(
            f"its rotary embedding is {_first(adaptive)}, which changes with what else is in the batch"
        )
    index = torch.arange(2, device=model.device)
    cache, seqs = alone(model, num_tokens=2)
    logits = forward_paged(model, index, index, seqs, cache, index)
    if not logits.isfinite().all():
        raise PreflightError("its logits are not finite: the weights are damaged, or overflow in this dtype")
    if silent := [layer for layer, entries in enumerate(cache.storage) if not entries[0].any()]:
        raise PreflightError(f"layer {silent[0]} keeps no keys in the cache")


def layers_of(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The decoder layers, and what the model's decoder calls them."""
    count = model.config.get_text_config().num_hidden_layers
    for name, child in model.base_model.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == count:
            return name, child
    raise AssertionError(f"{type(model.base_model).__name__} has no list of {count} layers")


def alone(model: PreTrainedModel, *, num_tokens: int) -> tuple[PagedCache, PagedSequences]:
    """One sequence of new tokens and an empty cache for it: what a first look at a model is taken with."""
    block_size = 16
    num_blocks = -(-num_tokens // block_size)
    device = model.device
    cache = PagedCache(
        model.config, num_blocks=num_blocks, block_size=block_size, device=str(device), dtype=model.dtype
    )
    seqs = paged_sequences(
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        max_seqlen_q=num_tokens,
        context_lens=torch.zeros(1, dtype=torch.int32, device=device),
        max_context=0,
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slots=torch.arange(num_tokens, device=device),
        block_size=block_size,
    )
    return cache, seqs


def forward_packed(
    model: torch.nn.Module,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    seqs: PackedSequences | Attend,
    select: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of packed sequences, with gradients. seqs: where they lie, or how their tokens attend.

    model may be an engine that wraps the policy. Shapes: token_ids, positions [T] int64; select [S] int64, the tokens
    whose logits are wanted, None for all. Returns [S or T, V].
    """
    context = AttentionContext(seqs) if isinstance(seqs, PackedSequences) else seqs
    return _forward(model, token_ids, positions, context, select)


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
    context: AttentionContext | Attend,
    select: torch.Tensor | None,
) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": token_ids[None], "position_ids": positions[None]}
    policy: Any = model if isinstance(model, PreTrainedModel) else model.module
    keeps = "logits_to_keep" in inspect.signature(policy.forward).parameters
    if select is not None and keeps:
        inputs["logits_to_keep"] = select
    logits = model(**inputs, use_cache=False, paceline=context).logits[0]
    return logits if select is None or keeps else logits[select]


def kv_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Layers, key heads and head dimension of a model."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, heads, head_dim


def require_groups(config: PretrainedConfig, *, device: str, dtype: str) -> None:
    """Raise PreflightError where more query heads share a key head than the device's attention computes together."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if torch.device(device).type == "cpu" or heads is None:  # what has no attention is refused when it is tried
        return
    _, kv_heads, head_dim = kv_shape(config)
    groups, most = heads // kv_heads, most_rows(head_dim, getattr(torch, dtype))
    if groups <= most:
        return
    remedy = "compute.dtype=bfloat16" if groups <= most_rows(head_dim, torch.bfloat16) else "compute.device=cpu"
    raise PreflightError(
        f"{groups} query heads of {head_dim} share a key head, and attention on a GPU takes {most} at most in {dtype};"
        f" set {remedy}"
    )


class MissingContextError(RuntimeError):
    """Our attention was reached without an AttentionContext."""


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paceline: AttentionContext | Attend | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Our attention under transformers' contract. query [1, Hq, T, D]; key, value [1, Hkv, T, D].

    Returns ([1, T, Hq, D], None).
    """
    if paceline is None:
        raise MissingContextError(
            "no paceline=AttentionContext(...) reached the attention; call the policy through forward_packed or "
            "forward_paged, or load it with attn_implementation='sdpa'"
        )
    if not isinstance(paceline, AttentionContext):
        return paceline(query, key, value, scaling, sliding_window, softcap), None
    _refuse_what_it_ignores(module, attention_mask, sliding_window, kwargs)
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    return attend(paceline, module.layer_idx, query, key, value, **options), None


def attend(
    context: AttentionContext,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One layer's attention; over a paged cache, keys and values are written to it first.

    Shapes: query [1, Hq, T, D]; key, value [1, Hkv, T, D]. Returns [1, T, Hq, D].
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    seqs = context.seqs
    options: dict[str, Any] = {"scale": scaling, "sliding_window": sliding_window, "softcap": softcap}
    if isinstance(seqs, PackedSequences):
        return packed_attention(query, key, value, seqs, **options)[None]
    assert context.cache is not None
    key_cache, value_cache = context.cache.layer(layer)
    if not key.shape[1:] == value.shape[1:] == key_cache.shape[2:]:
        shapes = f"keys {list(key.shape[1:])} and values {list(value.shape[1:])}"
        raise PreflightError(f"layer {layer} has {shapes} where the others have {list(key_cache.shape[2:])}")
    write_kv(key, value, key_cache, value_cache, seqs.slots)
    return paged_attention(query, key_cache, value_cache, seqs, **options)[None]


def _refuse_what_it_ignores(
    module: Any, attention_mask: torch.Tensor | None, sliding_window: int | None, kwargs: dict[str, Any]
) -> None:
    """Raise PreflightError where a model means more by its attention than ours computes."""
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise PreflightError("it brings an attention mask of its own, or is not causal")
    if kwargs.get("dropout"):
        raise PreflightError(f"its attention drops out with probability {kwargs['dropout']}")
    for name, value in kwargs.items():
        # positions are in the keys already; attention sinks, biases and the like would be lost
        if isinstance(value, torch.Tensor) and name not in ("position_ids", "cache_position"):
            raise PreflightError(f"its attention takes {name}")
    if sliding_window is None:
        config, layer = module.config, module.layer_idx
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if types[layer] == "sliding_attention" if types else window is not None:
            raise PreflightError(f"layer {layer} has a window it does not hand to its attention")


def _no_mask(**kwargs: Any) -> None:
    """The mask of our attention: none, since the context says who sees whom."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)

"""The parameters of a standard decoder, read where they are, or the reason why a model is none.

Standard is what Llama, Qwen2, Qwen3 and Mistral without a window share: RMSNorm before attention and MLP, q, k, v with
or without bias, norms per head or none, rotary embedding, SwiGLU. What is refused raises NotStandardError.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from kernels.linear import Norm, gated_linear, linear
from rollout.projections import side_by_side


class NotStandardError(Exception):
    """A model is not what FusedDecoder computes. The message completes "because ..."."""


class Product(Protocol):
    """What a layer multiplies tokens by."""

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """norm(x) weight^T + bias + residual. x [T, in]; returns [T, out]."""


class GatedProduct(Protocol):
    """The first half of a layer's MLP."""

    def __call__(self, x: torch.Tensor, *, norm: Norm) -> torch.Tensor:
        """silu(norm(x) gate^T) * (norm(x) up^T). x [T, in]; returns [T, out]."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer's parameters. weight [out, in]; bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Product."""
        return linear(x, self.weight, bias=self.bias, norm=norm, residual=residual)


@dataclass(frozen=True, slots=True)
class GatedProjection:
    """The two linear layers of an MLP that read the same input. gate, up [out, in]."""

    gate: torch.Tensor
    up: torch.Tensor

    def __call__(self, x: torch.Tensor, *, norm: Norm) -> torch.Tensor:
        """As GatedProduct."""
        return gated_linear(x, self.gate, self.up, norm=norm)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's parameters. qkv: one product where the three lie side by side, else three."""

    attention_norm: Norm
    qkv: tuple[Product, ...]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None
    head_norm_eps: float
    output: Product
    mlp_norm: Norm
    gated: GatedProduct
    down: Product


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention. scale multiplies the scores."""

    num_query: int
    num_kv: int
    dim: int
    scale: float


def require_standard_config(model_config: PretrainedConfig) -> None:
    """Refuse what few tokens would not show."""
    config = model_config.get_text_config()
    for name, value in config.to_dict().items():
        if "softcap" in name and value:
            raise NotStandardError(f"its config sets {name}={value}")
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if set(types) - {"full_attention"} if types else window is not None:
        raise NotStandardError("its attention has a sliding window")


def require_children(module: nn.Module, *names: str, optional: tuple[str, ...] = ()) -> None:
    """Refuse a module without these children, or with others."""
    children = {name for name, _ in module.named_children()}
    if missing := set(names) - children:
        raise NotStandardError(f"its {type(module).__name__} has no {sorted(missing)[0]}")
    if unknown := children - {*names, *optional}:
        raise NotStandardError(f"its {type(module).__name__} has a {sorted(unknown)[0]}")


def read_layer(layer: nn.Module) -> Layer:
    """A decoder layer's parameters, where they are."""
    require_children(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    require_children(attention, "q_proj", "k_proj", "v_proj", "o_proj", optional=("q_norm", "k_norm"))
    require_children(mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
    if not isinstance(mlp.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
        raise NotStandardError(f"its activation is {type(mlp.act_fn).__name__}")
    gate, up = read_projection(mlp.gate_proj), read_projection(mlp.up_proj)
    if gate.bias is not None or up.bias is not None:
        raise NotStandardError("its MLP has biases")
    query_norm, key_norm = (
        read_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
    )
    for norm in (query_norm, key_norm):
        if norm is not None and len(norm.weight) != attention.head_dim:
            raise NotStandardError("its query and key norms are not per head")
    epsilons = {norm.eps for norm in (query_norm, key_norm) if norm is not None} or {0.0}
    if len(epsilons) > 1:
        raise NotStandardError("its query and key norms differ in eps")
    return Layer(
        attention_norm=read_norm(layer.input_layernorm),
        qkv=_joined(*(read_projection(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))),
        q_norm=None if query_norm is None else query_norm.weight,
        k_norm=None if key_norm is None else key_norm.weight,
        head_norm_eps=epsilons.pop(),
        output=read_projection(attention.o_proj),
        mlp_norm=read_norm(layer.post_attention_layernorm),
        gated=GatedProjection(gate.weight, up.weight),
        down=read_projection(mlp.down_proj),
    )


def _joined(*projections: Projection) -> tuple[Projection, ...]:
    """One projection where the memory allows it, else the projections as they are."""
    weight = side_by_side([each.weight for each in projections])
    biases = [each.bias for each in projections if each.bias is not None]
    bias = side_by_side(biases) if len(biases) == len(projections) else None
    if weight is None or (biases and bias is None):
        return projections
    return (Projection(weight, bias),)


def read_heads(layers: Any) -> Heads:
    """The shape of attention, which all layers share."""
    shapes = set()
    for layer in layers:
        attention = layer.self_attn
        dim = int(attention.head_dim)
        shapes.add(
            Heads(
                num_query=attention.q_proj.out_features // dim,
                num_kv=attention.k_proj.out_features // dim,
                dim=dim,
                scale=float(attention.scaling),
            )
        )
    if len(shapes) != 1:
        raise NotStandardError("its layers differ in their heads")
    return shapes.pop()


def read_projection(linear: nn.Module) -> Projection:
    """A linear layer's parameters, where they are."""
    if type(linear) is not nn.Linear:
        raise NotStandardError(f"a projection is a {type(linear).__name__}")
    return Projection(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def read_norm(norm: Any) -> Norm:
    """An RMSNorm's parameters."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not isinstance(eps, float):
        raise NotStandardError(f"its {type(norm).__name__} is not an RMSNorm")
    return Norm(weight=norm.weight.detach(), eps=eps)

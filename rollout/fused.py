"""The standard decoder on our kernels: a handful of launches a layer, over the parameters that training updates.

Standard is what Llama, Qwen2, Qwen3 and Mistral without a window share: RMSNorm before attention and MLP, q, k, v with
or without bias, norms per head or none, rotary embedding, SwiGLU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from kernels.attention import PagedSequences
from kernels.linear import Norm, gated_linear, linear, rms_norm
from kernels.rope_attention import plan_rope_and_attend, rope_and_attend
from rollout.collectives import Ranks
from rollout.model import PagedCache
from rollout.projections import addresses, side_by_side


class NotStandardError(Exception):
    """A model is not what FusedDecoder computes. The message completes "because ..."."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer's parameters. weight [out, in]; bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's parameters. qkv: one projection where the three lie side by side, else three."""

    attention_norm: Norm
    qkv: tuple[Projection, ...]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None
    head_norm_eps: float
    output: Projection
    mlp_norm: Norm
    gate: torch.Tensor
    up: torch.Tensor
    down: Projection


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention. scale multiplies the scores."""

    num_query: int
    num_kv: int
    dim: int
    scale: float


class FusedDecoder:
    """rollout.decoder.Decoder for the standard architecture.

    Reads parameters where they are when it is made: updates in place are seen at once, and parameters that have moved
    make it stale. ranks: who holds the other shares of the parameters (rollout/parallel.py); None where these are all.
    Raises NotStandardError for another architecture, as far as that can be told from its modules and config
    (rollout/decoder.py compares the numbers).
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks | None = None) -> None:
        _require_standard_config(model)
        self._model = model
        self._ranks = ranks
        base = model.base_model
        _require_children(base, "embed_tokens", "layers", "norm", "rotary_emb")
        _require_children(model, model.base_model_prefix, "lm_head")
        if type(base.embed_tokens) is not nn.Embedding:
            raise NotStandardError(f"its embedding is a {type(base.embed_tokens).__name__}")
        self._embedding = base.embed_tokens.weight.detach()
        self._layers = [_read_layer(layer) for layer in base.layers]
        self._heads = _read_heads(base.layers)
        self._norm = _read_norm(base.norm)
        self._head = _read_projection(model.lm_head)
        self._made_for = addresses(model)
        self._cos, self._sin = self._rotary(16)

    @torch.inference_mode()
    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, cache: PagedCache
    ) -> torch.Tensor:
        """The final hidden state of each new token. token_ids, positions [T] int64. Returns [T, H]."""
        return self.forward_with_aux(token_ids, positions, seqs, cache, ())[0]

    @torch.inference_mode()
    def forward_with_aux(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        seqs: PagedSequences,
        cache: PagedCache,
        layers: Sequence[int],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The final hidden state of each new token, and what entered these layers: [T, H], and as much for each."""
        hidden = self.embed(token_ids)
        entered: dict[int, torch.Tensor] = {}
        for index in range(len(self._layers)):
            if index in layers:
                entered[index] = hidden
            hidden = self.layer(index, hidden, positions, seqs, cache)
        return self.norm(hidden), tuple(entered[index] for index in layers)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] to [S, V], in the model's dtype."""
        logits = linear(hidden, self._head.weight, bias=self._head.bias)
        return logits if self._ranks is None else self._ranks.gather_columns(logits)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 to [T, H]."""
        return F.embedding(token_ids, self._embedding)

    def layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, cache: PagedCache
    ) -> torch.Tensor:
        """One decoder layer, whose keys and values are written to the cache. [T, H] to [T, H]."""
        layer, heads = self._layers[index], self._heads
        key_cache, value_cache = cache.layer(index)
        plan_rope_and_attend(
            seqs, num_heads=heads.num_query, num_kv_heads=heads.num_kv, head_dim=heads.dim, dtype=hidden.dtype
        )
        attended = rope_and_attend(
            _project(layer.qkv, hidden, layer.attention_norm),
            positions,
            self._cos,
            self._sin,
            key_cache,
            value_cache,
            seqs,
            num_heads=heads.num_query,
            num_kv_heads=heads.num_kv,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=layer.head_norm_eps,
            scale=heads.scale,
        )
        hidden = self._add(layer.output, attended.flatten(1), hidden)
        gated = gated_linear(hidden, layer.gate, layer.up, norm=layer.mlp_norm)
        return self._add(layer.down, gated, hidden)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm after the last layer."""
        return rms_norm(hidden, self._norm)

    def reach(self, num_positions: int) -> bool:
        """Make ready for positions below this; whether that took new tables, which no captured forward reads."""
        if num_positions <= len(self._cos):
            return False
        self._cos, self._sin = self._rotary(num_positions)
        return True

    def signature(self) -> tuple[int, ...]:
        """Where the model's parameters are now."""
        return addresses(self._model)

    def is_current(self) -> bool:
        """Whether they are where this decoder reads them."""
        return self.signature() == self._made_for

    def _add(self, projection: Projection, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What attention and MLP give back to the residual stream; everything that does passes here."""
        if self._ranks is None:
            return linear(x, projection.weight, bias=projection.bias, residual=residual)
        # in one rank's product the residual costs nothing, and it enters the sum once
        once = residual if self._ranks.rank == 0 else None
        return self._ranks.sum(linear(x, projection.weight, bias=projection.bias, residual=once))

    @torch.no_grad()
    def _rotary(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own cosines and sines, [P, R] each, in its dtype; R of a head's dimensions turn."""
        positions = torch.arange(num_positions, device=self._embedding.device)
        cos, sin = self._model.base_model.rotary_emb(self._embedding[:1, None], positions[None])
        return cos[0].contiguous(), sin[0].contiguous()


def _project(projections: tuple[Projection, ...], x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The projections of norm(x), end to end: [T, H] to [T, sum of outs]."""
    if len(projections) == 1:
        return linear(x, projections[0].weight, bias=projections[0].bias, norm=norm)
    normed = rms_norm(x, norm)
    return torch.cat([linear(normed, each.weight, bias=each.bias) for each in projections], dim=1)


def _require_standard_config(model: PreTrainedModel) -> None:
    """Refuse what few tokens would not show."""
    config = model.config.get_text_config()
    for name, value in config.to_dict().items():
        if "softcap" in name and value:
            raise NotStandardError(f"its config sets {name}={value}")
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if set(types) - {"full_attention"} if types else window is not None:
        raise NotStandardError("its attention has a sliding window")


def _require_children(module: nn.Module, *names: str, optional: tuple[str, ...] = ()) -> None:
    children = {name for name, _ in module.named_children()}
    if missing := set(names) - children:
        raise NotStandardError(f"its {type(module).__name__} has no {sorted(missing)[0]}")
    if unknown := children - {*names, *optional}:
        raise NotStandardError(f"its {type(module).__name__} has a {sorted(unknown)[0]}")


def _read_layer(layer: nn.Module) -> Layer:
    _require_children(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    _require_children(attention, "q_proj", "k_proj", "v_proj", "o_proj", optional=("q_norm", "k_norm"))
    _require_children(mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
    if not isinstance(mlp.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
        raise NotStandardError(f"its activation is {type(mlp.act_fn).__name__}")
    gate, up = _read_projection(mlp.gate_proj), _read_projection(mlp.up_proj)
    if gate.bias is not None or up.bias is not None:
        raise NotStandardError("its MLP has biases")
    query_norm, key_norm = (
        _read_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
    )
    for norm in (query_norm, key_norm):
        if norm is not None and len(norm.weight) != attention.head_dim:
            raise NotStandardError("its query and key norms are not per head")
    epsilons = {norm.eps for norm in (query_norm, key_norm) if norm is not None} or {0.0}
    if len(epsilons) > 1:
        raise NotStandardError("its query and key norms differ in eps")
    return Layer(
        attention_norm=_read_norm(layer.input_layernorm),
        qkv=_joined(*(_read_projection(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))),
        q_norm=None if query_norm is None else query_norm.weight,
        k_norm=None if key_norm is None else key_norm.weight,
        head_norm_eps=epsilons.pop(),
        output=_read_projection(attention.o_proj),
        mlp_norm=_read_norm(layer.post_attention_layernorm),
        gate=gate.weight,
        up=up.weight,
        down=_read_projection(mlp.down_proj),
    )


def _joined(*projections: Projection) -> tuple[Projection, ...]:
    """One projection where the memory allows it, else the projections as they are."""
    weight = side_by_side([each.weight for each in projections])
    biases = [each.bias for each in projections if each.bias is not None]
    bias = side_by_side(biases) if len(biases) == len(projections) else None
    if weight is None or (biases and bias is None):
        return projections
    return (Projection(weight, bias),)


def _read_heads(layers: Any) -> Heads:
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


def _read_projection(linear: nn.Module) -> Projection:
    if type(linear) is not nn.Linear:
        raise NotStandardError(f"a projection is a {type(linear).__name__}")
    return Projection(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _read_norm(norm: Any) -> Norm:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not isinstance(eps, float):
        raise NotStandardError(f"its {type(norm).__name__} is not an RMSNorm")
    return Norm(weight=norm.weight.detach(), eps=eps)

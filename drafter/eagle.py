"""The learned drafter: an EAGLE-3 head, which drafts from the hidden states the policy leaves behind.

At position p a step reads the embedding of x_{p+1} and a state g_p, and its output predicts x_{p+2}. Where the policy
has computed position p, g_p is made of its residual streams; further on, it is the head's own output at p - 1.
Source: EAGLE-3 (arXiv 2503.01840).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """The head's shape: one decoder layer of the policy's geometry.

    aux_layers: the policy's layers whose entering residual streams it reads. window: positions that a step attends to,
    itself included.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab: int
    window: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    aux_layers: tuple[int, int, int]

    @classmethod
    def of(cls, model_config: Any, *, draft_vocab: int, window: int) -> "EagleConfig":
        """The head for a policy with this transformers config; draft_vocab is cut to the policy's vocabulary."""
        text = model_config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab_size=text.vocab_size,
            draft_vocab=min(draft_vocab, text.vocab_size),
            window=window,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(text),
            max_position_embeddings=text.max_position_embeddings,
            aux_layers=aux_layers(text.num_hidden_layers),
        )


def aux_layers(num_layers: int) -> tuple[int, int, int]:
    """An early, a middle and a late layer, as vLLM and SGLang choose them; the ends of a policy too short for that."""
    if num_layers < 7:
        return 0, num_layers // 2, num_layers - 1
    return 2, num_layers // 2, num_layers - 3


def misfit(head: EagleConfig, fitting: EagleConfig) -> str | None:
    """What of a head's shape its policy dictates and differs from a fitting head's, the first of it; None for none."""
    dictated = ("hidden_size", "vocab_size", "aux_layers")
    return next((name for name in dictated if getattr(head, name) != getattr(fitting, name)), None)


def _rope_theta(text: Any) -> float:
    """The base of the policy's rotary embedding; the head takes it over, but none of its rescalings."""
    parameters = getattr(text, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)  # a policy may have one set a kind of layer
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10_000.0)


class EagleHead(nn.Module):
    """The head's weights, under the names vLLM and SpecForge load, and its step in parts.

    The policy's embedding is no part of it: embedded tokens are handed in. d2t [V'] int64: target id minus draft id of
    each token it can propose; t2d [V] bool: whether it can propose a target token. Until a vocabulary is set, it
    proposes the first V' tokens. Equal seeds give equal weights.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: EagleConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, INIT_STD, generator=generator))

    def target_ids(self) -> torch.Tensor:
        """The target id of every draft id, [V'] int64, ascending."""
        return torch.arange(self.config.draft_vocab, device=self.d2t.device) + self.d2t

    @torch.no_grad()
    def set_vocabulary(self, d2t: torch.Tensor, t2d: torch.Tensor, lm_head: torch.Tensor) -> None:
        """Propose these tokens from now on, starting from a copy of the policy's own output weights [V, H] for them."""
        self.d2t.copy_(d2t)
        self.t2d.copy_(t2d)
        self.lm_head.weight.copy_(lm_head[self.target_ids().to(lm_head.device)])

    def fuse(self, aux: torch.Tensor) -> torch.Tensor:
        """The states of positions that the policy computed. aux [T, 3H]; returns [T, H]."""
        return self.fc(aux)

    def project(
        self, embeds: torch.Tensor, states: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [T, Hq, D] and keys [T, Hkv, D], and values [T, Hkv, D], of embeds and states [T, H] each."""
        return self.midlayer.project(embeds, states, positions)

    def finish(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The step's output [T, H], which is also the next step's state. states [T, H]; attended [T, Hq, D]."""
        return self.midlayer.finish(states, attended)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Over the draft vocabulary. outputs [T, H]; returns [T, V']."""
        return self.lm_head(rms_norm(outputs, self.norm))

    def step(
        self,
        embeds: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """One step of T tokens over S cached ones, written out: what serving and training are held against.

        Shapes: embeds, states [T, H]; positions [T] int64; past: keys and values [S, Hkv, D] each; visible [T, S + T]
        bool: which cached and new tokens each token attends to, itself among them.
        Returns outputs [T, H], and keys and values [S + T, Hkv, D].
        """
        query, key, value = self.project(embeds, states, positions)
        key, value = (torch.cat(pair) for pair in zip(past, (key, value), strict=True))
        groups = self.config.num_heads // self.config.num_kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, keys).float() * self.config.head_dim**-0.5
        probs = scores.masked_fill(~visible, -torch.inf).softmax(dim=2)
        attended = torch.einsum("hqk,khd->qhd", probs.to(values.dtype), values)
        return self.finish(states, attended), (key, value)

    def empty_past(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of no token, for a first step."""
        none = self.fc.weight.new_zeros(0, self.config.num_kv_heads, self.config.head_dim)
        return none, none


class _Layer(nn.Module):
    """The decoder layer: attention over cat(embedding, state), which is twice as wide as its output, and an MLP."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.input_layernorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        query, pair = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(2 * size, query, bias=False),
                "k_proj": nn.Linear(2 * size, pair, bias=False),
                "v_proj": nn.Linear(2 * size, pair, bias=False),
                "o_proj": nn.Linear(query, size, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(size, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, size, bias=False),
            }
        )

    def project(
        self, embeds: torch.Tensor, states: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As EagleHead.project."""
        inputs = torch.cat([rms_norm(embeds, self.input_layernorm), rms_norm(states, self.hidden_norm)], dim=1)
        query, key, value = (
            self.self_attn[name](inputs).unflatten(1, (-1, self.config.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos, sin = _rotation(positions, self.config)
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def finish(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """As EagleHead.finish."""
        states = states + self.self_attn["o_proj"](attended.flatten(1))
        inputs = rms_norm(states, self.post_attention_layernorm)
        return states + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](inputs)) * self.mlp["up_proj"](inputs))


def rms_norm(x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    """x [T, H] over its root mean square, times the norm's weight: rounded as kernels.linear.rms_norm rounds."""
    wide = x.float()
    assert norm.eps is not None
    scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + norm.eps)
    return norm.weight.to(x.dtype) * (wide * scale).to(x.dtype)


def _rotation(positions: torch.Tensor, config: EagleConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, [T, 1, D / 2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None, None].float() * config.rope_theta**-exponents
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D / 2) of x [T, heads, D], as Llama lays them out."""
    first, second = x.float().chunk(2, dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2).to(x.dtype)

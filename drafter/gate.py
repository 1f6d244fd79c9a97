"""SeerAttention-R's gates: small networks beside the policy that score blocks of cached keys for a query.

A gate has a query side, which merges the query heads of a key head by one linear map, and a key side, which merges the
elementwise maximum, minimum and mean of a block's keys by another. Both end in an RMSNorm and a rotary embedding, the
key side's at the position of the block's first key; the score of a block is their scaled dot product.

Queries and keys enter after the policy's own norms per head and before its rotary embedding. Caches hold keys after it,
so it is undone here, and a block's descriptor is a pure function of the committed keys.

Source: SeerAttention-R (arXiv 2506.08889) sec. 3; microsoft/SeerAttention seer_attn/decode_sparse/attn_gate_training.py
and qwen3/modeling_qwen3_seerattn_training.py (what enters, the norms' eps, the order max, min, mean, the scale; its
decoding loop rotates a block that is completed while decoding at its last key instead, its training never does).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.errors import PreflightError
from drafter.rope import Rope, Turns
from kernels.gate import GateWeights, finish, gate_queries, pool_keys

NORM_EPS = 1e-6
NOISE = 0.02  # standard deviation of the initial weights, as published


@dataclass(frozen=True, slots=True)
class GateConfig:
    """The shape of a policy's gates. gate_dim: of a query and a block once compressed. select_block: keys of a block.

    rope: the policy's rotary embedding; gate_rope: the gates', of the same base over gate_dim dimensions.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gate_dim: int
    select_block: int
    rope: Rope
    gate_rope: Rope

    @property
    def num_parameters(self) -> int:
        """Of all layers' gates."""
        merged = (self.num_heads + 3 * self.num_kv_heads) * self.head_dim * self.gate_dim
        return self.num_layers * (merged + 2 * self.gate_dim)

    @classmethod
    def of(cls, model_config: Any, *, select_block: int = 64, gate_dim: int | None = None) -> "GateConfig":
        """Gates for a policy with this transformers config, as wide as its heads unless told.

        Raises PreflightError for a rotary embedding that gates cannot undo, and for scores that are capped.
        """
        text = model_config.get_text_config()
        if cap := getattr(text, "attn_logit_softcapping", None):
            raise PreflightError(f"{text.model_type!r} caps its attention scores at {cap:g}; gates learn plain ones")
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        width = gate_dim or head_dim
        return cls(
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            gate_dim=width,
            select_block=select_block,
            rope=Rope.of(text, head_dim),
            gate_rope=Rope.of(text, width),
        )


class Gates(nn.Module):
    """The gates of all layers, their weights stacked by layer.

    query_weight [L, Hkv, G, D, Dg], key_weight [L, Hkv, 3 D, Dg] (of maximum, minimum and mean, in this order),
    query_norm and key_norm [L, Dg]: float32 to train, the policy's dtype to serve. Equal seeds give equal weights.
    New gates begin as the block's mean key against the group's mean query, with a little noise; of another width than
    the heads, as noise alone.
    """

    def __init__(self, config: GateConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self._turns, self._gate_turns = Turns(config.rope), Turns(config.gate_rope)
        layers, heads, dim, width = config.num_layers, config.num_kv_heads, config.head_dim, config.gate_dim
        groups = config.num_heads // heads
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.empty(shape).normal_(0, NOISE, generator=generator)

        query, key = noise(layers, heads, groups, dim, width), noise(layers, heads, 3 * dim, width)
        if width == dim:
            query += torch.eye(dim) / groups
            key[:, :, 2 * dim :] += torch.eye(dim)
        self.query_weight, self.key_weight = nn.Parameter(query), nn.Parameter(key)
        self.query_norm, self.key_norm = (nn.Parameter(torch.ones(layers, width)) for _ in range(2))

    def weights(self) -> GateWeights:
        """The gates as kernels.gate reads them, where their parameters are now."""
        device = self.query_weight.device
        return GateWeights(
            query_weight=self.query_weight,
            key_weight=self.key_weight,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            rotation=self._turns.on(device),
            gate_rotation=self._gate_turns.on(device),
            eps=NORM_EPS,
        )

    def compress(self, layer: int, keys: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """A layer's descriptors of blocks of keys, as the cache holds them, after the policy's rotary embedding.

        Shapes: keys [..., P, Hkv, D], P at most select_block; starts [...] int64, the position of each block's first
        key, those that follow being consecutive. Returns [..., Hkv, Dg] in the weights' dtype.
        """
        count = torch.full_like(starts, keys.shape[-3])
        pooled = pool_keys(keys, starts, count, self._turns.on(starts.device)).to(self.key_weight.dtype)
        merged = torch.einsum("...hi,hio->...ho", pooled, self.key_weight[layer])
        return finish(merged, self.key_norm[layer], starts, self._gate_turns.on(starts.device), NORM_EPS)

    def scores(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, compressed: torch.Tensor
    ) -> torch.Tensor:
        """How much each new token's query wants each block of its sequence; a softmax over blocks gives their weights.

        Shapes: B sequences of as many new tokens each, T in all; query [T, Hq, D] after the policy's rotary embedding;
        positions [T] int64; compressed [B, NB, Hkv, Dg]. Returns [T, Hkv, NB] float32: blocks that a sequence does
        not have, or that a token does not see, are for the caller to mask.
        """
        merged = gate_queries(self.weights(), layer, query, positions).unflatten(0, (len(compressed), -1))
        scores = torch.einsum("bqhd,bnhd->bqhn", merged, compressed).flatten(0, 1)
        return scores.float() * self.config.gate_dim**-0.5

"""The standard decoder on our kernels: a handful of launches a layer, over the parameters that training updates."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from kernels.attention import PagedSequences
from kernels.cache import rope_and_write
from kernels.linear import Norm, rms_norm
from kernels.rope_attention import plan_rope_and_attend, rope_and_attend
from rollout.collectives import Ranks
from rollout.model import PagedCache
from rollout.projections import addresses
from rollout.standard import (
    Layer,
    NotStandardError,
    Product,
    read_heads,
    read_layer,
    read_norm,
    read_projection,
    require_children,
    require_standard_config,
)


class LayerAttention(Protocol):
    """Attention that a forward is given in place of the dense one, in the layers it takes (rollout/sparse.py)."""

    def takes(self, layer: int) -> bool:
        """Whether this layer attends so. The same for every forward that a CUDA graph stands for."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        positions: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        seqs: PagedSequences,
        *,
        scale: float,
    ) -> torch.Tensor:
        """As kernels.attention.paged_attention of new tokens, query after rotary embedding. positions [T] int64."""


class FusedDecoder:
    """rollout.decoder.Decoder for the standard architecture.

    Reads parameters where they are when it is made: updates in place are seen at once, and parameters that have moved
    make it stale. ranks: who holds the other shares of the parameters (rollout/parallel.py); None where these are all.
    Raises NotStandardError for another architecture, as far as that can be told from its modules and config
    (rollout/decoder.py compares the numbers).
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks | None = None) -> None:
        require_standard_config(model.config)
        self._model = model
        self._ranks = ranks
        base = model.base_model
        require_children(base, "embed_tokens", "layers", "norm", "rotary_emb")
        require_children(model, model.base_model_prefix, "lm_head")
        if type(base.embed_tokens) is not nn.Embedding:
            raise NotStandardError(f"its embedding is a {type(base.embed_tokens).__name__}")
        self._embedding = base.embed_tokens.weight.detach()
        self._layers: Sequence[Layer] = [read_layer(layer) for layer in base.layers]
        self._heads = read_heads(base.layers)
        self._norm = read_norm(base.norm)
        self._head: Product = read_projection(model.lm_head)
        self._made_for = addresses(model)
        self._rotary = _Rotary(base.rotary_emb, self._embedding)

    def reading(self, layers: Sequence[Layer], head: Product) -> "FusedDecoder":
        """As this decoder, from other layers and another head; what one makes ready for, so is the other."""
        other = copy(self)
        other._layers, other._head = layers, head
        return other

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
        attention: LayerAttention | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The final hidden state of each new token, and what entered these layers: [T, H], and as much for each.

        attention: in place of the dense one, where it takes a layer.
        """
        hidden = self.embed(token_ids)
        entered: dict[int, torch.Tensor] = {}
        for index in range(len(self._layers)):
            if index in layers:
                entered[index] = hidden
            hidden = self.layer(index, hidden, positions, seqs, cache, attention)
        return self.norm(hidden), tuple(entered[index] for index in layers)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] to [S, V], in the model's dtype."""
        logits = self._head(hidden)
        return logits if self._ranks is None else self._ranks.gather_columns(logits)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 to [T, H]."""
        return F.embedding(token_ids, self._embedding)

    def layer(
        self,
        index: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        seqs: PagedSequences,
        cache: PagedCache,
        attention: LayerAttention | None = None,
    ) -> torch.Tensor:
        """One decoder layer, whose keys and values are written to the cache. [T, H] to [T, H]."""
        layer = self._layers[index]
        attended = self._attend(index, hidden, positions, seqs, cache, attention)
        hidden = self._add(layer.output, attended.flatten(1), hidden)
        return self._add(layer.down, layer.gated(hidden, norm=layer.mlp_norm), hidden)

    def _attend(
        self,
        index: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        seqs: PagedSequences,
        cache: PagedCache,
        attention: LayerAttention | None,
    ) -> torch.Tensor:
        """A layer's attention, [T, Hq, D]."""
        layer, heads = self._layers[index], self._heads
        caches = cache.layer(index)
        rotary = (positions, self._rotary.cos, self._rotary.sin)
        shape: dict[str, Any] = {
            "num_heads": heads.num_query,
            "num_kv_heads": heads.num_kv,
            "q_norm": layer.q_norm,
            "k_norm": layer.k_norm,
            "eps": layer.head_norm_eps,
        }
        if attention is not None and attention.takes(index):
            qkv = _project(layer.qkv, hidden, layer.attention_norm)
            query = rope_and_write(qkv, *rotary, seqs.slots, *caches, **shape)
            return attention.attend(index, query, positions, *caches, seqs, scale=heads.scale)
        plan_rope_and_attend(
            seqs, num_heads=heads.num_query, num_kv_heads=heads.num_kv, head_dim=heads.dim, dtype=hidden.dtype
        )
        qkv = _project(layer.qkv, hidden, layer.attention_norm)
        return rope_and_attend(qkv, *rotary, *caches, seqs, scale=heads.scale, **shape)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm after the last layer."""
        return rms_norm(hidden, self._norm)

    def reach(self, num_positions: int) -> bool:
        """Make ready for positions below this; whether that took new tables, which no captured forward reads."""
        return self._rotary.reach(num_positions)

    def signature(self) -> tuple[int, ...]:
        """Where the model's parameters are now."""
        return addresses(self._model)

    def is_current(self) -> bool:
        """Whether they are where this decoder reads them."""
        return self.signature() == self._made_for

    def _add(self, product: Product, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What attention and MLP give back to the residual stream; everything that does passes here."""
        if self._ranks is None:
            return product(x, residual=residual)
        # in one rank's product the residual costs nothing, and it enters the sum once
        once = residual if self._ranks.rank == 0 else None
        return self._ranks.sum(product(x, residual=once))


class _Rotary:
    """The model's own cosines and sines, [P, R] each, in its dtype; R of a head's dimensions turn."""

    def __init__(self, module: nn.Module, like: torch.Tensor) -> None:
        self._module = module
        self._like = like
        self.cos, self.sin = self._tables(16)

    def reach(self, num_positions: int) -> bool:
        """Hold positions below this; whether that took new tables."""
        if num_positions <= len(self.cos):
            return False
        self.cos, self.sin = self._tables(num_positions)
        return True

    @torch.no_grad()
    def _tables(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(num_positions, device=self._like.device)
        cos, sin = self._module(self._like[:1, None], positions[None])
        return cos[0].contiguous(), sin[0].contiguous()


def _project(products: tuple[Product, ...], x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The products of norm(x), end to end: [T, H] to [T, sum of outs]."""
    if len(products) == 1:
        return products[0](x, norm=norm)
    normed = rms_norm(x, norm)
    return torch.cat([each(normed) for each in products], dim=1)

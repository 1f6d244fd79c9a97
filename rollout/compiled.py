"""Any transformers causal LM as a decoder: the module itself, each of its layers through the compiler where that pays.

All layers of a kind share one compiled program, whose token count is dynamic. Attention is opaque to the compiler: it
sees a function of query, key and value, and never what a forward works on, which is another each time.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from kernels.attention import PagedSequences
from rollout.fused import LayerAttention
from rollout.model import AttentionContext, PagedCache, attend, layers_of
from rollout.projections import addresses

_attending: ContextVar[tuple[AttentionContext, int]] = ContextVar("attending")  # and the layer that does


class ModuleDecoder:
    """rollout.decoder.Decoder that runs the module's own code.

    backend: of torch.compile; None runs everything eagerly. The module itself is left as it is: what is called here are
    shallow copies over the same parameters.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str | None) -> None:
        self._model = model
        self._made_for = addresses(model)
        self._base = _shallow(model.base_model)
        self._whole = _shallow(model)  # but for its decoder, which it is given the result of
        self._whole._modules[model.base_model_prefix] = _Given()
        if backend is not None:
            # the whole layer or nothing: a layer in pieces launches no less than an eager one
            self._run = torch.compile(_forward_of, dynamic=True, fullgraph=True, backend=backend)
            name, layers = layers_of(model)
            self._base._modules[name] = nn.ModuleList(
                self._compiled(index, layer) for index, layer in enumerate(layers)
            )

    @torch.inference_mode()
    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, cache: PagedCache
    ) -> torch.Tensor:
        """The final hidden state of each new token. token_ids, positions [T] int64. Returns [T, H]."""
        output = self._base(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            paceline=AttentionContext(seqs, cache),
        )
        return output.last_hidden_state[0]

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
        """The final hidden state of each new token, and what entered these layers: [T, H], and as much for each."""
        assert attention is None, "the engine lends attention to FusedDecoder alone"
        entered: dict[int, torch.Tensor] = {}

        def keep(index: int, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            entered[index] = args[0][0]

        modules = layers_of(self._base)[1]
        hooks = [modules[index].register_forward_pre_hook(partial(keep, index)) for index in set(layers)]
        try:
            hidden = self.forward(token_ids, positions, seqs, cache)
        finally:
            for hook in hooks:
                hook.remove()
        return hidden, tuple(entered[index] for index in layers)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] to [S, V], in the model's dtype; whatever the module does after its head is done."""
        return self._whole(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def reach(self, num_positions: int) -> bool:
        """Nothing to make ready: the module computes its rotary embedding anew."""
        return False

    def signature(self) -> tuple[int, ...]:
        """Where the model's parameters are now."""
        return addresses(self._model)

    def is_current(self) -> bool:
        """Whether they are where graphs captured from this decoder read them."""
        return self.signature() == self._made_for

    def _compiled(self, index: int, layer: nn.Module) -> nn.Module:
        """A layer that runs the compiled program."""
        twin = _shallow(layer)
        twin._forward_pre_hooks = OrderedDict()  # its own: the compiler sees those of the layer itself
        twin.forward = partial(self._layer, index, layer)
        return twin

    def _layer(self, index: int, layer: nn.Module, *args: Any, paceline: AttentionContext, **kwargs: Any) -> Any:
        with _attends(paceline, index):
            return self._run(layer, *args, paceline=_opaque_attention, **kwargs)


class _Given(nn.Module):
    """Stands in for a decoder whose hidden states are known already."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        # every field that some head reads
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _shallow(module: nn.Module) -> Any:
    """A module over the same parameters whose children can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.training = False
    return twin


def _forward_of(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


@contextmanager
def _attends(context: AttentionContext, layer: int) -> Iterator[None]:
    token = _attending.set((context, layer))
    try:
        yield
    finally:
        _attending.reset(token)


@torch.library.custom_op("paceline::attend", mutates_args=())
def _opaque_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """rollout.model.attend of the layer that runs."""
    context, layer = _attending.get()
    output = attend(context, layer, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
    return output.contiguous()


@_opaque_attention.register_fake
def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])

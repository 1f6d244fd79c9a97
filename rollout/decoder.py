"""The policy's forward for rollouts: over the parameters that training updates, and equal to the module's, proven."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from configs.errors import DivergedError, PreflightError
from kernels.attention import PagedSequences
from rollout.collectives import ranks_of
from rollout.compiled import ModuleDecoder
from rollout.fused import FusedDecoder, LayerAttention
from rollout.model import PagedCache, alone, forward_paged, layers_of
from rollout.runner import NOT_FINITE
from rollout.standard import NotStandardError

NUM_TOKENS = 8  # of a proof

log = logging.getLogger(__name__)


class Decoder(Protocol):
    """Hidden states and logits of new tokens over a paged cache. All of it may be captured in a CUDA graph."""

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, cache: PagedCache
    ) -> torch.Tensor:
        """The hidden state of each new token after the final norm; keys and values are written to the cache.

        Shapes: token_ids, positions [T] int64, positions below what reach was told. Returns [T, H].
        """

    def forward_with_aux(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        seqs: PagedSequences,
        cache: PagedCache,
        layers: Sequence[int],
        attention: LayerAttention | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As forward, and the residual stream of each new token where it enters each of these layers, [T, H].

        Nothing is copied: what is returned lives where the layers left it. attention: in place of the dense one, where
        it takes a layer; only FusedDecoder can be given any.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] to [S, V], in the model's dtype."""

    def reach(self, num_positions: int) -> bool:
        """Make ready for positions below this, outside of any graph; True where graphs captured before are stale."""

    def signature(self) -> tuple[int, ...]:
        """Where the model's parameters are now."""

    def is_current(self) -> bool:
        """Whether they still are where they were when this decoder was made; it and its graphs are stale otherwise."""


def make_decoder(model: PreTrainedModel) -> Decoder:
    """The fastest decoder that computes what the module does; where it is not the fused one, it is said once why.

    Of a policy that ranks hold together, every rank makes its own at the same time.
    Raises PreflightError where not even the module's own parts give the whole's logits.
    """
    ranks = ranks_of(model)
    try:
        decoder = FusedDecoder(model, ranks)
        prove_layers(decoder, model)
        return decoder
    except NotStandardError as error:
        if ranks is not None:
            raise PreflightError(f"{type(model).__name__} cannot be shared by GPUs, because {error}") from error
        _warn(f"{type(model).__name__} decodes through its own module, which is slower, because {error}")
    if model.device.type == "cuda":
        compiled = ModuleDecoder(model, backend="inductor")
        try:
            prove(compiled, model)
            return compiled
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            _warn(f"{type(model).__name__} cannot be compiled and runs eagerly, which is slower still: {reason}")
    eager = ModuleDecoder(model, backend=None)
    prove(eager, model)
    return eager


@torch.inference_mode()
def prove_layers(decoder: FusedDecoder, model: PreTrainedModel) -> None:
    """Compare each part with the module's on the module's own inputs, so that no rounding adds up over layers.

    Raises NotStandardError, naming the first part that differs.
    """
    token_ids, positions = _some_tokens(model)
    _, layers = layers_of(model)
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: entered.append(args[0][0])) for layer in layers]
    hooks += [
        layer.register_forward_hook(lambda _, args, out: left.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in layers
    ]
    cache, seqs = alone(model, num_tokens=NUM_TOKENS)
    try:
        logits = forward_paged(model, token_ids, positions, seqs, cache, positions)
    finally:
        for hook in hooks:
            hook.remove()
    _require_finite(logits)
    if not torch.equal(decoder.embed(token_ids), entered[0]):
        raise NotStandardError("its embeddings are not used as they are")
    cache, seqs = alone(model, num_tokens=NUM_TOKENS)
    for index, (before, after) in enumerate(zip(entered, left, strict=True)):
        ours = decoder.layer(index, before, positions, seqs, cache)
        if not _close(ours, after, addition=after - before):
            raise NotStandardError(f"layer {index} computes something else")
    ours = decoder.logits(decoder.norm(left[-1]))
    if not _close(ours, logits, addition=logits):
        raise NotStandardError("its logits are computed otherwise")


@torch.inference_mode()
def prove(decoder: Decoder, model: PreTrainedModel) -> None:
    """Compare the logits of a few tokens with the module's, as far as forwards agree that round differently.

    Raises PreflightError.
    """
    theirs = some_logits(model)
    token_ids, positions = _some_tokens(model)
    cache, seqs = alone(model, num_tokens=NUM_TOKENS)
    ours = decoder.logits(decoder.forward(token_ids, positions, seqs, cache))
    if not agree_up_to_rounding(ours, theirs, model):
        raise PreflightError(f"{type(model).__name__} gives other logits when its decoder and head run apart")


@torch.inference_mode()
def some_logits(model: PreTrainedModel) -> torch.Tensor:
    """The module's logits of a few tokens that are always the same, [NUM_TOKENS, V]. Raises DivergedError."""
    token_ids, positions = _some_tokens(model)
    cache, seqs = alone(model, num_tokens=NUM_TOKENS)
    logits = forward_paged(model, token_ids, positions, seqs, cache, positions)
    _require_finite(logits)
    return logits


def agree_up_to_rounding(ours: torch.Tensor, theirs: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether logits differ by no more than forwards of this model do that round differently in every layer."""
    depth = model.config.get_text_config().num_hidden_layers
    return _close(ours, theirs, addition=theirs * depth**0.5)


def _require_finite(logits: torch.Tensor) -> None:
    """Weights that are not numbers prove nothing about a decoder. Raises DivergedError."""
    if not logits.isfinite().all():
        raise DivergedError(NOT_FINITE)


def _some_tokens(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids spread over the vocabulary, and their positions."""
    positions = torch.arange(NUM_TOKENS, device=model.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (positions * 7919 + vocabulary // 3) % vocabulary, positions


def _close(ours: torch.Tensor, theirs: torch.Tensor, *, addition: torch.Tensor) -> bool:
    """Whether each row agrees up to rounding.

    A result is rounded once (an epsilon of it), and what was added to reach it passes through a few products whose
    inputs are rounded (16 epsilons of it allow for their number and for some cancellation).
    Sums of n terms add sqrt(n) epsilons of float32, in which they are kept.
    """
    eps = torch.finfo(theirs.dtype).eps + ours.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
    error = (ours.float() - theirs.float()).norm(dim=1)
    return bool((error <= eps * (16 * addition.float().norm(dim=1) + 2 * theirs.float().norm(dim=1))).all())


@lru_cache
def _warn(message: str) -> None:
    log.warning("%s", message)

"""The policy in eight bits: what drafts read in place of it, remade whenever it changes (sparse.weights).

Rounded once a version, from the policy's own parameters and what flows through them: the largest activations of a dense
forward of the texts at hand smooth the weights (kernels/lowbit.py). Drafts alone read the copy, so that a poor one
costs accepted tokens and no sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from transformers import PreTrainedModel

from configs.errors import PreflightError
from kernels.linear import Norm, rms_norm
from kernels.lowbit import ALIGNMENT, Kind, LowBit, empty_lowbit, gated_linear, linear, quantise, smoothing
from rollout.decoder import Decoder
from rollout.fused import FusedDecoder
from rollout.model import alone
from rollout.standard import (
    GatedProduct,
    GatedProjection,
    Layer,
    NotStandardError,
    Product,
    Projection,
    read_layer,
    read_projection,
)

CALIBRATION_TOKENS = 512  # whose activations smooth the weights: outliers sit in the same channels for all tokens


@dataclass(frozen=True, slots=True)
class LowBitProjection:
    """rollout.standard.Product over eight bits. bias [out] or None."""

    weight: LowBit
    bias: torch.Tensor | None

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Product."""
        return linear(x, self.weight, bias=self.bias, norm=norm, residual=residual)


@dataclass(frozen=True, slots=True)
class LowBitGated:
    """rollout.standard.GatedProduct over eight bits."""

    gate: LowBit
    up: LowBit

    def __call__(self, x: torch.Tensor, *, norm: Norm) -> torch.Tensor:
        """As GatedProduct."""
        return gated_linear(x, self.gate, self.up, norm=norm)


@dataclass(frozen=True, slots=True)
class LowBitLayer:
    """Room for a layer's products, and for the norms before them, divided by what their columns are multiplied by.

    qkv_bias: the three end to end, as qkv is; None where there are none.
    """

    attention_norm: torch.Tensor
    qkv: LowBit
    qkv_bias: torch.Tensor | None
    output: LowBit
    mlp_norm: torch.Tensor
    gate: LowBit
    up: LowBit
    down: LowBit

    @classmethod
    def like(cls, layer: Layer, kind: Kind) -> "LowBitLayer":
        """Room for a layer; what is in it means nothing yet."""
        qkv, (output, down), gated = _projections(layer.qkv), _projections((layer.output, layer.down)), _gated(layer)
        together = _room(kind, *(each.weight for each in qkv))
        has_bias = any(each.bias is not None for each in qkv)
        return cls(
            attention_norm=torch.empty_like(layer.attention_norm.weight),
            qkv=together,
            qkv_bias=qkv[0].weight.new_zeros(len(together.values)) if has_bias else None,
            output=_room(kind, output.weight),
            mlp_norm=torch.empty_like(layer.mlp_norm.weight),
            gate=_room(kind, gated.gate),
            up=_room(kind, gated.up),
            down=_room(kind, down.weight),
        )

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        biases = 0 if self.qkv_bias is None else self.qkv_bias.nbytes
        products = (self.qkv, self.output, self.gate, self.up, self.down)
        return self.attention_norm.nbytes + self.mlp_norm.nbytes + biases + sum(each.num_bytes for each in products)

    def standing_for(self, layer: Layer) -> Layer:
        """The policy's layer, read from here where a product or the norm before it is."""
        output, down = _projections((layer.output, layer.down))
        return replace(
            layer,
            attention_norm=Norm(self.attention_norm, layer.attention_norm.eps),
            qkv=(LowBitProjection(self.qkv, self.qkv_bias),),
            output=LowBitProjection(self.output, output.bias),
            mlp_norm=Norm(self.mlp_norm, layer.mlp_norm.eps),
            gated=LowBitGated(self.gate, self.up),
            down=LowBitProjection(self.down, down.bias),
        )

    @torch.no_grad()
    def remake(self, layer: Layer, peaks: "Peaks") -> None:
        """Stand for these parameters, smoothed for these activations.

        Attention's output is not smoothed: what comes before it is the cache, whose values dense forwards share.
        """
        qkv, (output, down), gated = _projections(layer.qkv), _projections((layer.output, layer.down)), _gated(layer)
        factors = smoothing(peaks.attention, [each.weight for each in qkv])
        torch.div(layer.attention_norm.weight, factors, out=self.attention_norm)
        begin = 0
        for each in qkv:
            end = begin + len(each.weight)
            quantise(each.weight, self.qkv.rows(begin, end), columns=factors)
            if self.qkv_bias is not None and each.bias is not None:
                self.qkv_bias[begin:end] = each.bias
            begin = end
        quantise(output.weight, self.output)
        factors, inner = smoothing(peaks.mlp, [gated.gate, gated.up]), smoothing(peaks.down, [down.weight])
        torch.div(layer.mlp_norm.weight, factors, out=self.mlp_norm)
        quantise(gated.gate, self.gate, columns=factors)
        quantise(gated.up, self.up, columns=factors, rows=1 / inner)
        quantise(down.weight, self.down, columns=inner)


@dataclass(slots=True)
class Peaks:
    """The largest magnitude of each channel that entered a layer's products so far, attention's output apart.

    [K] float32 each, K inputs of the product; [1] before anything has entered. mlp: of gate and up.
    """

    attention: torch.Tensor
    mlp: torch.Tensor
    down: torch.Tensor

    def watching(self, layer: Layer) -> Layer:
        """The same layer, that leaves here what enters it."""

        def into_qkv(product: Product) -> Product:
            def multiply(
                x: torch.Tensor, *, norm: Norm | None = None, residual: torch.Tensor | None = None
            ) -> torch.Tensor:
                self.attention = _peak(self.attention, x, norm)
                return product(x, norm=norm, residual=residual)

            return multiply

        def into_mlp(x: torch.Tensor, *, norm: Norm) -> torch.Tensor:
            self.mlp = _peak(self.mlp, x, norm)
            return layer.gated(x, norm=norm)

        def into_down(
            x: torch.Tensor, *, norm: Norm | None = None, residual: torch.Tensor | None = None
        ) -> torch.Tensor:
            self.down = _peak(self.down, x, norm)
            return layer.down(x, norm=norm, residual=residual)

        return replace(layer, qkv=tuple(map(into_qkv, layer.qkv)), gated=into_mlp, down=into_down)


class LowBitPolicy:
    """A policy's copy in eight bits, at the same addresses for as long as it lives: CUDA graphs name them.

    version: of the policy that it stands for; None where its weights mean nothing.
    Raises PreflightError where the device cannot read it, or the policy is no standard decoder.
    """

    def __init__(self, model: PreTrainedModel, kind: Kind) -> None:
        require_readable(kind, model.device)
        self.version: int | None = None
        self._model = model
        self._decoder: FusedDecoder | None = None  # the policy's own
        self._drafting: FusedDecoder | None = None
        try:
            layers = self._read_layers()
            head = _projections((read_projection(model.lm_head),))[0]
        except (NotStandardError, AttributeError) as error:
            raise PreflightError(
                f"sparse.weights={kind}: {type(model).__name__} has no copy in eight bits, because {error}; set"
                " sparse.weights=policy"
            ) from error
        self._layers = [LowBitLayer.like(layer, kind) for layer in layers]
        self._head = _room(kind, head.weight)
        widths = {copy.values.shape[1] for layer in self._layers for copy in (layer.qkv, layer.output, layer.down)}
        if model.device.type == "cuda" and (uneven := [width for width in widths if width % ALIGNMENT]):
            raise PreflightError(
                f"sparse.weights={kind}: a projection of {uneven[0]} inputs is not read in tiles of {ALIGNMENT}; set"
                " sparse.weights=policy"
            )

    @property
    def num_bytes(self) -> int:
        """Of the whole copy."""
        return sum(layer.num_bytes for layer in self._layers) + self._head.num_bytes

    def drafting(self, decoder: Decoder) -> FusedDecoder:
        """The policy's decoder, reading the copy; beside another decoder than before, the copy is to be remade."""
        if decoder is not self._decoder or self._drafting is None:
            assert isinstance(decoder, FusedDecoder)
            self.version = None
            self._decoder = decoder
            layers = [copy.standing_for(layer) for copy, layer in zip(self._layers, self._read_layers(), strict=True)]
            # not smoothed: others read what comes out of the norm before
            head = LowBitProjection(self._head, read_projection(self._model.lm_head).bias)
            self._drafting = decoder.reading(layers, head)
        return self._drafting

    def refresh(self, version: int, texts: Iterable[Sequence[int]]) -> None:
        """Stand for this version of the policy, whose parameters are in place; nothing is in flight.

        texts: token ids that are sampled under it, the first of which are forwarded, as one.
        """
        if version == self.version or self._decoder is None:  # or nobody drafts
            return
        layers = self._read_layers()
        for copy, layer, peaks in zip(self._layers, layers, self._observe(layers, texts), strict=True):
            copy.remake(layer, peaks)
        quantise(read_projection(self._model.lm_head).weight, self._head)
        self.version = version

    def _observe(self, layers: Sequence[Layer], texts: Iterable[Sequence[int]]) -> list[Peaks]:
        """What a dense forward of the policy feeds its products."""
        decoder, device = self._decoder, self._model.device
        assert decoder is not None and decoder.is_current()
        token_ids = torch.tensor([*islice(chain.from_iterable(texts), CALIBRATION_TOKENS)], device=device)
        zero = torch.zeros(1, device=device)
        peaks = [Peaks(zero, zero, zero) for _ in layers]
        watching = [each.watching(layer) for each, layer in zip(peaks, layers, strict=True)]
        cache, seqs = alone(self._model, num_tokens=len(token_ids))
        positions = torch.arange(len(token_ids), device=device)
        decoder.reading(watching, read_projection(self._model.lm_head)).forward(token_ids, positions, seqs, cache)
        return peaks

    def _read_layers(self) -> list[Layer]:
        """The policy's own, where they are now."""
        return [read_layer(layer) for layer in self._model.base_model.layers]


def require_readable(kind: Kind, device: torch.device) -> None:
    """Raise PreflightError where torch or the GPU lacks the type of the copy; on a CPU it is widened to multiply."""
    if kind == "fp8":
        require_fp8(device, key="sparse.weights", instead="int8")


def require_fp8(device: torch.device, *, key: str, instead: str) -> None:
    """Raise PreflightError where torch or the GPU lacks the type, which this key asks for; and what to set instead."""
    if not hasattr(torch, "float8_e4m3fn"):
        raise PreflightError(f"{key}=fp8: torch {torch.__version__} has no float8_e4m3fn; set {key}={instead}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise PreflightError(
                f"{key}=fp8: a GPU of compute capability {major}.{minor} has no such type (8.9); set {key}={instead}"
            )


def _room(kind: Kind, *weights: torch.Tensor) -> LowBit:
    """For weights of equal inputs, end to end."""
    return empty_lowbit(kind, sum(map(len, weights)), weights[0].shape[1], device=weights[0].device)


def _peak(known: torch.Tensor, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """The largest magnitude of each channel, of those known and of the tokens; [K] float32."""
    x = x if norm is None else rms_norm(x, norm)
    return torch.maximum(known, x.abs().amax(dim=0).float())


def _projections(products: Iterable[Product]) -> list[Projection]:
    """The policy's own parameters, which a layer that was just read holds."""
    own = []
    for product in products:
        assert isinstance(product, Projection), "read from the policy"
        own.append(product)
    return own


def _gated(layer: Layer) -> GatedProjection:
    gated: GatedProduct = layer.gated
    assert isinstance(gated, GatedProjection), "read from the policy"
    return gated

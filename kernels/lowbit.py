"""A layer's products over weights of eight bits: those of kernels/linear.py, where half the bytes are read.

Weights alone are rounded, a scale for each output; activations stay as they are. A decoding forward of a few hundred
tokens, rows by drafted tokens, waits for weights: eight-bit products would save arithmetic that is not waited for, and
cost the rounding of every activation, in launches and in accepted drafts.
Smoothing (SmoothQuant, arXiv 2211.10438, eq. 4) then serves the weights: a channel of large activations is divided by
s, its column of the weight multiplied by s. The column is rounded as finely as before, and what the rounding does to
the output is divided by s, where it was largest. What remains of s lies in the norm before or in the scales of the
projection before, so it costs no launch. Of floating-point weights (fp8) the rounding is relative already, and
smoothing only keeps small weights from being lost.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from kernels.linear import ANY, Norm, Rule, Tile, rms_norm, silu_mul_reference, tile_for

Kind = Literal["int8", "fp8"]
LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}  # fp8: e4m3fn
SMALLEST = 1e-5  # of what is divided by, as in SmoothQuant's own code
CHUNK_ELEMENTS = 1 << 24  # of a weight that are widened to float32 at a time
ALIGNMENT = 32  # columns, of which a kernel reads whole tiles


@dataclass(frozen=True, slots=True)
class LowBit:
    """A weight [N, K] in eight bits: values * scales[:, None]. values [N, K] int8 or e4m3fn; scales [N] float32."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, begin: int, end: int) -> "LowBit":
        """Some of the outputs, over the same memory."""
        return LowBit(self.values[begin:end], self.scales[begin:end])

    def widened(self) -> torch.Tensor:
        """The weight as it is multiplied by, [N, K] float32."""
        return self.values.float() * self.scales[:, None]


def empty_lowbit(kind: Kind, num_features: int, num_columns: int, *, device: torch.device | str) -> LowBit:
    """Room for a weight [num_features, num_columns]."""
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return LowBit(
        torch.empty(num_features, num_columns, dtype=dtype, device=device),
        torch.empty(num_features, dtype=torch.float32, device=device),
    )


@torch.no_grad()
def smoothing(activations: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """s_j = max|x_j|^1/2 / max|w_j|^1/2, rounded to powers of two, by which every dtype divides without rounding.

    Shapes: activations [K], the largest magnitude of each channel; weights [N, K], all that read them. Returns [K]
    float32. Source: SmoothQuant, eq. 4, alpha 0.5.
    """
    chunks = (chunk for weight in weights for chunk in weight.split(_chunk_rows(weight)))
    largest = torch.stack([chunk.abs().amax(dim=0) for chunk in chunks]).amax(dim=0).float()
    ratio = activations.float().clamp(min=SMALLEST) / largest.clamp(min=SMALLEST)
    return torch.exp2(ratio.log2().div(2).round())


@torch.no_grad()
def quantise(
    weight: torch.Tensor, out: LowBit, *, columns: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> None:
    """Let out stand for weight * rows[:, None] * columns[None, :].

    columns are multiplied in before the rounding, rows go to the scales. weight [N, K]; columns [K], rows [N] float32.
    """
    limit = LARGEST["int8" if out.values.dtype == torch.int8 else "fp8"]
    step = _chunk_rows(weight)
    for begin in range(0, len(weight), step):
        part = out.rows(begin, begin + step)
        wide = weight[begin : begin + step].float()
        if columns is not None:
            wide = wide * columns
        scales = wide.abs().amax(dim=1).div(limit)
        scales = torch.where(scales > 0, scales, 1.0)
        wide = wide / scales[:, None]
        # the division may end a last bit above the limit, which e4m3fn has no infinity for
        wide = (wide.round() if limit == LARGEST["int8"] else wide).clamp(-limit, limit)
        part.values.copy_(wide)
        part.scales.copy_(scales if rows is None else scales * rows[begin : begin + step])


def linear(
    x: torch.Tensor,
    weight: LowBit,
    *,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """norm(x) weight^T + bias + residual, without gradients; a row's result does not depend on the other rows.

    Shapes: x [T, K], rows contiguous; weight [N, K], K divisible by ALIGNMENT on a GPU; bias [N]; residual [T, N].
    Returns [T, N] in x's dtype.
    """
    if not x.is_cuda:
        return linear_reference(x, weight, bias=bias, norm=norm, residual=residual)
    from kernels.lowbit_triton import linear_triton

    tile = tile_for(PLAIN, x.shape[0], weight.values)
    assert tile is not None, weight.values.shape
    x = x if norm is None else rms_norm(x, norm)
    return linear_triton(x, weight, bias=bias, residual=residual, tile=tile)


def gated_linear(x: torch.Tensor, gate: LowBit, up: LowBit, *, norm: Norm | None = None) -> torch.Tensor:
    """silu(norm(x) gate^T) * (norm(x) up^T), without gradients. x [T, K]; gate, up [N, K]. Returns [T, N]."""
    if not x.is_cuda:
        return gated_linear_reference(x, gate, up, norm=norm)
    from kernels.lowbit_triton import gated_linear_triton

    tile = tile_for(GATED, x.shape[0], gate.values)
    assert tile is not None, gate.values.shape
    return gated_linear_triton(x if norm is None else rms_norm(x, norm), gate, up, tile=tile)


def linear_reference(
    x: torch.Tensor,
    weight: LowBit,
    *,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed in float32, scaled, and rounded where linear's operations round."""
    x = x if norm is None else rms_norm(x, norm)
    out = F.linear(x.float(), weight.values.float()) * weight.scales
    if bias is not None:
        out = out + bias.float()
    out = out.to(x.dtype)
    return out if residual is None else residual + out


def gated_linear_reference(x: torch.Tensor, gate: LowBit, up: LowBit, *, norm: Norm | None = None) -> torch.Tensor:
    """The two products, each rounded, and then silu and product."""
    x = x if norm is None else rms_norm(x, norm)
    return silu_mul_reference(linear_reference(x, gate), linear_reference(x, up))


# The first rule that holds, as in kernels/linear.py, whose choices for 16 bits these follow with the columns of a tile
# doubled, that a load may have as many bytes. Rows of 64 keep all warps' tensor cores busy.
PLAIN = (
    Rule(8, 2048, ANY, Tile(8, 64, 128, 6, split_k=4)),
    Rule(8, 8192, ANY, Tile(8, 64, 256, 4, split_k=2)),
    Rule(8, ANY, ANY, Tile(8, 64, 256, 4)),
    Rule(16, 2048, ANY, Tile(16, 64, 128, 6, split_k=4)),
    Rule(16, 8192, ANY, Tile(16, 64, 256, 4, split_k=2)),
    Rule(16, ANY, ANY, Tile(16, 64, 256, 4)),
    Rule(32, 2048, ANY, Tile(32, 64, 128, 4, split_k=4)),
    Rule(32, 8192, ANY, Tile(32, 64, 128, 4, split_k=2)),
    Rule(32, ANY, ANY, Tile(32, 64, 128, 4)),
    Rule(64, 4096, ANY, Tile(64, 64, 128, 4, split_k=2)),
    Rule(64, ANY, ANY, Tile(64, 64, 128, 4)),
    Rule(ANY, ANY, ANY, Tile(128, 64, 64, 4)),
)
GATED = (
    Rule(8, ANY, ANY, Tile(8, 64, 128, 4)),
    Rule(16, ANY, ANY, Tile(16, 64, 128, 4)),
    Rule(32, ANY, ANY, Tile(32, 64, 128, 3)),
    Rule(64, ANY, ANY, Tile(64, 64, 64, 4)),
    Rule(ANY, ANY, ANY, Tile(128, 64, 64, 3, num_warps=8)),
)


def _chunk_rows(weight: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[1])

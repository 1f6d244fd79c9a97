"""A layer's products over packed tokens, with the norm before them and the sum after them.

At decoding a product reads far more weights than it does arithmetic. linear and gated_linear say what is computed; on a
GPU a small table (tile_for) chooses between our kernels and cuBLAS.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm over the last dimension. weight [K]."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut into programs of block_n weight rows by block_m tokens.

    Fewer than 8 tokens are multiplied and added without tensor cores. block_k columns are loaded at once, num_stages
    tiles are on their way, split_k programs share a row's columns. With slices > 1, one for each warp, a tile's columns
    are shared among the warps, which else share its rows: 16 rows then keep all warps busy.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int = 4
    split_k: int = 1
    slices: int = 1


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, normalised in float32, rounded, then weighted. x [T, K]; returns [T, K]."""
    if not x.is_cuda:
        return rms_norm_reference(x, norm)
    from kernels.linear_triton import rms_norm_triton

    return rms_norm_triton(x, norm)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """norm(x) weight^T + bias + residual, without gradients; a row's result does not depend on the other rows.

    Shapes: x [T, K] and weight [N, K], rows contiguous; bias [N]; residual [T, N]. Returns [T, N].
    """
    if not x.is_cuda:
        return linear_reference(x, weight, bias=bias, norm=norm, residual=residual)
    x = x if norm is None else rms_norm(x, norm)
    tile = tile_for(PLAIN, x.shape[0], weight) if _aligned(x, weight) else None
    if tile is not None:
        from kernels.linear_triton import linear_triton

        return linear_triton(x, weight, bias=bias, residual=residual, tile=tile)
    if residual is not None and bias is None:
        return torch.addmm(residual, x, weight.t())
    out = F.linear(x, weight, bias)
    return out if residual is None else out.add_(residual)


def gated_linear(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
    """silu(norm(x) gate^T) * (norm(x) up^T), without gradients. x [T, K]; gate, up [N, K]. Returns [T, N]."""
    if not x.is_cuda:
        return gated_linear_reference(x, gate, up, norm=norm)
    x = x if norm is None else rms_norm(x, norm)
    tile = tile_for(GATED, x.shape[0], gate) if _aligned(x, gate, up) else None
    if tile is not None:
        from kernels.linear_triton import gated_linear_triton

        return gated_linear_triton(x, gate, up, tile=tile)
    if (both := _side_by_side(gate, up)) is not None:
        return silu_mul(*F.linear(x, both).chunk(2, dim=1))
    return silu_mul(F.linear(x, gate), F.linear(x, up))


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, each rounded. gate, up [T, N], rows contiguous and equally far apart; returns [T, N]."""
    if not gate.is_cuda:
        return silu_mul_reference(gate, up)
    from kernels.linear_triton import silu_mul_triton

    return silu_mul_triton(gate, up)


def rms_norm_reference(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Source: LlamaRMSNorm and Qwen3RMSNorm of transformers, rounding for rounding."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Source: LlamaMLP of transformers."""
    return F.silu(gate) * up


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Source: the order of LlamaDecoderLayer of transformers."""
    out = F.linear(x if norm is None else rms_norm_reference(x, norm), weight, bias)
    return out if residual is None else residual + out


def gated_linear_reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, norm: Norm | None = None
) -> torch.Tensor:
    """Source: LlamaMLP of transformers, after its norm."""
    x = x if norm is None else rms_norm_reference(x, norm)
    return silu_mul_reference(F.linear(x, gate), F.linear(x, up))


@dataclass(frozen=True, slots=True)
class Rule:
    """The tile for at most max_tokens tokens and a weight of at most max_features rows and max_columns columns.

    None is cuBLAS.
    """

    max_tokens: int
    max_features: int
    max_columns: int
    tile: Tile | None


ANY = 1 << 31
# The first rule that holds; beyond the last, cuBLAS. Measured on an H100 at 1, 8, 16, 32, 64, 128 and 256 tokens: short
# rows need many small programs to fill the chip, few rows need several programs a row, a vocabulary needs neither.
PLAIN = (
    Rule(1, 8192, 1024, Tile(8, 16, 64, 6, split_k=3)),
    Rule(1, 8192, ANY, Tile(1, 8, 512, 4)),
    Rule(8, 8192, 1536, Tile(8, 16, 64, 6, split_k=3)),
    Rule(8, 8192, ANY, Tile(8, 16, 256, 6, slices=4)),
    Rule(8, ANY, 1024, Tile(8, 64, 64, 6)),
    Rule(8, ANY, ANY, Tile(8, 32, 256, 5, slices=4)),
    Rule(16, 8192, 1536, Tile(16, 16, 64, 6, split_k=3)),
    Rule(16, 2048, 2048, Tile(16, 64, 64, 6, split_k=4)),
    Rule(16, 2048, ANY, Tile(16, 64, 128, 4, split_k=3)),
    Rule(16, 8192, 2048, Tile(16, 16, 128, 6)),
    Rule(16, 8192, ANY, Tile(16, 64, 128, 4, split_k=2)),
    Rule(16, ANY, 1024, Tile(16, 64, 64, 6)),
    Rule(16, ANY, ANY, Tile(16, 64, 128, 4)),
    Rule(32, 8192, 1536, Tile(32, 16, 64, 6, split_k=3)),
    Rule(32, 2048, ANY, Tile(32, 64, 128, 4, split_k=2)),
    Rule(32, 4096, 4096, Tile(32, 16, 128, 6)),
    Rule(32, 4096, ANY, Tile(32, 64, 128, 4, split_k=2)),
    Rule(32, 8192, ANY, Tile(32, 64, 128, 4)),
    Rule(32, ANY, 1024, Tile(32, 64, 64, 6)),
    Rule(32, ANY, ANY, Tile(32, 64, 128, 4)),
    Rule(64, 1024, 768, Tile(16, 32, 64, 6)),
    Rule(64, 768, 1536, Tile(32, 64, 128, 4, split_k=3)),
    Rule(64, 8192, 1024, Tile(64, 16, 64, 6)),
    Rule(64, 2048, 4096, None),
    Rule(64, 2048, ANY, Tile(64, 64, 64, 4, split_k=4)),
)
GATED = (
    Rule(8, 2048, ANY, Tile(8, 16, 64, 8, num_warps=2)),
    Rule(8, 8192, ANY, Tile(8, 64, 128, 3)),
    Rule(8, ANY, ANY, Tile(8, 16, 256, 5, slices=4)),
    Rule(16, 2048, ANY, Tile(16, 16, 64, 8, num_warps=2)),
    Rule(16, ANY, ANY, Tile(16, 64, 128, 3)),
    Rule(32, 2048, ANY, Tile(32, 16, 64, 8)),
    Rule(32, ANY, ANY, Tile(32, 64, 128, 3)),
    Rule(64, 2048, 768, Tile(16, 64, 64, 6)),
    Rule(64, 2048, ANY, Tile(64, 64, 64, 6)),
    Rule(64, 8192, ANY, Tile(64, 64, 64, 4)),
    Rule(64, ANY, ANY, Tile(64, 64, 64, 3)),
)


def tile_for(rules: tuple[Rule, ...], num_tokens: int, weight: torch.Tensor) -> Tile | None:
    """The choice for num_tokens tokens and weight [N, K]; None is cuBLAS."""
    num_features, num_columns = weight.shape
    for rule in rules:
        if num_tokens <= rule.max_tokens and num_features <= rule.max_features and num_columns <= rule.max_columns:
            return None if rule.tile is None else fit(rule.tile, num_columns)
    return None


def fit(tile: Tile, num_columns: int) -> Tile | None:
    """The tile with columns that divide num_columns; None where even the fewest do not."""
    while num_columns % (tile.block_k * tile.split_k):
        if tile.split_k > 1:
            tile = replace(tile, split_k=tile.split_k - 1)
        elif tile.block_k > 32 * tile.slices:
            tile = replace(tile, block_k=tile.block_k // 2)
        else:
            return None
    return tile


def _aligned(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether our kernels can read these: halves of a word, 16 bytes at a time."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    return halves and all(
        tensor.stride(1) == 1 and tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0 for tensor in (x, *weights)
    )


def _side_by_side(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor | None:
    """[2 N, K] over the storage of two weights [N, K] that follow one another there, else None."""
    rows, columns = upper.shape
    follows = upper.data_ptr() + upper.nbytes == lower.data_ptr()
    shared = upper.untyped_storage().data_ptr() == lower.untyped_storage().data_ptr()
    if not (follows and shared and upper.is_contiguous() and lower.is_contiguous() and lower.shape == upper.shape):
        return None
    return upper.as_strided((2 * rows, columns), (columns, 1))

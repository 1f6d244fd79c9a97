"""Products over eight-bit weights: reference against Triton, and what smoothing is worth."""

from typing import Any, get_args

import pytest
import torch

from kernels import lowbit as definition
from kernels.linear import Norm, Tile, rms_norm, tile_for
from kernels.lowbit import GATED, LARGEST, PLAIN, Kind, LowBit, empty_lowbit, gated_linear, linear, quantise, smoothing
from kernels.lowbit_triton import gated_linear_triton, linear_triton

pytestmark = pytest.mark.usefixtures("poisoned_new_empty")

ON_CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen"),
)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Triton's interpreter is wrong about bf16, so float32 stands in for it there
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-2}
KINDS = get_args(Kind)
TILES = [
    pytest.param(Tile(8, 16, 64, 3), id="8 tokens"),
    pytest.param(Tile(32, 64, 32, 4), id="32 tokens"),
    pytest.param(Tile(16, 32, 32, 3, split_k=3), id="16 tokens, 3 parts"),
]


def data(*shape: int, device: str = "cpu", scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, DTYPE[device])


def lowbit(kind: Kind, weight: torch.Tensor, **factors: torch.Tensor) -> LowBit:
    out = empty_lowbit(kind, *weight.shape, device=weight.device)
    quantise(weight, out, **factors)
    return out


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype
    tolerance = TOLERANCE[got.device.type]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("tokens", "features"), [(1, 16), (9, 72), (37, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_with_bias_and_residual_equals_its_definition(
    kind: Kind, tile: Tile, tokens: int, features: int, device: str
) -> None:
    x = data(tokens, 192, device=device)
    weight = lowbit(kind, data(features, 192, device=device, scale=0.1, seed=1))
    parts: dict[str, Any] = {
        "bias": data(features, device=device, seed=2),
        "residual": data(tokens, features, device=device, seed=3),
    }
    for names in ((), ("residual",), ("bias", "residual")):
        given = {name: parts[name] if name in names else None for name in parts}
        assert_close(linear_triton(x, weight, **given, tile=tile), definition.linear_reference(x, weight, **given))


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_product_of_rows_of_one_storage_equals_its_definition(kind: Kind, device: str) -> None:
    x = data(11, 192, device=device)
    both = lowbit(kind, data(144, 192, device=device, scale=0.1, seed=1))
    gate, up = both.rows(0, 72), both.rows(72, 144)
    got = gated_linear_triton(x, gate, up, tile=Tile(16, 32, 64, 3))
    assert_close(got, definition.gated_linear_reference(x, gate, up))


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
def test_a_row_is_bit_equal_whatever_shares_its_batch(device: str) -> None:
    x, weight = data(37, 192, device=device), lowbit("int8", data(64, 192, device=device, seed=1))
    for tile in (Tile(16, 16, 64, 3), Tile(16, 32, 32, 3, split_k=3)):
        whole = linear_triton(x, weight, bias=None, residual=None, tile=tile)
        for row in (0, 7, 36):
            alone = linear_triton(x[row : row + 1], weight, bias=None, residual=None, tile=tile)
            assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_is_the_product_with_the_widened_weight(kind: Kind) -> None:
    x, norm = data(5, 96), Norm(1 + data(96, scale=0.2, seed=9), 1e-5)
    weight, bias = lowbit(kind, data(40, 96, scale=0.1, seed=1)), data(40, seed=2)
    residual = data(5, 40, seed=3)
    wanted = residual + rms_norm(x, norm) @ weight.widened().t() + bias
    torch.testing.assert_close(linear(x, weight, bias=bias, norm=norm, residual=residual), wanted)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.5 / 127), ("fp8", 1 / 28)])
def test_every_weight_is_within_half_a_step(kind: Kind, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definition, "CHUNK_ELEMENTS", 7 * 96)  # 40 rows in six pieces
    weight = data(40, 96, seed=1) * torch.logspace(-3, 3, 40)[:, None]
    weight[3] = 0
    copy = lowbit(kind, weight)
    largest = weight.abs().amax(dim=1)
    assert (copy.widened() - weight).abs().amax(dim=1).le(largest * error * 1.001).all()
    assert copy.values.float().abs().amax(dim=1).eq(torch.where(largest > 0, LARGEST[kind], 0)).all()


def test_factors_of_rows_and_columns_are_what_a_weight_is_multiplied_by() -> None:
    weight = data(40, 96, seed=1)
    columns, rows = torch.exp2(torch.arange(96) % 5 - 2.0), torch.exp2(torch.arange(40) % 3 - 1.0)
    copy = lowbit("int8", weight, columns=columns, rows=rows)
    wanted = weight * columns * rows[:, None]
    assert (copy.widened() - wanted).abs().amax(dim=1).le(wanted.abs().amax(dim=1) / 250).all()
    assert torch.equal(copy.values, lowbit("int8", weight * columns).values)


def test_scales_are_the_nearest_powers_of_two_to_those_of_smoothquant() -> None:
    activations, weights = data(96).abs() * 3, [data(40, 96, seed=1), data(24, 96, seed=2)]
    exact = (activations / torch.cat(weights).abs().amax(dim=0)).sqrt()
    got = smoothing(activations, weights)
    assert torch.equal(got.log2(), got.log2().round())
    assert (got / exact).log2().abs().le(0.5001).all()
    assert smoothing(torch.zeros(96), weights).isfinite().all(), "a channel that never fires"


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.8), ("fp8", 1.05)])
def test_smoothing_takes_of_the_error_where_channels_stand_out(kind: Kind, share: float) -> None:
    """Three planted channels of a hundred times the others, as large models have them (SmoothQuant, fig. 4)."""
    x, weight = data(64, 256), data(128, 256, scale=0.05, seed=1)
    x[:, [5, 100, 201]] *= 100
    factors = smoothing(x.abs().amax(dim=0), [weight])

    def error(given: torch.Tensor, copy: LowBit) -> float:
        return float((linear(given, copy) - x @ weight.t()).norm() / (x @ weight.t()).norm())

    plain = error(x, lowbit(kind, weight))
    smoothed = error(x / factors, lowbit(kind, weight, columns=factors))
    assert smoothed < share * plain, (smoothed, plain)


@pytest.mark.parametrize("rules", [PLAIN, GATED])
@pytest.mark.parametrize(("features", "columns"), [(576, 576), (1536, 576), (576, 1536), (6144, 4096), (151936, 4096)])
@pytest.mark.parametrize("tokens", [1, 8, 20, 64, 1024])
def test_every_product_has_a_tile(rules: Any, features: int, columns: int, tokens: int) -> None:
    tile = tile_for(rules, tokens, torch.empty(features, columns, device="meta"))
    assert tile is not None and columns % (tile.block_k * tile.split_k) == 0
    assert rules is PLAIN or tile.split_k == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 300])
def test_the_chosen_kernels_equal_the_definitions_on_a_gpu(tokens: int, kind: Kind) -> None:
    width, features = 576, 1536
    x, norm = data(tokens, width, device="cuda"), Norm(1 + data(width, device="cuda", scale=0.2, seed=9), 1e-5)
    both = lowbit(kind, data(2 * features, width, device="cuda", scale=0.05, seed=1))
    down = lowbit(kind, data(width, features, device="cuda", scale=0.05, seed=2))
    gate, up = both.rows(0, features), both.rows(features, 2 * features)
    got = gated_linear(x, gate, up, norm=norm)
    assert_close(got, definition.gated_linear_reference(x, gate, up, norm=norm))
    assert_close(linear(got, down, residual=x), definition.linear_reference(got, down, residual=x))

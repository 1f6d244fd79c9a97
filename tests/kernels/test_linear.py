from typing import Any

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from kernels import linear as definition
from kernels.linear import Norm, Rule, Tile, fit, gated_linear, linear, rms_norm, silu_mul, tile_for
from kernels.linear_triton import gated_linear_triton, linear_triton, rms_norm_triton, silu_mul_triton

pytestmark = pytest.mark.usefixtures("poisoned_new_empty")

ON_CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen"),
)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Triton's interpreter is wrong about bf16, so float32 stands in for it there
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-2}
TILES = [
    pytest.param(Tile(8, 16, 64, 3), id="8 tokens"),
    pytest.param(Tile(4, 16, 64, 3), id="4 tokens"),
    pytest.param(Tile(32, 64, 32, 4), id="32 tokens"),
    pytest.param(Tile(8, 16, 64, 3, slices=4), id="8 tokens, 4 slices"),
]


def data(*shape: int, device: str, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, DTYPE[device])


def norm_of(width: int, device: str) -> Norm:
    return Norm(1 + data(width, device=device, scale=0.2, seed=9), 1e-5)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype
    tolerance = TOLERANCE[got.device.type]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("tokens", "features"), [(1, 16), (9, 72), (37, 40)])
def test_a_product_with_bias_and_residual_equals_its_definition(
    tile: Tile, tokens: int, features: int, device: str
) -> None:
    x, weight = data(tokens, 192, device=device), data(features, 192, device=device, scale=0.1, seed=1)
    parts: dict[str, Any] = {
        "bias": data(features, device=device, seed=2),
        "residual": data(tokens, features, device=device, seed=3),
    }
    for names in ((), ("residual",), ("bias", "residual")):
        given = {name: parts[name] if name in names else None for name in parts}
        assert_close(linear_triton(x, weight, **given, tile=tile), definition.linear_reference(x, weight, **given))


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("tile", TILES)
def test_a_gated_product_equals_its_definition(tile: Tile, device: str) -> None:
    x, weights = data(11, 192, device=device), data(2, 72, 192, device=device, scale=0.1, seed=1)
    got = gated_linear_triton(x, weights[0], weights[1], tile=tile)
    assert_close(got, definition.gated_linear_reference(x, weights[0], weights[1]))


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("split_k", [2, 3])
def test_programs_that_share_columns_give_the_whole_sum_call_after_call(split_k: int, device: str) -> None:
    tile = Tile(16, 32, 64, 3, 4, split_k, slices=2) if split_k == 3 else Tile(16, 32, 32, 3, 4, split_k)
    x, residual = data(18, 192, device=device), data(18, 72, device=device, seed=3)
    for seed in (1, 2):
        weight = data(72, 192, device=device, scale=0.1, seed=seed)
        got = linear_triton(x, weight, bias=None, residual=residual, tile=tile)
        assert_close(got, definition.linear_reference(x, weight, residual=residual))


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("tile", [Tile(16, 16, 64, 3), Tile(16, 32, 32, 3, 4, 3), Tile(16, 16, 64, 3, slices=4)])
def test_a_row_is_bit_equal_whatever_shares_its_batch(tile: Tile, device: str) -> None:
    x, weight = data(37, 192, device=device), data(64, 192, device=device, scale=0.1, seed=1)
    whole = linear_triton(x, weight, bias=None, residual=None, tile=tile)
    for row in (0, 7, 36):
        alone = linear_triton(x[row : row + 1], weight, bias=None, residual=None, tile=tile)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
def test_rows_may_be_a_slice_of_a_larger_storage(device: str) -> None:
    storage = data(96, 256, device=device, scale=0.1)
    x = data(5, 256, device=device)[:, :192]
    weight = storage[32:80, :192]
    got = linear_triton(x, weight, bias=None, residual=None, tile=Tile(8, 16, 64, 3))
    assert_close(got, definition.linear_reference(x, weight))


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("width", [64, 576, 1000])
def test_norm_and_gate_kernels_equal_their_definitions(width: int, device: str) -> None:
    x, norm = data(3, 2 * width, device=device), norm_of(width, device)
    gate, up = x.chunk(2, dim=1)
    assert_close(rms_norm_triton(gate, norm), definition.rms_norm_reference(gate, norm))
    assert_close(silu_mul_triton(gate, up), definition.silu_mul_reference(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definitions_are_those_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96)).to(dtype)
    layer_norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(layer_norm.weight)
    x = torch.randn(7, 64, dtype=dtype)
    norm = Norm(layer_norm.weight, 1e-5)
    with torch.no_grad():
        gated = gated_linear(x, mlp.gate_proj.weight, mlp.up_proj.weight, norm=norm)
        assert torch.equal(rms_norm(x, norm), layer_norm(x))
        assert torch.equal(linear(gated, mlp.down_proj.weight, residual=x), x + mlp(layer_norm(x)))


def test_a_tile_is_cut_to_columns_that_divide_the_row() -> None:
    assert fit(Tile(8, 32, 128, 4), 576) == Tile(8, 32, 64, 4)
    assert fit(Tile(8, 32, 128, 4, split_k=4), 1024) == Tile(8, 32, 128, 4, split_k=4)
    assert fit(Tile(8, 32, 128, 4, split_k=3), 1024) == Tile(8, 32, 128, 4, split_k=2)
    assert fit(Tile(8, 16, 512, 4, slices=4), 576) is None
    assert fit(Tile(8, 32, 128, 4), 100) is None


@pytest.mark.parametrize("rules", [definition.PLAIN, definition.GATED])
def test_every_rule_is_the_choice_for_some_product_and_a_large_batch_goes_to_cublas(rules: tuple[Rule, ...]) -> None:
    assert [rule.max_tokens for rule in rules] == sorted(rule.max_tokens for rule in rules)
    for number, rule in enumerate(rules):
        earlier = (one for one in rules[:number] if one.max_tokens == rule.max_tokens)
        assert not any(one.max_features >= rule.max_features and one.max_columns >= rule.max_columns for one in earlier)
    weight = torch.empty(4096, 4096, device="meta")
    assert tile_for(rules, 1, weight) is not None
    assert tile_for(rules, 8192, weight) is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 300])
def test_the_chosen_kernels_equal_the_definitions_on_a_gpu(tokens: int) -> None:
    width, features = 576, 1536
    x, norm = data(tokens, width, device="cuda"), norm_of(width, "cuda")
    weights = data(2 * features, width, device="cuda", scale=0.05, seed=1)
    down = data(width, features, device="cuda", scale=0.05, seed=2)
    gate, up = weights.chunk(2)
    got = gated_linear(x, gate, up, norm=norm)
    assert_close(got, definition.gated_linear_reference(x, gate, up, norm=norm))
    assert_close(linear(got, down, residual=x), definition.linear_reference(got, down, residual=x))
    assert_close(silu_mul(got, got), definition.silu_mul_reference(got, got))


@pytest.mark.gpu
def test_overlapping_kernels_of_a_captured_chain_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the kernel that poisons an output would stand between ours
    width = 1024
    weights = data(24, width, width, device="cuda", scale=0.03)
    norm = norm_of(width, "cuda")
    x = data(4, width, device="cuda")
    tile = Tile(8, 16, 128, 4)

    def chain() -> torch.Tensor:
        hidden = x
        for weight in weights:
            hidden = linear_triton(rms_norm_triton(hidden, norm), weight, bias=None, residual=hidden, tile=tile)
        return hidden

    wanted = chain().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(20):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, wanted)

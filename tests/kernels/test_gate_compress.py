"""A gate's descriptors of cached keys, reference and kernel, against drafter/gate.py's of the same keys in order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from drafter.gate import GateConfig, Gates
from kernels.gate import compress, compress_reference, empty_compressed
from kernels.gate_compress_triton import compress_triton

LAYERS, HEADS, TABLE_BLOCKS = 2, (4, 2), 5


@dataclass(frozen=True)
class Kernel:
    """One way to compress, and what it is given."""

    compress: Callable[..., None]
    device: str
    dtype: torch.dtype
    tolerance: float
    stored: torch.dtype | None = None  # descriptors; None: as dtype

    def compare(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """What was stored, with what was to be before it was rounded to FP8."""
        found, rtol, atol = found.cpu().float(), self.tolerance, self.tolerance * 10
        if self.stored == FP8:  # four bits, and the smallest is 2^-9
            rtol, atol, wanted = 2**-4 + self.tolerance, 2**-9 + self.tolerance / 10, wanted.clamp(-448, 448)
            if self.compress is compress_triton:  # its interpreter loses the carry of what rounds to a power of two
                found = found.where(wanted.frexp().mantissa.abs() < 1 - 2**-5, wanted)
        torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


FP8 = torch.float8_e4m3fn
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
KERNELS = [
    pytest.param(Kernel(compress_reference, "cpu", torch.float32, 1e-5), id="reference"),
    pytest.param(Kernel(compress_triton, "cpu", torch.float32, 1e-5), id="triton", marks=on_cpu),
    pytest.param(Kernel(compress_reference, "cpu", torch.float32, 1e-5, FP8), id="fp8"),
    pytest.param(Kernel(compress_triton, "cpu", torch.float32, 1e-5, FP8), id="triton-fp8", marks=on_cpu),
    pytest.param(Kernel(compress, "cuda", torch.float32, 1e-4), id="float32", marks=pytest.mark.gpu),
    pytest.param(Kernel(compress, "cuda", torch.bfloat16, 5e-2), id="bfloat16", marks=pytest.mark.gpu),
    pytest.param(Kernel(compress, "cuda", torch.bfloat16, 5e-2, FP8), id="bfloat16-fp8", marks=pytest.mark.gpu),
]


class Cached:
    """Sequences' keys in shuffled blocks of a cache that holds nothing else but NaN, and gates for them."""

    def __init__(
        self, kernel: Kernel, lengths: list[int], *, block_size: int, select_block: int, head_dim: int, gate_dim: int
    ) -> None:
        self.kernel, self.select_block, self.block_size = kernel, select_block, block_size
        generator = torch.Generator().manual_seed(sum(lengths))
        config = Qwen3Config(
            hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS[0], num_key_value_heads=HEADS[1],
            head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )  # fmt: skip
        gates = Gates(GateConfig.of(config, select_block=select_block, gate_dim=gate_dim)).requires_grad_(False)
        for parameter in gates.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5
        self.gates = gates.to(kernel.device, kernel.dtype)
        num_blocks = len(lengths) * TABLE_BLOCKS + 1
        order = torch.randperm(num_blocks, generator=generator)[: len(lengths) * TABLE_BLOCKS]
        # strided, as a cycle's tables are
        tables = torch.full((len(lengths), TABLE_BLOCKS + 2), -1, dtype=torch.int32)[:, :TABLE_BLOCKS]
        tables[:] = order.view(-1, TABLE_BLOCKS)
        storage = torch.full((LAYERS, 2, num_blocks, block_size, HEADS[1], head_dim), torch.nan)
        keys = torch.randn(LAYERS, len(lengths), TABLE_BLOCKS * block_size, HEADS[1], head_dim, generator=generator)
        for row, length in enumerate(lengths):
            index = torch.arange(length)
            storage[:, 0, tables[row].long()[index // block_size], index % block_size] = keys[:, row, :length]
        self.storage = storage.to(kernel.device, kernel.dtype)
        self.tables = tables.to(kernel.device)
        self.keys = keys.to(kernel.device, kernel.dtype)

    def empty(self) -> torch.Tensor:
        select_block, stored = self.select_block, self.kernel.stored
        return empty_compressed(self.gates.weights(), self.storage, select_block=select_block, dtype=stored)

    def run(self, out: torch.Tensor, begins: list[int], ends: list[int], max_tokens: int) -> None:
        self.kernel.compress(
            self.gates.weights(),
            self.storage,
            out,
            block_tables=self.tables,
            begins=torch.tensor(begins, dtype=torch.int32, device=self.kernel.device),
            ends=torch.tensor(ends, dtype=torch.int32, device=self.kernel.device),
            max_tokens=max_tokens,
        )

    def wanted(self, begins: list[int], ends: list[int], filled: float) -> torch.Tensor:
        """Room filled with a value, and what the ranges touch described one block at a time."""
        size, parts = self.select_block, self.block_size // self.select_block
        out = self.empty().to(self.kernel.dtype).fill_(filled)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            for block in range(begin // size, -(-end // size) if begin < end else 0):
                keys = self.keys[:, row, block * size : min(end, (block + 1) * size)]
                start = torch.tensor(block * size, device=keys.device)
                for layer in range(LAYERS):
                    described = self.gates.compress(layer, keys[layer], start)
                    out[layer, self.tables[row, block // parts], block % parts] = described
        return out.float().cpu()


SHAPES: list[dict[str, int]] = [
    {"block_size": 8, "select_block": 4, "head_dim": 6, "gate_dim": 16},
    {"block_size": 16, "select_block": 16, "head_dim": 32, "gate_dim": 10},
    {"block_size": 6, "select_block": 3, "head_dim": 40, "gate_dim": 40},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=5)
@given(data=st.data())
def test_touched_blocks_are_compressed_from_committed_keys_and_others_stay(
    kernel: Kernel, shape: dict[str, int], data: st.DataObject
) -> None:
    limit = TABLE_BLOCKS * shape["block_size"]
    pairs = st.tuples(st.integers(0, limit), st.integers(0, limit)).map(sorted)
    ranges = data.draw(st.lists(pairs, min_size=1, max_size=4))
    begins, ends = ([r[side] for r in ranges] for side in (0, 1))
    cached = Cached(kernel, ends, **shape)
    out = cached.empty().fill_(-7.0)
    most = max(end - begin for begin, end in ranges) + data.draw(st.integers(0, 5))
    cached.run(out, begins, ends, max(1, most))
    kernel.compare(out, cached.wanted(begins, ends, -7.0))


@pytest.mark.parametrize("kernel", KERNELS)
def test_descriptors_do_not_depend_on_how_the_keys_came(kernel: Kernel) -> None:
    cached = Cached(kernel, [37, 20], block_size=8, select_block=4, head_dim=16, gate_dim=16)
    at_once, piecewise = cached.empty(), cached.empty()
    cached.run(at_once, [0, 0], [37, 20], 37)
    for begins, ends in [([0, 0], [11, 3]), ([11, 3], [11, 18]), ([11, 18], [12, 20]), ([12, 20], [37, 20])]:
        cached.run(piecewise, begins, ends, 37)
    torch.testing.assert_close(at_once.float(), piecewise.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_heads_of_128_and_blocks_of_64_are_compressed(kernel: Kernel) -> None:
    shape: dict[str, Any] = {"block_size": 64, "select_block": 64, "head_dim": 128, "gate_dim": 128}
    cached = Cached(kernel, [200, 64], **shape)
    out = cached.empty()
    cached.run(out, [60, 0], [200, 64], 140)
    kernel.compare(out, cached.wanted([60, 0], [200, 64], 0.0))


@pytest.mark.parametrize("kernel", [each for each in KERNELS if "fp8" in str(each.id)])
def test_what_fp8_does_not_hold_is_the_largest_it_does(kernel: Kernel) -> None:
    cached = Cached(kernel, [16], block_size=16, select_block=16, head_dim=16, gate_dim=16)
    cached.gates.key_norm.data *= 1000
    out = cached.empty()
    cached.run(out, [0], [16], 16)
    wanted = cached.wanted([0], [16], 0.0)
    assert wanted.abs().max() > 448
    kernel.compare(out, wanted)


@pytest.mark.gpu
def test_compressing_is_captured_and_follows_its_inputs() -> None:
    kernel = Kernel(compress, "cuda", torch.bfloat16, 5e-2)
    cached = Cached(kernel, [80, 50], block_size=16, select_block=16, head_dim=32, gate_dim=32)
    out, weights = cached.empty(), cached.gates.weights()
    begins, ends = (torch.zeros(2, dtype=torch.int32, device="cuda") for _ in range(2))
    options: dict[str, Any] = {"block_tables": cached.tables, "begins": begins, "ends": ends, "max_tokens": 40}
    compress(weights, cached.storage, out, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compress(weights, cached.storage, out, **options)
    for first, last in (([0, 10], [40, 50]), ([40, 50], [80, 50])):
        begins.copy_(torch.tensor(first))
        ends.copy_(torch.tensor(last))
        out.fill_(-7.0)
        graph.replay()
        wanted = cached.wanted(first, last, -7.0)
        torch.testing.assert_close(out.cpu().float(), wanted, atol=0.5, rtol=5e-2)

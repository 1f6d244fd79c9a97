"""Descriptors against minima, maxima and means of one block at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.describe import Kind, describe, describe_reference, empty_descriptors
from kernels.describe_triton import describe_triton

LAYERS, HEADS = 2, 3
TABLE_BLOCKS = 5


@dataclass(frozen=True)
class Kernel:
    """One way to describe, and what it is given."""

    describe: Callable[..., None]
    device: str
    dtype: torch.dtype


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
KERNELS = [
    pytest.param(Kernel(describe_reference, "cpu", torch.float32), id="reference"),
    pytest.param(Kernel(describe_triton, "cpu", torch.float32), id="triton", marks=on_cpu),
    pytest.param(Kernel(describe, "cuda", torch.float32), id="float32", marks=pytest.mark.gpu),
    pytest.param(Kernel(describe, "cuda", torch.bfloat16), id="bfloat16", marks=pytest.mark.gpu),
]


class Cached:
    """Keys of sequences in shuffled blocks among others; what is no committed key is not a number.

    storage and tables as describe takes them; keys [layers, B, L, Hkv, D] float32, as cached.
    """

    def __init__(self, kernel: Kernel, lengths: list[int], block_size: int, head_dim: int) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        num_rows = len(lengths)
        num_blocks = num_rows * TABLE_BLOCKS + 2
        order = torch.randperm(num_blocks, generator=generator)
        tables = torch.full((num_rows, TABLE_BLOCKS + 3), -1, dtype=torch.int32)[:, : TABLE_BLOCKS + 1]
        tables[:, :TABLE_BLOCKS] = order[: num_rows * TABLE_BLOCKS].view(num_rows, TABLE_BLOCKS)
        storage = torch.full((LAYERS, 2, num_blocks, block_size, HEADS, head_dim), torch.nan)
        keys = torch.randn(LAYERS, num_rows, TABLE_BLOCKS * block_size, HEADS, head_dim, generator=generator)
        for row, length in enumerate(lengths):
            index = torch.arange(length)
            storage[:, 0, tables[row].long()[index // block_size], index % block_size] = keys[:, row, :length]
        self.storage = storage.to(kernel.device, kernel.dtype)
        self.tables = tables.to(kernel.device)
        self.keys = keys.to(kernel.dtype).float()


def wanted(kind: Kind, keys: torch.Tensor) -> torch.Tensor:
    """keys [layers, N, Hkv, D], of one selection block."""
    if kind == "minmax":
        return torch.cat([keys.amin(dim=1), keys.amax(dim=1)], dim=2)
    return keys.mean(dim=1)


@pytest.mark.parametrize(("block_size", "select_block", "head_dim"), [(8, 4, 6), (4, 4, 16), (4, 1, 5)])
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=10)
@given(data=st.data())
def test_touched_blocks_are_described_from_committed_keys_and_others_stay(
    kernel: Kernel, kind: Kind, block_size: int, select_block: int, head_dim: int, data: st.DataObject
) -> None:
    limit = TABLE_BLOCKS * block_size
    pairs = st.tuples(st.integers(0, limit), st.integers(0, limit)).map(sorted)
    ranges = data.draw(st.lists(pairs, min_size=1, max_size=3))
    begins, ends = ([r[side] for r in ranges] for side in (0, 1))
    cached = Cached(kernel, ends, block_size, head_dim)
    out = empty_descriptors(kind, cached.storage, select_block=select_block).fill_(-7.0)
    max_tokens = max(end - begin for begin, end in ranges) + data.draw(st.integers(0, 5))
    kernel.describe(
        kind,
        cached.storage,
        out,
        block_tables=cached.tables,
        begins=torch.tensor(begins, dtype=torch.int32, device=kernel.device),
        ends=torch.tensor(ends, dtype=torch.int32, device=kernel.device),
        max_tokens=max(1, max_tokens),
    )
    expected = torch.full(out.shape, -7.0)
    parts = block_size // select_block
    for row, (begin, end) in enumerate(ranges):
        for block in range(begin // select_block, -(-end // select_block) if begin < end else 0):
            keys = cached.keys[:, row, block * select_block : min(end, (block + 1) * select_block)]
            expected[:, cached.tables[row, block // parts], block % parts] = wanted(kind, keys)
    tolerance = 1e-6 if kernel.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.cpu().float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("kernel", KERNELS)
def test_descriptors_do_not_depend_on_how_the_keys_came(kernel: Kernel, kind: Kind) -> None:
    cached = Cached(kernel, [37, 20], 8, 16)
    options = {"block_tables": cached.tables, "max_tokens": 37}

    def column(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=kernel.device)

    at_once = empty_descriptors(kind, cached.storage, select_block=4)
    kernel.describe(kind, cached.storage, at_once, begins=column(0, 0), ends=column(37, 20), **options)
    piecewise = empty_descriptors(kind, cached.storage, select_block=4)
    for begins, ends in [((0, 0), (11, 3)), ((11, 3), (11, 18)), ((11, 18), (12, 20)), ((12, 20), (37, 20))]:
        kernel.describe(kind, cached.storage, piecewise, begins=column(*begins), ends=column(*ends), **options)
    assert torch.equal(at_once, piecewise)

"""Scores of blocks, reference and kernel, against the keys themselves in float64, one block at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.attention import BlockMaxima, PagedSequences, paged_sequences
from kernels.describe import Kind, describe, empty_descriptors
from kernels.scores_triton import bound_scores_triton, mean_scores_triton, verified_scores_triton
from kernels.select import (
    bound_scores,
    bound_scores_reference,
    mean_scores,
    mean_scores_reference,
    verified_scores,
    verified_scores_reference,
)

SELECT_BLOCK = 4


@dataclass(frozen=True)
class Kernel:
    """One way to score, and what it is given."""

    bound: Callable[..., torch.Tensor]
    mean: Callable[..., torch.Tensor]
    verified: Callable[..., None]
    device: str
    dtype: torch.dtype
    tolerance: float


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
on_gpu = (bound_scores, mean_scores, verified_scores, "cuda")
KERNELS = [
    pytest.param(
        Kernel(bound_scores_reference, mean_scores_reference, verified_scores_reference, "cpu", torch.float32, 1e-5),
        id="reference",
    ),
    pytest.param(
        Kernel(bound_scores_triton, mean_scores_triton, verified_scores_triton, "cpu", torch.float32, 1e-5),
        id="triton",
        marks=on_cpu,
    ),
    pytest.param(Kernel(*on_gpu, torch.float32, 1e-4), id="float32", marks=pytest.mark.gpu),
    pytest.param(Kernel(*on_gpu, torch.bfloat16, 2e-2), id="bfloat16", marks=pytest.mark.gpu),
]


class Case:
    """Sequences in shuffled blocks among others, described up to their contexts; the rest is not a number."""

    def __init__(
        self,
        kernel: Kernel,
        kind: Kind,
        contexts: list[int],
        news: list[int],
        *,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 8,
        block_size: int = 8,
        max_context: int | None = None,
    ) -> None:
        self.kernel, self.contexts, self.news = kernel, contexts, news
        torch.manual_seed(sum(contexts) + sum(news))
        bound = max(contexts) if max_context is None else max_context
        width = -(-(bound + max(news)) // block_size)
        num_blocks = len(contexts) * width + 2
        # strided, as a cycle's tables are
        tables = torch.full((len(contexts), width + 3), -1, dtype=torch.int32)[:, :width]
        tables[:] = torch.randperm(num_blocks)[: len(contexts) * width].view(-1, width)
        options: dict[str, Any] = {"device": kernel.device, "dtype": kernel.dtype}
        storage = torch.randn(1, 2, num_blocks, block_size, heads[1], head_dim).to(**options)
        self.keys = storage.cpu()[0, 0][tables.long()].flatten(1, 2).double()  # [B, L, Hkv, D]
        self.query = torch.randn(heads[0], sum(news), head_dim).to(**options).transpose(0, 1)
        descriptors = empty_descriptors(kind, storage, select_block=SELECT_BLOCK).fill_(torch.nan)
        lengths = torch.tensor(contexts, dtype=torch.int32, device=kernel.device)
        tables = tables.to(kernel.device)
        describe(
            kind,
            storage,
            descriptors,
            block_tables=tables,
            begins=torch.zeros_like(lengths),
            ends=lengths,
            max_tokens=max(1, *contexts),
        )
        self.descriptors = descriptors[0]
        self.seqs = sequences(contexts, news, bound, tables, block_size)

    def compare(self, scores: torch.Tensor, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """A complete block's is the largest of its new tokens', score(query [Hkv, D], keys [P, Hkv, D]) -> [Hkv]."""
        assert scores.dtype == torch.float32
        num_kv_heads = self.keys.shape[2]
        queries = self.query.double().cpu().unflatten(1, (num_kv_heads, -1)).mean(dim=2).split(self.news)
        for row, context in enumerate(self.contexts):
            for block in range(context // SELECT_BLOCK):
                keys = self.keys[row, block * SELECT_BLOCK : (block + 1) * SELECT_BLOCK]
                expected = torch.full((num_kv_heads,), -torch.inf, dtype=torch.float64)
                for q in queries[row]:
                    expected = torch.maximum(expected, score(q, keys))
                tolerance = self.kernel.tolerance
                torch.testing.assert_close(
                    scores[row, :, block].cpu().double(), expected, atol=tolerance * 10, rtol=tolerance
                )


def sequences(
    contexts: list[int], news: list[int], bound: int, tables: torch.Tensor, block_size: int
) -> PagedSequences:
    device = tables.device
    return paged_sequences(
        cu_seqlens_q=torch.tensor([0, *news]).cumsum(0).int().to(device),
        max_seqlen_q=max(news),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        max_context=bound,
        block_tables=tables,
        slots=torch.zeros(sum(news), dtype=torch.int64, device=device),
        block_size=block_size,
    )


def bound_of(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.maximum(q * keys.amin(dim=0), q * keys.amax(dim=0)).sum(dim=1)


def mean_of(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (q * keys.mean(dim=0)).sum(dim=1)


SHAPES = [([37, 5, 0, 64], [1, 1, 1, 1]), ([20, 33, 41], [3, 0, 5]), ([200], [2])]


@pytest.mark.parametrize(("contexts", "news"), SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bounds_are_the_larger_products_with_a_blocks_extremes(
    kernel: Kernel, contexts: list[int], news: list[int]
) -> None:
    case = Case(kernel, "minmax", contexts, news)
    case.compare(kernel.bound(case.query, case.descriptors, case.seqs), bound_of)


@pytest.mark.parametrize(("contexts", "news"), SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_means_are_multiplied_with_the_mean_query(kernel: Kernel, contexts: list[int], news: list[int]) -> None:
    case = Case(kernel, "mean", contexts, news)
    case.compare(kernel.mean(case.query, case.descriptors, case.seqs), mean_of)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((1, 1), 16, 4), ((7, 1), 5, 16), ((4, 4), 12, 8), ((10, 2), 128, 64)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_geometry_is_scored(kernel: Kernel, heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    options: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "max_context": 150}
    case = Case(kernel, "minmax", [29, 70], [2, 1], **options)
    case.compare(kernel.bound(case.query, case.descriptors, case.seqs), bound_of)
    case = Case(kernel, "mean", [29, 70], [2, 1], **options)
    case.compare(kernel.mean(case.query, case.descriptors, case.seqs), mean_of)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_key_of_a_block_exceeds_its_bound(kernel: Kernel) -> None:
    case = Case(kernel, "minmax", [64, 48], [1, 1], heads=(2, 2))
    scores = kernel.bound(case.query, case.descriptors, case.seqs).cpu()
    products = torch.einsum("bhd,blhd->bhl", case.query.cpu().double(), case.keys)
    for row, context in enumerate(case.contexts):
        best = products[row, :, :context].unflatten(1, (-1, SELECT_BLOCK)).amax(dim=2)
        assert (best <= scores[row, :, : best.shape[1]] + 0.05).all()


@pytest.mark.parametrize("news", [[1, 1, 1], [3, 0, 5]])
@pytest.mark.parametrize("kernel", KERNELS)
def test_verified_scores_are_the_largest_log_weights(kernel: Kernel, news: list[int]) -> None:
    torch.manual_seed(1)
    contexts, num_tokens, num_blocks = [200, 100, 280], sum(news), 73
    maxima = torch.randn(num_tokens, 6, num_blocks) * 3
    for rows, context in zip(maxima.split(news), contexts, strict=True):
        rows[:, :, context // SELECT_BLOCK + 1 :] = -torch.inf
    lse = torch.randn(num_tokens, 6) + 3
    # a token that pads a batch sees nothing
    maxima[-1, 2], lse[-1, 2] = -torch.inf, -torch.inf
    seqs = sequences(contexts, news, 300, torch.zeros(3, 64, dtype=torch.int32, device=kernel.device), 8)
    out = torch.full((5, 2, num_blocks + 3), 7.0, device=kernel.device)
    rows = torch.tensor([4, 0, 3], device=kernel.device)
    kernel.verified(BlockMaxima(maxima.to(kernel.device), lse.to(kernel.device), SELECT_BLOCK), seqs, out, rows)
    expected = torch.full((3, 2, num_blocks), -torch.inf)
    weights = (maxima.exp() / lse.exp().clamp(min=1e-30)[:, :, None]).log()
    token = 0
    for row, new in enumerate(news):
        for _ in range(new):
            for head in range(6):
                expected[row, head // 3] = torch.maximum(expected[row, head // 3], weights[token, head])
            token += 1
    scores = out[rows, :, :num_blocks]
    torch.testing.assert_close(scores.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert bool((out[[1, 2]] == 7).all()) and bool((out[:, :, num_blocks:] == 7).all()), "nothing else is written"

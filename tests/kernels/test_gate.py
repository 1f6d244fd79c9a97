"""Scores of a gate over a paged cache, reference and kernels, against drafter/gate.py's, one sequence at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from drafter.gate import GateConfig, Gates
from kernels.attention import PagedSequences, paged_sequences
from kernels.gate import gate_choose, gate_choose_reference, gate_scores, gate_scores_reference
from kernels.gate_triton import gate_choose_triton, gate_scores_triton
from kernels.select import BlockLists, Choice, choose_blocks_reference

SELECT_BLOCK = 4
LAYER = 1


@dataclass(frozen=True)
class Kernel:
    """One way to score and to choose, and what it is given."""

    score: Callable[..., torch.Tensor]
    choose: Callable[..., BlockLists]
    device: str
    dtype: torch.dtype
    tolerance: float
    stored: torch.dtype | None = None  # descriptors; None: as dtype


FP8 = torch.float8_e4m3fn
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
KERNELS = [
    pytest.param(Kernel(gate_scores_reference, gate_choose_reference, "cpu", torch.float32, 1e-5), id="reference"),
    pytest.param(Kernel(gate_scores_triton, gate_choose_triton, "cpu", torch.float32, 1e-5), id="triton", marks=on_cpu),
    pytest.param(Kernel(gate_scores_reference, gate_choose_reference, "cpu", torch.float32, 1e-5, FP8), id="fp8"),
    pytest.param(
        Kernel(gate_scores_triton, gate_choose_triton, "cpu", torch.float32, 1e-3, FP8), id="triton-fp8", marks=on_cpu
    ),
    pytest.param(Kernel(gate_scores, gate_choose, "cuda", torch.float32, 1e-4), id="float32", marks=pytest.mark.gpu),
    pytest.param(Kernel(gate_scores, gate_choose, "cuda", torch.bfloat16, 3e-2), id="bfloat16", marks=pytest.mark.gpu),
    pytest.param(
        Kernel(gate_scores, gate_choose, "cuda", torch.bfloat16, 3e-2, FP8), id="bfloat16-fp8", marks=pytest.mark.gpu
    ),
]


def make_gates(
    kernel: Kernel, heads: tuple[int, int], head_dim: int, gate_dim: int, rope: dict[str, Any] | None = None
) -> Gates:
    """Gates of two layers whose weights and norms are all random."""
    config = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e4},
    )
    gates = Gates(GateConfig.of(config, select_block=SELECT_BLOCK, gate_dim=gate_dim)).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in gates.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5
    return gates.to(kernel.device, kernel.dtype)


class Case:
    """Sequences in shuffled blocks among others, whose complete blocks alone have descriptors."""

    def __init__(
        self,
        kernel: Kernel,
        contexts: list[int],
        news: list[int],
        *,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 16,
        gate_dim: int = 16,
        block_size: int = 8,
        max_context: int | None = None,
        rope: dict[str, Any] | None = None,
    ) -> None:
        self.kernel, self.contexts, self.news = kernel, contexts, news
        torch.manual_seed(sum(contexts) + sum(news))
        self.gates = make_gates(kernel, heads, head_dim, gate_dim, rope)
        bound = max(contexts) if max_context is None else max_context
        width, parts = -(-(bound + max(news)) // block_size), block_size // SELECT_BLOCK
        num_blocks = len(contexts) * width + 2
        # strided, as a cycle's tables are
        tables = torch.full((len(contexts), width + 3), -1, dtype=torch.int32)[:, :width]
        tables[:] = torch.randperm(num_blocks)[: len(contexts) * width].view(-1, width)
        options: dict[str, Any] = {"device": kernel.device, "dtype": kernel.dtype}
        self.query = torch.randn(heads[0], sum(news), head_dim).to(**options).transpose(0, 1)
        self.positions = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, news, strict=True)])
        self.positions = self.positions.to(kernel.device)
        stored = kernel.stored or kernel.dtype
        described = torch.randn(len(contexts), width * parts, heads[1], gate_dim).to(kernel.device, stored)
        self.described = described.to(kernel.dtype)
        self.descriptors = described.new_full((num_blocks, parts, heads[1], gate_dim), torch.nan)
        for row, context in enumerate(contexts):
            index = torch.arange(context // SELECT_BLOCK)
            self.descriptors[tables[row].long()[index // parts], index % parts] = described[row, : len(index)]
        self.seqs = sequences(contexts, news, bound, tables.to(kernel.device), block_size)

    @property
    def operands(self) -> tuple[Any, ...]:
        weights = self.gates.weights()
        return weights, LAYER, self.query, self.positions, self.descriptors, self.seqs

    def expected(self) -> list[torch.Tensor]:
        """Of each row, [Hkv, complete blocks] float32; a row without new tokens scores -inf."""
        rows = zip(self.query.split(self.news), self.positions.split(self.news), strict=True)
        found = []
        for row, (query, positions) in enumerate(rows):
            described = self.described[row, : self.contexts[row] // SELECT_BLOCK]
            scores = self.gates.scores(LAYER, query, positions, described[None])
            lowest = scores.new_full((1, *scores.shape[1:]), -torch.inf)
            found.append(torch.cat([lowest, scores]).amax(dim=0).cpu())
        return found

    def compare(self) -> None:
        scores = self.kernel.score(*self.operands)
        assert scores.dtype == torch.float32
        for found, wanted in zip(scores.cpu(), self.expected(), strict=True):
            tolerance = self.kernel.tolerance
            torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, atol=tolerance * 10, rtol=tolerance)


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


SHAPES = [([37, 5, 0, 64], [1, 1, 1, 1]), ([20, 33, 41], [3, 0, 5]), ([200], [2]), ([700], [1]), ([30, 9], [70, 2])]


@pytest.mark.parametrize(("contexts", "news"), SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_are_those_of_each_sequence_by_itself(kernel: Kernel, contexts: list[int], news: list[int]) -> None:
    Case(kernel, contexts, news).compare()


GEOMETRIES: list[dict[str, Any]] = [
    {"heads": (1, 1), "head_dim": 16, "gate_dim": 32, "block_size": 4},
    {"heads": (7, 1), "head_dim": 6, "gate_dim": 10, "block_size": 16},
    {"heads": (4, 4), "head_dim": 128, "gate_dim": 64, "block_size": 8},
    {"heads": (10, 2), "head_dim": 20, "gate_dim": 128, "block_size": 64, "max_context": 300},
]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_geometry_is_scored(kernel: Kernel, geometry: dict[str, Any]) -> None:
    Case(kernel, [29, 70], [2, 1], **geometry).compare()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_rotary_embedding_that_scales_is_undone(kernel: Kernel) -> None:
    case = Case(kernel, [60, 70], [2, 1], rope=YARN)
    assert case.gates.config.rope.scaling > 1
    case.compare()


CHOICES = [
    Choice(max_blocks=12, budget_blocks=8, sinks=1, recent=1),
    Choice(max_blocks=40, budget_blocks=30, threshold=0.02),
    Choice(max_blocks=40, budget_blocks=30, threshold=0.0, sinks=2),
    Choice(max_blocks=20, budget_blocks=4, share=0.3, recent=2),
]


@pytest.mark.parametrize("choice", CHOICES, ids=["budget", "threshold", "no threshold", "share"])
@pytest.mark.parametrize(("contexts", "news"), SHAPES[:3] + [([1200, 300], [1, 1])], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_are_what_scores_make(kernel: Kernel, contexts: list[int], news: list[int], choice: Choice) -> None:
    case = Case(kernel, contexts, news, max_context=max(contexts) + 100)
    lists = kernel.choose(*case.operands, choice)
    # by the kernel's own scores: two ways to round part what is nearly equal
    scores = kernel.score(*case.operands).cpu()
    seqs = sequences(contexts, news, case.seqs.max_context, case.seqs.block_tables.cpu(), case.seqs.block_size)
    if choice.threshold is not None:
        for row, context in enumerate(contexts):
            scores[row, :, context // SELECT_BLOCK :] = -torch.inf
        scores = scores.softmax(dim=2).nan_to_num(0.0)
    wanted = choose_blocks_reference(scores, seqs, choice, select_block=SELECT_BLOCK)
    assert lists.select_block == SELECT_BLOCK and lists.blocks.shape == wanted.blocks.shape
    assert lists.blocks.dtype == lists.counts.dtype == torch.int32
    assert torch.equal(lists.counts.cpu(), wanted.counts)
    is_listed = torch.arange(wanted.blocks.shape[2]) < wanted.counts[:, :, None]
    assert torch.equal(lists.blocks.cpu()[is_listed], wanted.blocks[is_listed])


@pytest.mark.gpu
def test_choosing_is_captured_and_follows_its_inputs() -> None:
    kernel = Kernel(gate_scores, gate_choose, "cuda", torch.bfloat16, 3e-2)
    case = Case(kernel, [900, 37], [1, 1], max_context=2000)
    choice = Choice(max_blocks=40, budget_blocks=20, sinks=1, recent=1)
    gate_choose(*case.operands, choice)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gate_choose(*case.operands, choice)
    for contexts in ([900, 37], [450, 900]):
        case.seqs.context_lens.copy_(torch.tensor(contexts))
        case.positions.copy_(torch.tensor(contexts))
        case.descriptors.copy_(torch.randn_like(case.descriptors))
        graph.replay()
        fresh = gate_choose(*case.operands, choice)
        assert torch.equal(captured.counts, fresh.counts)
        is_listed = torch.arange(fresh.blocks.shape[2], device="cuda") < fresh.counts[:, :, None]
        assert torch.equal(captured.blocks[is_listed], fresh.blocks[is_listed])

"""Kernels that start while their predecessor drains read nothing before it is written, and write nothing too early."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from kernels import attention_plan, cache_triton, linear_triton, paged_attention, rope_attention_triton
from kernels.attention import paged_sequences
from kernels.cache import compact
from kernels.linear import Tile
from kernels.linear_triton import linear_triton as linear
from kernels.rope_attention import plan_rope_and_attend, rope_and_attend

HEADS, KV_HEADS, DIM, WIDTH, LAYERS, BLOCK_SIZE, LONGEST = 8, 2, 64, 512, 4, 16, 1500
TILE = Tile(16, 64, 64, 4, split_k=2)

# these read before they wait what the launch before theirs has not written, and one before that may have
AHEAD = {
    "gate_triton._score_kernel",
    "rope_attention_triton._rope_and_attend_kernel",
    "sparse_attention_triton._sparse_kernel",
}
# these read weights alone
WEIGHTS_AHEAD = {"gate_queries_triton._merge_kernel", "linear_triton._rms_norm_kernel"}
# what may be the launch before one that reads ahead: the product of q, k and v, the new keys, a gate's queries
BEFORE = {
    "cache_triton._rope_and_write_kernel",
    "gate_queries_triton._merge_kernel",
    "linear_triton._linear_kernel",
    "lowbit_triton._lowbit_kernel",
}


def overlapping() -> Iterator[tuple[str, str]]:
    """The kernels that start while their predecessor drains, by name, and their source."""
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "gdc_wait()" in (source := ast.unparse(function)):
                yield f"{path.stem}.{function.name}", source


def test_few_kernels_read_before_they_wait() -> None:
    found = {name for name, source in overlapping() if "tl.load(" in source[: source.rindex("gdc_wait()")]}
    assert found == AHEAD | WEIGHTS_AHEAD


def test_who_comes_before_those_lets_them_in_after_waiting_itself() -> None:
    sources = {name: source for name, source in overlapping() if name in BEFORE}
    assert sources.keys() == BEFORE
    for name, source in sources.items():
        assert source.index("gdc_wait()") < source.index("gdc_launch_dependents()"), name


@dataclass(frozen=True)
class Weights:
    qkv: torch.Tensor
    output: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """Of a forward of B sequences of Q new tokens each; captured, then overwritten in place."""

    hidden: torch.Tensor  # [B * Q, WIDTH]
    cu_seqlens: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    moves: torch.Tensor  # [2, B, M]

    def change(self, generator: torch.Generator) -> None:
        """Other sequences of other lengths, in other blocks."""
        batch = len(self.context_lens)
        new = len(self.slots) // batch
        context = torch.randint(LONGEST, (batch,), generator=generator)
        context[torch.rand(batch, generator=generator) < 0.3] %= 70
        blocks = torch.randperm(self.block_tables.numel(), generator=generator).view_as(self.block_tables)
        positions = context[:, None] + torch.arange(new)
        slots = blocks.gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE
        self.hidden.copy_(torch.randn(self.hidden.shape, generator=generator))
        self.context_lens.copy_(context)
        self.block_tables.copy_(blocks)
        self.positions.copy_(positions.flatten())
        self.slots.copy_(slots.flatten())
        # the last new token takes the first one's place, as a path closes up
        self.moves.copy_(torch.stack((slots[:, -1:], slots[:, :1])))


def forward(weights: Weights, inputs: Inputs, storage: torch.Tensor) -> torch.Tensor:
    """Plan, and in each layer projection, attention (one launch of few rows, else two) and projection; then compact."""
    seqs = paged_sequences(
        cu_seqlens_q=inputs.cu_seqlens,
        max_seqlen_q=len(inputs.slots) // len(inputs.context_lens),
        context_lens=inputs.context_lens,
        max_context=LONGEST,
        block_tables=inputs.block_tables,
        slots=inputs.slots,
        block_size=BLOCK_SIZE,
    )
    hidden = inputs.hidden
    for layer in range(LAYERS):
        caches = storage[layer, 0], storage[layer, 1]
        plan_rope_and_attend(seqs, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=hidden.dtype)
        attended = rope_and_attend(
            linear(hidden, weights.qkv, bias=None, residual=None, tile=TILE),
            inputs.positions,
            weights.cos,
            weights.sin,
            *caches,
            seqs,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            q_norm=None,
            k_norm=None,
            eps=1e-6,
            scale=DIM**-0.5,
        )
        hidden = linear(attended.flatten(1), weights.output, bias=None, residual=hidden, tile=TILE)
    compact(storage, inputs.moves[0], inputs.moves[1])
    return hidden


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (6, 1), (150, 1), (6, 16), (6, 30), (100, 16)])
def test_a_chain_that_overlaps_replays_bit_for_bit_what_separate_launches_compute(
    monkeypatch: pytest.MonkeyPatch, batch: int, new: int
) -> None:
    if not linear_triton.overlaps(torch.device("cuda", 0)):
        pytest.skip("no overlap before compute capability 9.0")
    generator = torch.Generator().manual_seed(batch * new)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)

    weights = Weights(
        qkv=randn((HEADS + 2 * KV_HEADS) * DIM, WIDTH) * WIDTH**-0.5,
        output=randn(WIDTH, HEADS * DIM) * WIDTH**-0.5,
        cos=randn(LONGEST + new, DIM),
        sin=randn(LONGEST + new, DIM),
    )
    num_blocks = -(-(LONGEST + new) // BLOCK_SIZE)
    inputs = Inputs(
        hidden=randn(batch * new, WIDTH),
        cu_seqlens=torch.arange(0, batch * new + 1, new, dtype=torch.int32, device="cuda"),
        context_lens=torch.zeros(batch, dtype=torch.int32, device="cuda"),
        block_tables=torch.zeros(batch, num_blocks, dtype=torch.int32, device="cuda"),
        positions=torch.zeros(batch * new, dtype=torch.int64, device="cuda"),
        slots=torch.zeros(batch * new, dtype=torch.int64, device="cuda"),
        moves=torch.zeros(2, batch, 1, dtype=torch.int64, device="cuda"),
    )
    overlapping = randn(LAYERS, 2, batch * num_blocks, BLOCK_SIZE, KV_HEADS, DIM)
    inputs.change(generator)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(weights, inputs, overlapping)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward(weights, inputs, overlapping)

    for module in (attention_plan, cache_triton, paged_attention, rope_attention_triton):
        monkeypatch.setattr(module, "overlaps", lambda device: False)
    monkeypatch.setattr(linear_triton, "overlaps", lambda device: False)
    separate = overlapping.clone()
    for _ in range(50):
        inputs.change(generator)
        got.fill_(torch.nan)
        graph.replay()
        wanted = forward(weights, inputs, separate)
        assert wanted.isfinite().all()
        assert torch.equal(got, wanted) and torch.equal(overlapping, separate)

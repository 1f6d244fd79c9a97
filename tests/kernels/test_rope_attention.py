"""One launch caches and attends to what rope_and_write and paged_attention do in two."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.attention import PagedSequences, paged_sequences
from kernels.attention_plan import Launch
from kernels.rope_attention import rope_and_attend, rope_and_attend_reference
from kernels.rope_attention_triton import rope_and_attend_triton

BLOCK_SIZE, POSITIONS, LAYERS = 4, 400, 2
FOLDED = Launch(block_m=16, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1, fold=True)
COMBINED = Launch(block_m=32, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1, fold=False)
SLICED = Launch(block_m=16, block_n=32, num_warps=2, num_stages=2, programs_per_sm=1, fold=True, slices=2)

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
HOW = [
    pytest.param("cpu", FOLDED, id="folded", marks=on_cpu),
    pytest.param("cpu", COMBINED, id="combined", marks=on_cpu),
    pytest.param("cpu", SLICED, id="sliced", marks=on_cpu),
    pytest.param("cuda", None, id="bfloat16", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    norm: bool = True


@dataclass(frozen=True)
class Case:
    """Arguments of a forward's rope_and_attend, caches of two layers and what the kernel need not hold exactly."""

    arguments: dict[str, Any]
    caches: torch.Tensor  # [LAYERS, 2, num_blocks, BLOCK_SIZE, Hkv, D]
    seqs: dict[str, Any]
    dummy: int

    def sequences(self) -> PagedSequences:
        return paged_sequences(**self.seqs)


def make(
    device: str, contexts: list[int], news: list[int], shape: Shape, parents: list[list[int]] | None = None
) -> Case:
    """Sequences in shuffled blocks. parents: of the trees that the last new tokens are; -2 pads, in the dummy slot."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(sum(contexts) + sum(news) + shape.head_dim)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

    widths = [-(-(c + n) // BLOCK_SIZE) for c, n in zip(contexts, news, strict=True)]
    shuffled = torch.randperm(sum(widths), generator=generator).tolist()
    dummy = sum(widths) * BLOCK_SIZE
    tables = torch.zeros(len(contexts), max(widths) + 3, dtype=torch.int32)
    slots, positions, ancestors = [], [], []
    for row, (width, context, new) in enumerate(zip(widths, contexts, news, strict=True)):
        tables[row, :width] = torch.tensor([shuffled.pop() for _ in range(width)])
        tree = parents[row] if parents else []
        ordinary = new - len(tree)
        for index in range(context, context + new):
            slots.append(int(tables[row, index // BLOCK_SIZE]) * BLOCK_SIZE + index % BLOCK_SIZE)
        positions += range(context, context + ordinary)
        ancestors += [0] * ordinary
        depths: list[int] = []
        bits: list[int] = []
        for node, parent in enumerate(tree):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << node)
            if parent == -2:
                slots[len(positions) + node] = dummy
        positions += [context + ordinary + depth for depth in depths]
        ancestors += bits
    trees: dict[str, torch.Tensor] = {}
    if parents is not None:
        trees["ancestors"] = torch.tensor(ancestors).to(device)
        trees["num_drafted"] = torch.tensor([len(tree) for tree in parents], dtype=torch.int32).to(device)
        trees["positions"] = torch.tensor(positions).to(device)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    angles = torch.arange(POSITIONS)[:, None] * 0.3 ** torch.arange(shape.rotary_dim // 2)
    angles = torch.cat((angles, angles), dim=1)
    num_blocks = sum(widths) + 1
    return Case(
        arguments={
            "qkv": randn(sum(news), width + 16)[:, :width],  # strided, as a view of wider rows is
            "positions": torch.tensor(positions).to(device),
            "cos": angles.cos().to(device=device, dtype=dtype),
            "sin": angles.sin().to(device=device, dtype=dtype),
            "num_heads": shape.heads,
            "num_kv_heads": shape.kv_heads,
            "q_norm": randn(shape.head_dim) if shape.norm else None,
            "k_norm": randn(shape.head_dim) if shape.norm else None,
            "eps": 1e-6,
            "scale": 0.3,
        },
        caches=randn(LAYERS, 2, num_blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim),
        seqs={
            "cu_seqlens_q": torch.tensor([0, *news]).cumsum(0).to(device, torch.int32),
            "max_seqlen_q": max(news),
            "context_lens": torch.tensor(contexts, dtype=torch.int32).to(device),
            "max_context": max(contexts),
            "block_tables": tables.to(device),
            "slots": torch.tensor(slots).to(device),
            "block_size": BLOCK_SIZE,
            **trees,
        },
        dummy=dummy,
    )


def check(case: Case, launch: Launch | None) -> None:
    """Outputs and caches of two layers, of which the second finds the first one's plan."""
    device = case.caches.device.type
    seqs = case.sequences()
    tolerance = 1e-5 if device == "cpu" else 3e-2
    on_host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in case.seqs.items()}
    arguments = {k: v.cpu().float() if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}
    arguments["positions"] = case.arguments["positions"].cpu()
    for layer in range(LAYERS):
        wanted_caches, got_caches = case.caches[layer].cpu().float(), case.caches[layer].clone()
        wanted = rope_and_attend_reference(
            **arguments, key_cache=wanted_caches[0], value_cache=wanted_caches[1], seqs=paged_sequences(**on_host)
        )
        if launch is None:
            got = rope_and_attend(**case.arguments, key_cache=got_caches[0], value_cache=got_caches[1], seqs=seqs)
        else:
            got = rope_and_attend_triton(
                **case.arguments,
                key_cache=got_caches[0],
                value_cache=got_caches[1],
                seqs=seqs,
                launch=launch,
                min_chunk=launch.block_n,
            )
        # padding sees its own key; after two launches it sees whatever lies where the table says
        counts = on_host["slots"] != case.dummy
        assert got.isfinite().all()
        torch.testing.assert_close(got.cpu().float()[counts], wanted[counts], atol=tolerance, rtol=tolerance)
        before, after = (x.flatten(1, 2)[:, : case.dummy].cpu().float() for x in (wanted_caches, got_caches))
        torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)
        untouched = torch.ones(case.dummy + BLOCK_SIZE, dtype=torch.bool)
        untouched[on_host["slots"]] = False
        assert torch.equal(got_caches.flatten(1, 2)[:, untouched], case.caches[layer].flatten(1, 2)[:, untouched])


@pytest.mark.parametrize(
    ("contexts", "news"),
    [([5, 0, 67], [1, 1, 1]), ([0, 0], [7, 8]), ([3, 0, 30, 8], [4, 7, 1, 2]), ([16], [1]), ([15, 29, 31], [8, 8, 8])],
    ids=["decode", "prefill", "ragged", "whole steps", "new keys in two chunks"],
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("device", "launch"), HOW)
def test_one_launch_caches_and_attends_as_two_do(
    device: str, launch: Launch | None, norm: bool, contexts: list[int], news: list[int]
) -> None:
    check(make(device, contexts, news, Shape(norm=norm)), launch)


@pytest.mark.parametrize(("device", "launch"), HOW)
def test_a_tree_sees_its_paths_and_padding_is_cached_apart(device: str, launch: Launch | None) -> None:
    parents = [[-1, 0, 0, 1, 1, 2, 3], [-1, -1, 0], [], [-1, 0, -2]]
    check(make(device, [6, 0, 37, 40], [8, 3, 2, 4], Shape(), parents), launch)


@pytest.mark.parametrize(
    "shape",
    [Shape(9, 3, 64, 64), Shape(3, 1, 80, 32), Shape(2, 2, 96, 96), Shape(14, 2, 64, 64), Shape(16, 1, 16, 8)],
    ids=["135m", "partly turned", "no groups", "seven a group", "sixteen a group"],
)
@pytest.mark.parametrize(("device", "launch"), HOW)
def test_heads_of_any_number_and_size(device: str, launch: Launch | None, shape: Shape) -> None:
    check(make(device, [21, 50, 3], [1, 1, 1], shape), launch)


@pytest.mark.parametrize(("device", "launch"), HOW)
def test_sequences_beyond_one_wave_of_programs(device: str, launch: Launch | None) -> None:
    check(make(device, [300, 0, 17, 1, 90, 33, 5, 64, 2, 40], [1] * 10, Shape()), launch)


@pytest.mark.parametrize(("device", "launch"), [h for h in HOW if h.id in ("combined", "bfloat16")])
def test_more_than_sixteen_new_tokens(device: str, launch: Launch | None) -> None:
    parents = [[-1, *range(15)], [-1, -1, *range(14)], [-1] * 16]
    check(make(device, [9, 2, 37], [17] * 3, Shape(heads=2, kv_heads=2), parents), launch)

"""A gate's scores and lists take two launches, its descriptors one, and all compile for the GPU they are meant for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import gate_compress_triton, gate_queries_triton, gate_triton
from kernels.attention import paged_sequences
from kernels.gate import GateWeights, Rotation, empty_compressed
from kernels.select import BlockLists, Choice

# in a process of its own, without the interpreter, which takes anything; no GPU takes part
COMPILE = """
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import gate_queries_triton, gate_triton
from kernels.attention import paged_sequences
from kernels.gate import GateWeights, Rotation
from kernels.gate_compress_triton import _compress_kernel
from kernels.gate_queries_triton import _merge_kernel
from kernels.gate_triton import _score_kernel
from kernels.select import Choice

STORED = ("query", "weight", "norm", "storage")
DESCRIPTORS = ("descriptors", "out")
FLOATS = ("frequencies", "gate_frequencies", "merged", "scores")
INTEGERS = ("block_tables", "begins", "ends", "cu_seqlens", "context_lens", "blocks", "counts", "arrived")
NUMBERS = ("scaling", "gate_scaling", "eps", "scale", "log_threshold")


def compiles(kernel, num_warps, descriptors="*bf16", **constants):
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in DESCRIPTORS:
            signature[name] = descriptors
        elif name in STORED + FLOATS + INTEGERS:
            signature[name] = "*bf16" if name in STORED else "*fp32" if name in FLOATS else "*i32"
        else:
            signature[name] = "*i64" if name == "positions" else "fp32" if name in NUMBERS else "i32"
    # as torch allocates
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants | {"OVERLAP": True}, attrs=aligned)
    options = {"num_warps": num_warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


shape = dict(KV_HEADS=8, GATE_DIM=128)
for tokens, heads in ((16, 1), (64, 8)):
    compiles(
        _merge_kernel, 4, GROUPS=8, HEADS=heads, HEAD_DIM=128, BLOCK_T=tokens, BLOCK_H=64, BLOCK_O=128, **shape
    )
score = dict(SHARES=8, PARTS=1, SELECT_BLOCK=64, BLOCK_H=64, FEW=1024, STAGES=3, CHOOSE=True, **shape)
compress = dict(PARTS=1, SELECT_BLOCK=64, HEAD_DIM=128, ITEMS=16, BLOCK_T=64, BLOCK_H=64, BLOCK_O=64, **shape)
for descriptors, product, largest in (("*bf16", tl.bfloat16, 3e38), ("*fp8e4nv", tl.float16, 448.0)):
    for many, tokens in ((False, 16), (True, 64)):
        compiles(
            _score_kernel, 8, descriptors, HAS_THRESHOLD=True, MANY=many, BLOCK_Q=tokens, BLOCK_N=128, BLOCK_ALL=2048,
            PRODUCT=product, **score
        )
    compiles(_compress_kernel, 4, descriptors, LARGEST=largest, **compress)


class Launches:  # stands for a kernel
    def __getitem__(self, grid):
        return lambda *args, **options: launched.append(options)


# gates of 256, of sequences of up to 256 Ki keys
launched, width, long = [], 256, 1 << 18
gate_queries_triton._merge_kernel = gate_triton._score_kernel = Launches()
rotation = Rotation(torch.ones(width // 2), 1.0)
sides = torch.zeros(1, 2, 8, width, width), torch.zeros(1, 2, 3 * width, width)
weights = GateWeights(*sides, *torch.ones(2, 1, width), rotation=rotation, gate_rotation=rotation, eps=1e-6)
one = torch.ones(1, dtype=torch.int64)
seqs = paged_sequences(
    cu_seqlens_q=torch.arange(2).int(), max_seqlen_q=1, context_lens=one.int(), max_context=long,
    block_tables=torch.zeros(1, long // 64 + 1).int(), slots=one, block_size=64,
)
descriptors, choice = torch.zeros(1, 1, 2, width, dtype=torch.bfloat16), Choice(max_blocks=99, budget_blocks=9)
gate_triton.gate_choose_triton(weights, 0, torch.zeros(1, 16, width), one, descriptors, seqs, choice)
options = launched[-1]
constants = {each.name: options[each.name] for each in _score_kernel.params if each.is_constexpr}
compiled = compiles(_score_kernel, options["num_warps"], **constants)
assert compiled.metadata.shared <= 227 << 10, f"{compiled.metadata.shared} bytes of shared memory"
"""


def test_the_kernels_compile_for_an_h100(run_compiling: Callable[[str], None]) -> None:
    run_compiling(COMPILE)


def make_weights() -> GateWeights:
    """Of 3 layers, 4 query and 2 key heads of 8."""
    rotation = Rotation(torch.ones(4), 1.0)
    weights = torch.zeros(3, 2, 2, 8, 8), torch.zeros(3, 2, 24, 8), torch.ones(3, 8), torch.ones(3, 8)
    return GateWeights(*weights, rotation=rotation, gate_rotation=rotation, eps=1e-6)


def test_scores_and_lists_are_two_launches(
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Callable[[], object]], int],
    counted: Callable[[str, list[str]], object],
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(gate_queries_triton, "_merge_kernel", counted("merge", launched))
    monkeypatch.setattr(gate_triton, "_score_kernel", counted("score", launched))
    seqs = paged_sequences(
        cu_seqlens_q=torch.arange(3, dtype=torch.int32),
        max_seqlen_q=1,
        context_lens=torch.tensor([900, 5], dtype=torch.int32),
        max_context=1000,
        block_tables=torch.zeros(2, 20, dtype=torch.int32),
        slots=torch.zeros(2, dtype=torch.int64),
        block_size=64,
    )
    weights, descriptors = make_weights(), torch.zeros(9, 1, 2, 8)
    query, positions = torch.zeros(2, 4, 8), torch.tensor([900, 5])
    choice = Choice(max_blocks=8, budget_blocks=8)

    def choose() -> BlockLists:
        return gate_triton.gate_choose_triton(weights, 1, query, positions, descriptors, seqs, choice)

    assert launches(choose) == 0
    assert launched == ["merge", "score"]


def test_all_layers_are_compressed_in_one_launch(
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Callable[[], object]], int],
    counted: Callable[[str, list[str]], object],
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(gate_compress_triton, "_compress_kernel", counted("compress", launched))
    weights, storage = make_weights(), torch.zeros(3, 2, 4, 64, 2, 8)
    out = empty_compressed(weights, storage, select_block=16)
    options: dict[str, Any] = {"block_tables": torch.zeros(2, 2, dtype=torch.int32), "max_tokens": 9}
    begins, ends = torch.tensor([3, 60], dtype=torch.int32), torch.tensor([4, 69], dtype=torch.int32)
    compress = gate_compress_triton.compress_triton
    assert launches(lambda: compress(weights, storage, out, begins=begins, ends=ends, **options)) == 0
    assert launched == ["compress"]

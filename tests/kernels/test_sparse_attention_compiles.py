"""Sparse attention as an H100 would be given it, compiled without one."""

from collections.abc import Callable

# in a process of its own, without the interpreter; no GPU takes part
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.sparse_attention_triton import _sparse_kernel as kernel

halves, floats = ("query", "key_cache", "value_cache", "output", "ancestors"), ("maxima", "sums", "partials")
whole = ("lists", "counts", "block_tables", "cu_seqlens", "context_lens", "num_drafted", "arrived")


def compiles(num_warps, **shape):
    constants = dict(
        IS_TREE=False, KV_HEADS=8, TOKENS=1, TILES=1, BLOCK_SIZE=64, BLOCK_U=128, ONCE=True, BLOCK_M=16,
        MERGE_SPLITS=16, STAGES=3, OVERLAP=True, **shape
    )
    signature, attributes = {}, {}
    for index, name in enumerate(parameter.name for parameter in kernel.params):
        if name in constants:
            signature[name] = "constexpr"
        elif name in halves + floats + whole:
            signature[name] = "*bf16" if name in halves else "*fp32" if name in floats else "*i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "score_scale" else "i32"
        if name in ("query_token_stride", "query_head_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": 3, "launch_pdl": True}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert code.count("cp.async.cg") >= 16, "keys and values are not loaded ahead"


# as kernels/sparse_split.py launches one new token: heads of 128, and of 64 where a step gathers several blocks
compiles(4, GROUPS=8, HEAD_DIM=128, BLOCK_D=128, BLOCK_N=128, SELECT=64, MERGE_ROWS=8, HELD=False)
compiles(1, GROUPS=3, HEAD_DIM=64, BLOCK_D=64, BLOCK_N=64, SELECT=16, MERGE_ROWS=4, HELD=True)
"""


def test_the_kernel_compiles_for_an_h100_and_loads_keys_ahead(run_compiling: Callable[[str], None]) -> None:
    """Triton gives up on a loop that hands a value on through two iterations, without a word."""
    run_compiling(COMPILE)

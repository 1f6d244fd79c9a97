"""Sparse attention as an H100 would be given it, compiled without one."""

from collections.abc import Callable

# in a process of its own, without the interpreter; no GPU takes part
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.sparse_attention_triton import _sparse_kernel as kernel

constants = dict(
    IS_TREE=False, KV_HEADS=8, GROUPS=8, HEAD_DIM=128, TOKENS=1, TILES=1, BLOCK_SIZE=64, SELECT=64, BLOCK_U=128,
    ONCE=True, BLOCK_M=16, BLOCK_N=128, BLOCK_D=128, MERGE_ROWS=8, MERGE_SPLITS=16, STAGES=3, HELD=True, OVERLAP=True,
)
halves, floats = ("query", "key_cache", "value_cache", "output", "ancestors"), ("maxima", "sums", "partials")
whole = ("lists", "counts", "block_tables", "cu_seqlens", "context_lens", "num_drafted", "arrived")
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
options = {"num_warps": 4, "num_stages": 3, "launch_pdl": True}
code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
assert code.count("cp.async.cg") >= 16, "keys and values are not loaded ahead"
"""


def test_the_kernel_compiles_for_an_h100_and_loads_keys_ahead(run_compiling: Callable[[str], None]) -> None:
    """Triton gives up on a loop that hands a value on through two iterations, without a word."""
    run_compiling(COMPILE)

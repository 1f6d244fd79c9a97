"""Kernels compile where an integer argument is one: Triton makes a constant of it then, which has no methods."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

import kernels

FOLDER = Path(kernels.__file__).parent

# in a process of its own, without the interpreter, which takes anything; no GPU takes part
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.eagle_triton import _catch_up_kernel as kernel

constants = dict(
    RING=64, NUM_BLOCKS=5, BLOCK_SIZE=16, NUM_POSITIONS=6, NUM_LEVELS=3, TOP_K=2, POSITIONS=8, LEVELS=4, NODES=4,
    BLOCKS=8, COLUMNS=128,
)
longs = ("published_ptr", "known_ptr", "nodes_ptr", "sample_positions_ptr")
arguments, signature = [], {}
for parameter in kernel.params:
    name = parameter.name
    if name in constants:
        signature[name] = "constexpr"
    elif name.endswith("_ptr"):
        signature[name] = "*i64" if name in longs else "*bf16" if name in ("states_ptr", "aux_ptr") else "*i32"
    elif parameter.do_not_specialize:
        signature[name] = "i32"
    else:  # as a launch does
        signature[name], constants[name] = "constexpr", 1
source = ASTSource(kernel, signature, constexprs=constants)
triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
"""


def test_the_step_of_a_head_compiles_for_a_single_row(run_compiling: Callable[[str], None]) -> None:
    run_compiling(COMPILE)


def test_no_kernel_calls_a_method_of_an_argument_that_may_be_a_constant() -> None:
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        launched = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        for function in launched:
            if not function.name.endswith("_kernel"):
                continue
            module = vars(importlib.import_module(f"kernels.{path.stem}"))
            arguments = {a.arg for a in function.args.args if a.annotation is None and not a.arg.endswith("_ptr")}
            arguments -= runtime_arguments(function, module)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = node.func.value
                    if isinstance(owner, ast.Name) and owner.id in arguments:
                        found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


def runtime_arguments(function: ast.FunctionDef, module: dict[str, object]) -> set[str]:
    """What its decorator keeps from being made a constant."""
    names: set[str] = set()
    for decorator in function.decorator_list:
        for keyword in decorator.keywords if isinstance(decorator, ast.Call) else []:
            if keyword.arg == "do_not_specialize":
                names |= set(eval(ast.unparse(keyword.value), module))
    return names

"""Kernels compile for an H100, also where an integer argument is one: Triton makes a constant of it then."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

FOLDER = Path(kernels.__file__).parent


@pytest.mark.slow
def test_what_an_h100_would_be_given_compiles_and_fits() -> None:
    """In a process of its own, without the interpreter, which takes anything; no GPU takes part."""
    command = [sys.executable, Path(__file__).with_name("h100.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


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

"""Nothing that lies on a disk is unpickled: a checkpoint someone hands over cannot run code here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for name in ("configs", "kernels", "drafter", "rollout", "rl", "launch")
    for path in (ROOT / name).rglob("*.py")
]
UNPICKLING = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("marshal", "load"),
    ("shelve", "open"),
    ("joblib", "load"),
    ("cloudpickle", "load"),
    ("cloudpickle", "loads"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
}


def unpickling(tree: ast.AST) -> list[str]:
    """Calls by which a file could bring code to run."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                unsafe = (module, name) in UNPICKLING
                unsafe |= (module, name) == ("torch", "load") and options.get("weights_only") != "True"
                unsafe |= (module, name) in {("np", "load"), ("numpy", "load")} and "allow_pickle" in options
                if unsafe:
                    found.append(f"line {call.lineno}: {module}.{name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_on_a_disk_is_unpickled(path: Path) -> None:
    assert not unpickling(ast.parse(path.read_text()))


def test_the_calls_it_looks_for_are_found() -> None:
    for call in ("torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)", "yaml.load(text)"):
        assert unpickling(ast.parse(call)), call
    assert not unpickling(ast.parse("torch.load(path, weights_only=True)"))

"""The layers of DESIGN.md, as import-linter reads them from pyproject.toml."""

import subprocess
import sys
from pathlib import Path


def test_every_layer_imports_only_what_stands_to_its_right() -> None:
    # in a process of its own: it switches off every logger there is, and with them what later tests listen to
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout

"""What the tests of faults share: the tables and runs beside this file, one process to fork commands from."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fault_table and fault_runs, which a script uses too

from fault_runs import Commands, write_recipe  # noqa: E402


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("faults"), tiny_model_dir)


@pytest.fixture(scope="session")
def commands(recipe: Path) -> Iterator[Commands]:
    with Commands(recipe.parent) as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, commands: Commands) -> Callable[[tuple[str, ...]], Path]:
    """The run of these options that nothing befell; made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def find(options: tuple[str, ...]) -> Path:
        key = tuple(option for option in options if not option.startswith("run."))
        if key not in runs:
            run = recipe.parent / f"undisturbed-{len(runs)}"
            ended = commands.run("train", recipe, f"run.dir={run}", *key)
            assert ended.code == 0, ended.said
            runs[key] = run
        return runs[key]

    return find

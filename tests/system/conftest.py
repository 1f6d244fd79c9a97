"""A recipe of quick steps on the tiny model, and the command to run it."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

REWARD = '''
import time

def vowels(prompt, rollout):
    """Share of lower-case vowels: a reward that any model can move."""
    return sum(character in "aeiou" for character in rollout.text) / max(len(rollout.text), 1)

def raises(prompt, rollout):
    raise KeyError("no such test case")

def hangs(prompt, rollout):
    while True:
        time.sleep(1)
'''

Paceline = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A config of six quick steps with everything on: drafts, evaluation, warm start, checkpoints."""
    rows = [{"prompt": f"say {index}", "answer": "a", "solution": "aeiou " * 3} for index in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny_reward.py").write_text(REWARD)
    config = {
        "model": str(tiny_model_dir),
        "run": {"name": "tiny", "dir": str(tmp_path / "run"), "seed": 3},
        "compute": {"dtype": "float32", "device": "cpu"},
        "data": {"source": "file", "name": str(tmp_path / "rows.jsonl")},
        "reward": {"functions": {"tiny_reward:vowels": 1.0}, "workers": 1},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 24},
        "spec": {"source": "suffix", "depth": 4, "top_k": 2, "num_verify": 6},
        "train": {"steps": 6, "lr": 1e-3, "micro_tokens": 512},
        "eval": {"every": 3, "num_prompts": 4},
        "warmstart": {"steps": 2, "examples_per_step": 4},
        "checkpoint": {"every": 2, "keep": 3},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The reward's module is found through PYTHONPATH, as a user's would be."""
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def two_nodes(environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Simulated nodes, with the CPUs that an indirect parameter says, or one each; the variables to find them by."""
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    script = [sys.executable, Path(__file__).with_name("two_nodes.py"), *map(str, getattr(request, "param", (1, 1)))]
    with subprocess.Popen(script, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nodes:
        assert nodes.stdout is not None and nodes.stdin is not None
        address = nodes.stdout.readline().strip()
        yield {"RAY_ADDRESS": address}
        nodes.stdin.close()
        nodes.wait(timeout=60)


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "launch.cli"]


@pytest.fixture
def paceline(command: list[str], environment: dict[str, str], tmp_path: Path) -> Paceline:
    """Run the command to its end."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, args)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1000
        )

    return run

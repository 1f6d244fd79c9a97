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
    script = [sys.executable, "-m", "launch.simulated_nodes", *map(str, getattr(request, "param", (1, 1)))]
    with subprocess.Popen(script, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nodes:
        assert nodes.stdout is not None and nodes.stdin is not None
        address = nodes.stdout.readline().strip()
        yield {"RAY_ADDRESS": address}
        nodes.stdin.close()
        nodes.wait(timeout=600)


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "launch.cli"]


@pytest.fixture(scope="session")
def zygote() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported what takes long, and forks: most of a short command is its imports."""
    root = Path(__file__).parents[2]
    settings = {"PYTHONPATH": str(root), "PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, root / "tests" / "faults" / "zygote.py"],
        env=os.environ | settings | {"DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def paceline(
    zygote: subprocess.Popen[str],
    environment: dict[str, str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Paceline:
    """Run the command to its end, as `command` would, in a fork of the zygote."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        said = tmp_path_factory.mktemp("said")
        request = {
            "args": list(map(str, args)),
            "env": environment | {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"},
            "cwd": str(tmp_path),
            "out": str(said / "out"),
            "err": str(said / "err"),
            "timeout_s": 1000,
        }
        assert zygote.stdin is not None and zygote.stdout is not None
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        code = json.loads(zygote.stdout.readline())["code"]
        out, err = ((said / name).read_text() for name in ("out", "err"))
        assert code is not None, f"it did not end:\n{out}{err}"
        return subprocess.CompletedProcess(request["args"], code, out, err)

    return run

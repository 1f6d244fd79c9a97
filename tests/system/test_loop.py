"""The whole loop on a tiny model, as the command runs it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

PACELINE = [sys.executable, "-m", "launch.cli"]

REWARD = '''
def vowels(prompt, rollout):
    """Share of lower-case vowels: a reward that any model can move."""
    return sum(character in "aeiou" for character in rollout.text) / max(len(rollout.text), 1)
'''


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


def paceline(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command; the reward's module is found through PYTHONPATH, as a user's would be."""
    return subprocess.run(
        [*PACELINE, *map(str, args)], env=environment(cwd), cwd=cwd, capture_output=True, text=True, timeout=400
    )


def environment(folder: Path) -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}


def records(run: Path, name: str = "steps") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]


def trainer_hashes(run: Path, step: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step_{step}" / "trainer"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_complete_run_directory(recipe: Path, tmp_path: Path) -> None:
    result = paceline("train", recipe, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    steps = records(run)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["accept_length"] >= 1 for record in steps)
    assert [record["stage"] for record in records(run, "eval")] == ["base", "warmstart", "rl", "rl"]
    assert len(records(run, "warmstart")) == 2
    assert pq.read_table(run / "samples" / "step_6.parquet").num_rows == 16
    assert json.loads((run / "EXIT.json").read_text())["code"] == 0
    assert json.loads((run / "STATUS.json").read_text())["step"] == 6
    for name in ("config/input.yaml", "config/resolved.yaml", "env.json", "plan.json", "events.jsonl"):
        assert (run / name).exists(), name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_2", "step_4", "step_6"]
    status = paceline("status", run, cwd=tmp_path)
    assert status.returncode == 0 and "6" in status.stdout


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_parameters_of_an_uninterrupted_one(recipe: Path, tmp_path: Path) -> None:
    whole = paceline("train", recipe, f"run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*PACELINE, "train", str(recipe)],
        env=environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = run / "STATUS.json"
    deadline = time.monotonic() + 300
    while not (status.exists() and json.loads(status.read_text()).get("step", 0) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)  # another process's progress has no event to wait on
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "checkpoints" / "step_6").exists(), "the kill came too late to prove anything"
    resumed = paceline("resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert trainer_hashes(run, 6) == trainer_hashes(tmp_path / "whole", 6)
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]
    same = ("reward_mean", "loss", "tokens", "accept_length")
    for mine, theirs in zip(records(run), records(tmp_path / "whole"), strict=True):
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_the_run_goes_on_from_there(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*PACELINE, "train", str(recipe), "train.steps=500", "checkpoint.every=1000", "eval.every=0"],
        env=environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    status = run / "STATUS.json"
    deadline = time.monotonic() + 300
    while not (status.exists() and json.loads(status.read_text()).get("step", 0) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    [checkpoint] = (run / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert step >= 2
    resumed = paceline("resume", run, f"train.steps={step + 1}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert records(run)[-1]["step"] == step + 1


@pytest.mark.slow
def test_speculation_changes_no_token_of_a_run(recipe: Path, tmp_path: Path) -> None:
    texts = {}
    for source in ("suffix", "off"):
        run = tmp_path / source
        result = paceline("train", recipe, f"run.dir={run}", f"spec.source={source}", "train.steps=2", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        texts[source] = [pq.read_table(run / "samples" / f"step_{step}.parquet")["text"].to_pylist() for step in (1, 2)]
    assert texts["suffix"] == texts["off"]


@pytest.mark.slow
def test_two_ray_workers_sample_the_rollouts_of_one_process(recipe: Path, tmp_path: Path) -> None:
    texts = {}
    for name, overrides in {"inline": [], "ray": ["compute.backend=ray", "compute.workers=2"]}.items():
        run = tmp_path / name
        result = paceline("train", recipe, f"run.dir={run}", "train.steps=2", *overrides, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        texts[name] = [pq.read_table(run / "samples" / f"step_{step}.parquet")["text"].to_pylist() for step in (1, 2)]
    assert texts["ray"] == texts["inline"]

"""The whole loop on a tiny model, as the command runs it."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

Paceline = Callable[..., subprocess.CompletedProcess[str]]


def records(run: Path, name: str = "steps") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]


def trainer_hashes(run: Path, step: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step_{step}" / "trainer"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def wait_until(process: "subprocess.Popen[bytes]", reached: Callable[[], bool]) -> None:
    """Until another process has come so far; it must not end before."""
    deadline = time.monotonic() + 1000
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)  # another process's progress has no event to wait on


def step_of(run: Path) -> int:
    """The step a run's status tells, 0 before the first."""
    status = run / "STATUS.json"
    return int(json.loads(status.read_text()).get("step", 0)) if status.exists() else 0


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_complete_run_directory(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    result = paceline("train", recipe)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    steps = records(run)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["accept_length"] >= 1 for record in steps)
    assert [record["stage"] for record in records(run, "eval")] == ["base", "warmstart", "rl", "rl"]
    assert len(records(run, "warmstart")) == 2
    assert pq.read_table(run / "samples" / "step_6.parquet").num_rows == 16
    assert len(pq.read_table(run / "samples" / "step_6.parquet")["drafted"][0]) > 0
    assert sum(steps[0]["response_len_hist"]["counts"]) == sum(steps[0]["reward_hist"]["counts"]) == 16
    last = {record["step"]: record for record in records(run, "curve") if not record.get("eval")}
    assert [(last[step]["finished"], last[step]["tokens"]) for step in (1, 6)] == [
        (16, steps[0]["tokens"]),
        (16, steps[5]["tokens"]),
    ]
    kinds = {record["kind"] for record in records(run, "lanes")}
    assert {"decode", "train", "sync", "reward", "checkpoint", "eval", "warmstart"} <= kinds
    assert sorted(path.name for path in (run / "trace").iterdir()) == [f"step_{n}.json.gz" for n in range(1, 7)]
    assert json.loads((run / "EXIT.json").read_text())["code"] == 0
    assert json.loads((run / "STATUS.json").read_text())["step"] == 6
    for name in ("config/input.yaml", "config/resolved.yaml", "env.json", "plan.json", "events.jsonl"):
        assert (run / name).exists(), name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_2", "step_4", "step_6"]
    assert not list((run / "checkpoints").glob(".*"))
    status = paceline("status", run)
    assert status.returncode == 0 and "6" in status.stdout


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_parameters_of_an_uninterrupted_one(
    recipe: Path, tmp_path: Path, paceline: Paceline, command: list[str], environment: dict[str, str]
) -> None:
    whole = paceline("train", recipe, f"run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "train", str(recipe)],
        env=environment | {"PACELINE_FAULT": "samples.write:4:stop"},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # it stops in its fourth step, which is recorded and has no samples yet
    met = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert met is not None and met.si_code == os.CLD_STOPPED
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert step_of(run) >= 3
    resumed = paceline("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert trainer_hashes(run, 6) == trainer_hashes(tmp_path / "whole", 6)
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]
    same = ("reward_mean", "loss", "tokens", "accept_length")
    for mine, theirs in zip(records(run), records(tmp_path / "whole"), strict=True):
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_the_run_goes_on_from_there(
    recipe: Path, tmp_path: Path, paceline: Paceline, command: list[str], environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "train", str(recipe), "train.steps=500", "checkpoint.every=1000", "eval.every=0"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_until(process, lambda: step_of(run) >= 2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    step = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())
    assert step >= 2
    resumed = paceline("resume", run, f"train.steps={step + 1}")
    assert resumed.returncode == 0, resumed.stderr
    assert records(run)[-1]["step"] == step + 1


@pytest.mark.slow
def test_speculation_changes_no_token_of_a_run(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    texts = {}
    for source in ("suffix", "off"):
        run = tmp_path / source
        result = paceline("train", recipe, f"run.dir={run}", f"spec.source={source}", "train.steps=2")
        assert result.returncode == 0, result.stderr
        texts[source] = [pq.read_table(run / "samples" / f"step_{step}.parquet")["text"].to_pylist() for step in (1, 2)]
    assert texts["suffix"] == texts["off"]


@pytest.mark.slow
def test_two_ray_workers_sample_the_rollouts_of_one_process(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    texts = {}
    for name, overrides in {"inline": [], "ray": ["compute.backend=ray", "compute.workers=2"]}.items():
        run = tmp_path / name
        result = paceline("train", recipe, f"run.dir={run}", "train.steps=2", *overrides)
        assert result.returncode == 0, result.stderr
        texts[name] = [pq.read_table(run / "samples" / f"step_{step}.parquet")["text"].to_pylist() for step in (1, 2)]
    assert texts["ray"] == texts["inline"]


@pytest.mark.slow
def test_a_resume_that_cannot_start_leaves_the_run_as_it_was(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    run = tmp_path / "run"
    assert paceline("train", recipe, "train.steps=2", "eval.every=0", "warmstart.steps=0").returncode == 0
    before = (run / "config" / "resolved.yaml").read_bytes()
    assert paceline("resume", run, "model=/no/such/model").returncode == 3
    assert paceline("resume", run, "compute.backend=ray", "compute.workers=2").returncode == 2
    assert (run / "config" / "resolved.yaml").read_bytes() == before
    for_nothing = paceline("resume", run, "train.lr=0.5")
    assert for_nothing.returncode == 0
    assert "warning: train.lr=0.5 had no effect: all 2 steps are done; raise train.steps" in for_nothing.stdout
    assert (run / "config" / "resolved.yaml").read_bytes() == before
    assert paceline("resume", run, "train.steps=3").returncode == 0
    assert [record["step"] for record in records(run)] == [1, 2, 3]


@pytest.mark.slow
def test_sigterm_during_the_warm_start_ends_at_once_and_the_run_starts_over(
    recipe: Path, tmp_path: Path, paceline: Paceline, command: list[str], environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "train", str(recipe), "warmstart.steps=100000"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_until(process, (run / "metrics" / "warmstart.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    resumed = paceline("resume", run, "warmstart.steps=2", "train.steps=1")
    assert resumed.returncode == 0, resumed.stderr
    assert len(records(run, "warmstart")) == 2
    assert [record["stage"] for record in records(run, "eval")] == ["base", "warmstart", "rl"]

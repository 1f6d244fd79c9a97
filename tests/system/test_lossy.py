"""Training on rollouts that were not sampled from the policy's own distribution, as the command runs it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

Paceline = Callable[..., subprocess.CompletedProcess[str]]
SPARSE = ["spec.source=off", "sparse.selector=mean", "sparse.select_block=4", "sparse.budget_tokens=20"]
SPARSE += ["sparse.window=8", "sparse.every=8"]
SHORT = ["train.steps=2", "warmstart.steps=0", "eval.every=2", "checkpoint.every=2"]


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "under"), [("plain", "sparse"), ("rectified", "rectified")])
def test_a_lossy_run_trains_marks_its_rollouts_and_tells_how_far_they_are(
    mode: str, under: str, recipe: Path, tmp_path: Path, paceline: Paceline
) -> None:
    result = paceline("train", recipe, f"sparse.mode={mode}", *SPARSE, *SHORT)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    rows = pq.read_table(run / "samples" / "step_2.parquet").to_pylist()
    assert {row["sampled_under"] for row in rows} == {under}
    for step in records(run, "steps"):
        assert step["lossy_share"] == 1.0 if mode == "plain" else 0 < step["lossy_share"] < 1
        assert step["log_ratio_max"] > 1e-3, "the selector left nothing out: the test shows nothing"
        assert 0 < step["effective_share"] < 1
        assert step["importance_mean"] > 0
        if mode == "plain":
            assert "prob_diff_mean" not in step
        else:
            assert step["prob_diff_mean"] < 1e-4, "training and the engine's dense forwards agree in float32"
    for row in rows:
        assert len(row["dense_logprobs"]) == (row["num_tokens"] if mode == "rectified" else 0)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["event"] == "drift"]
    assert {record["lossy_share"] for record in records(run, "eval")} == {0.0}, "evaluations attend densely"


def test_a_lossy_run_without_its_correction_is_refused(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    result = paceline("train", recipe, "sparse.mode=plain", "spec.source=off", "train.importance_cap=0")
    assert result.returncode == 2
    assert "train.importance_cap=0" in result.stderr and "set 2" in result.stderr
    assert not (tmp_path / "run").exists()

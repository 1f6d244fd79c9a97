"""One recipe, unchanged but for where it runs: what is sampled does not tell."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

Paceline = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 2
SIZE = [f"train.steps={STEPS}", "eval.every=0", "warmstart.steps=1", "checkpoint.every=10", "train.lr=1e-4"]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]


def rollouts_of(run: Path) -> list[list[tuple[Any, ...]]]:
    """(prompt, sample, tokens, reward) of every rollout, step by step."""
    tables = [pq.read_table(run / "samples" / f"step_{step}.parquet").to_pylist() for step in range(1, STEPS + 1)]
    return [
        sorted((row["prompt_id"], row["sample"], tuple(row["token_ids"]), row["reward"]) for row in rows)
        for rows in tables
    ]


@pytest.mark.slow
def test_one_process_two_nodes_and_separate_engines_sample_the_same(
    recipe: Path, tmp_path: Path, paceline: Paceline, environment: dict[str, str], two_nodes: dict[str, str]
) -> None:
    runs = {
        "one": [],
        "colocated": ["compute.backend=ray", "compute.workers=2"],
        "shares": ["compute.backend=ray", "compute.workers=2", "train.zero_stage=3"],
        "separate": ["compute.backend=ray", "compute.placement=separate", "compute.bucket_mb=1"],
    }
    for name, options in runs.items():
        environment |= two_nodes if options else {}
        result = paceline("train", recipe, f"run.dir={tmp_path / name}", *SIZE, *options)
        assert result.returncode == 0, f"{name}: {result.stderr}"
    alone = rollouts_of(tmp_path / "one")
    assert len({tokens for step in alone for _, _, tokens, _ in step}) > 20  # they differ from one another
    for name in ("colocated", "shares", "separate"):
        assert rollouts_of(tmp_path / name) == alone, name
        for found, expected in zip(steps_of(tmp_path / name), steps_of(tmp_path / "one"), strict=True):
            for figure in ("loss", "entropy", "grad_norm", "prob_diff_mean"):
                assert found[figure] == pytest.approx(expected[figure], rel=1e-3, abs=1e-5), f"{name} {figure}"
    assert all("weight_sync_bytes" not in step for step in steps_of(tmp_path / "colocated"))
    moved = {name: {step["weight_sync_bytes"] for step in steps_of(tmp_path / name)} for name in ("shares", "separate")}
    (sent,), (copied,) = moved["separate"], moved["shares"]
    assert copied == 2 * sent > 200_000  # a copy for each worker
    assert all(step["seconds_sync"] > 0 for step in steps_of(tmp_path / "separate"))

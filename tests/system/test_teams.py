"""Rollout workers that share one engine, in a run: they sample what one process does, and are lost together."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

Paceline = Callable[..., subprocess.CompletedProcess[str]]
Sampled = list[tuple[str, int, tuple[int, ...]]]

STEPS = 2
SIZE = [f"train.steps={STEPS}", "eval.every=0", "warmstart.steps=1", "checkpoint.every=1", "train.lr=1e-3"]
TEAM = ["compute.backend=ray", "compute.placement=separate", "compute.bucket_mb=1", "compute.rollout_workers=2"]
TEAM += ["rollout.tensor_parallel=2"]

pytestmark = pytest.mark.slow


@pytest.fixture
def even_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model over a vocabulary that two ranks can share."""
    folder = tmp_path / "even"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(pad_to_multiple_of=4)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
    return folder


@pytest.fixture
def alone(recipe: Path, even_model: Path, tmp_path: Path, paceline: Paceline) -> list[Sampled]:
    """What one process samples, step by step."""
    result = paceline("train", recipe, f"model={even_model}", f"run.dir={tmp_path / 'one'}", *SIZE)
    assert result.returncode == 0, result.stderr
    return sampled(tmp_path / "one")


def sampled(run: Path) -> list[Sampled]:
    """(prompt, sample, tokens) of every rollout, step by step."""
    tables = [pq.read_table(run / "samples" / f"step_{step}.parquet").to_pylist() for step in range(1, STEPS + 1)]
    return [sorted((row["prompt_id"], row["sample"], tuple(row["token_ids"])) for row in rows) for rows in tables]


@pytest.mark.parametrize("two_nodes", [(1, 2)], indirect=True)  # a team is of one node
def test_a_killed_rank_takes_its_team_and_a_new_one_samples_what_one_process_does(
    recipe: Path,
    even_model: Path,
    alone: list[Sampled],
    tmp_path: Path,
    paceline: Paceline,
    environment: dict[str, str],
    two_nodes: dict[str, str],
) -> None:
    run = tmp_path / "team"
    environment |= two_nodes
    environment["PACELINE_FAULT"] = "rollout.cycle@2:30:kill"  # in the second step, after new weights
    result = paceline("train", recipe, f"model={even_model}", f"run.dir={run}", *SIZE, *TEAM)
    assert result.returncode == 0, result.stderr
    assert sampled(run) == alone
    assert len({tokens for step in alone for _, _, tokens in step}) > 20  # they differ from one another
    steps = [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert len({step["weight_sync_bytes"] for step in steps}) == 1 and steps[0]["weight_sync_bytes"] > 200_000
    report = json.loads((run / "logs" / "attempt_1" / "crash.json").read_text())
    assert report["first"]["process"] == "worker 2, rank 1 of team 0"
    assert "died" in report["first"]["error"] and report["following"]
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["attempt_1", "attempt_2"]

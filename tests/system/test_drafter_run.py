"""Whole runs with a learned drafter on the tiny model, as the command runs them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

Paceline = Callable[..., subprocess.CompletedProcess[str]]

# a window holds a whole response; learning may take as long as the steps do
DRAFTER = (
    "drafter.draft_vocab=200",
    "drafter.window=32",
    "drafter.batch_tokens=256",
    "drafter.budget=1.0",
    "rollout.temperature=0.7",
)


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["eagle", "auto"])
def test_a_run_trains_and_publishes_its_drafter_and_goes_on_with_it(
    recipe: Path, tmp_path: Path, paceline: Paceline, source: str
) -> None:
    result = paceline("train", recipe, f"spec.source={source}", "spec.top_k=1", *DRAFTER)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    steps = records(run)
    assert steps[0]["drafter_version"] == 0 and steps[-1]["drafter_version"] > 0
    assert steps[-1]["drafter_steps"] > 0 and steps[-1]["seconds_drafter"] > 0
    sources = ["eagle"] if source == "eagle" else ["eagle", "suffix"]
    assert all(steps[-1][f"accept_length_{name}"] >= 1 and steps[-1][f"draft_share_{name}"] > 0 for name in sources)
    assert "accept_length_eagle" not in steps[0], "nothing was published yet"
    measured = [record["drafter_accept_length"] for record in steps if "drafter_accept_length" in record]
    assert measured[-1] > measured[0] > 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    stalls = [event["drafter_stall_s"] for event in events if event["event"] == "checkpoint"]
    assert len(stalls) == 4 and all(stall > 0 for stall in stalls)
    assert "drafter v" in result.stdout
    saved = run / "checkpoints" / "step_6" / "drafter"
    version = json.loads((saved / "drafter.json").read_text())["version"]
    served = load_file(saved / "served.safetensors")
    resumed = paceline("resume", run, "train.steps=7", "drafter.budget=0")
    assert resumed.returncode == 0, resumed.stderr
    assert records(run)[-1]["drafter_version"] == version
    again = load_file(run / "checkpoints" / "step_7" / "drafter" / "served.safetensors")
    assert served.keys() == again.keys() and all(torch.equal(again[name], served[name]) for name in served)


@pytest.mark.slow
def test_a_learned_drafter_changes_no_token_of_a_run(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    texts = {}
    for source in ("auto", "off"):
        run = tmp_path / source
        result = paceline("train", recipe, f"run.dir={run}", f"spec.source={source}", "train.steps=4", *DRAFTER)
        assert result.returncode == 0, result.stderr
        texts[source] = [pq.read_table(run / "samples" / f"step_{step}.parquet")["text"].to_pylist() for step in (1, 4)]
    assert records(tmp_path / "auto")[-1]["drafter_version"] > 0
    assert texts["auto"] == texts["off"]


@pytest.mark.slow
def test_workers_agree_on_one_drafter(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    overrides = ("spec.source=eagle", "spec.top_k=1", "compute.backend=ray", "compute.workers=2", "train.steps=4")
    result = paceline("train", recipe, *overrides, "train.kl_coef=0.1", *DRAFTER)
    assert result.returncode == 0, result.stderr
    steps = records(tmp_path / "run")
    assert steps[-1]["drafter_version"] > 0 and not any("drafter_off" in record for record in steps)
    assert all(0 <= record["idle_used_share"] <= 1 and record["idle_seconds"] >= 0 for record in steps)
    assert all(record["sequences_moved"] >= 0 and record["learned_seconds"] >= 0 for record in steps)
    assert all(record["scored_seconds"] >= 0 for record in steps) and steps[-1]["kl"] > 0
    assert "different drafters" not in result.stderr + result.stdout

"""Secrets around a run are in none of the files it leaves, nor in what is made of them for others."""

import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Paceline = Callable[..., subprocess.CompletedProcess[str]]

REWARD = """
import logging, os

def telling(prompt, rollout):
    raise RuntimeError("GET https://me:canary-url@host/?token=canary-query said canary-environment-1")
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, unpacked where they are packed."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in files.items()}


@pytest.mark.slow
def test_a_run_leaves_no_secret_in_any_file(
    recipe: Path, tmp_path: Path, paceline: Paceline, environment: dict[str, str]
) -> None:
    (tmp_path / "telling_reward.py").write_text(REWARD)
    with recipe.open("a") as file:
        file.write("# hub_token: canary-comment\n")
    for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD")):
        environment[name] = f"canary-environment-{number}"
    run = tmp_path / "run"
    failed = paceline(
        "train", recipe, "reward.functions={'telling_reward:telling': 1}", "eval.every=0", "train.steps=1"
    )
    assert failed.returncode == 8, failed.stderr
    good = paceline("train", recipe, f"run.dir={tmp_path / 'good'}", "train.steps=1", "monitor.sinks=[tensorboard]")
    assert good.returncode == 0, good.stderr
    assert paceline("bundle", run, "--out", tmp_path / "bundle.tar.gz").returncode == 0
    files = contents(run) | {f"good/{name}": data for name, data in contents(tmp_path / "good").items()}
    files["bundle"] = gzip.decompress((tmp_path / "bundle.tar.gz").read_bytes())
    assert {
        "EXIT.json",
        "logs/attempt_1/crash.json",
        "good/trace/step_1.json.gz",
        "good/samples/step_1.parquet",
    } <= set(files)
    assert b"RuntimeError: GET https://***@host" in files["EXIT.json"], "what went wrong is still said"
    assert not [name for name, data in files.items() if b"canary" in data]


@pytest.mark.slow
def test_a_secret_on_the_command_line_starts_nothing(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    refused = paceline("train", recipe, "data.options.api_key=canary-option")
    assert refused.returncode == 2
    assert "set it in the environment" in refused.stderr and "canary" not in refused.stderr
    assert not (tmp_path / "run").exists()

"""Mistakes a user makes, from the command line: a clear line, the right exit code, nothing half-written."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import pytest

Paceline = Callable[..., subprocess.CompletedProcess[str]]


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with this code and one line of error that holds every word."""
    assert result.returncode == code, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in result.stderr


def checkpoints(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("*"))


@pytest.mark.slow
def test_an_unknown_key_and_a_wrong_type_stop_before_anything_is_written(
    recipe: Path, tmp_path: Path, paceline: Paceline
) -> None:
    refused(paceline("train", recipe, "train.stepz=3"), 2, "train.stepz", "train.steps")
    refused(paceline("train", recipe, "train.steps=many"), 2, "train.steps", "many")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_missing_model_is_named(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    refused(paceline("train", recipe, "model=/no/such/model"), 3, "/no/such/model")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_corrupt_weights_are_named(recipe: Path, tmp_path: Path, tiny_model_dir: Path, paceline: Paceline) -> None:
    damaged = copytree(tiny_model_dir, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(paceline("train", recipe, f"model={damaged}"), 3, "model.safetensors")
    assert not checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_an_empty_data_set_is_refused(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(paceline("train", recipe, f"data.name={empty}"), 8, "empty.jsonl")


@pytest.mark.slow
def test_a_prompt_longer_than_the_context_is_named_with_its_line(
    recipe: Path, tmp_path: Path, paceline: Paceline
) -> None:
    rows = [{"prompt": "short", "answer": "a"}, {"prompt": "long " * 200, "answer": "a"}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = paceline("train", recipe, f"data.name={tmp_path / 'long.jsonl'}", "eval.every=0")
    refused(result, 8, "long.jsonl:2", "512")


@pytest.mark.slow
def test_a_reward_that_raises_or_hangs_stops_the_run_by_name(recipe: Path, tmp_path: Path, paceline: Paceline) -> None:
    raising = paceline("train", recipe, "reward.functions={'tiny_reward:raises': 1.0}", f"run.dir={tmp_path / 'a'}")
    refused(raising, 8, "tiny_reward:raises", "no such test case")
    hanging = paceline(
        "train",
        recipe,
        "reward.functions={'tiny_reward:hangs': 1.0}",
        "reward.timeout_s=1",
        f"run.dir={tmp_path / 'b'}",
    )
    refused(hanging, 8, "tiny_reward:hangs", "1 s")
    assert not checkpoints(tmp_path / "a") and not checkpoints(tmp_path / "b")


@pytest.mark.slow
def test_a_run_directory_in_use_is_refused(
    recipe: Path, tmp_path: Path, paceline: Paceline, command: list[str], environment: dict[str, str]
) -> None:
    with subprocess.Popen(
        [*command, "train", str(recipe), "train.steps=1000000"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert "run directory" in running.stdout.readline()
        refused(paceline("train", recipe), 3, str(tmp_path / "run"))
        refused(paceline("resume", tmp_path / "run"), 3, str(running.pid))
        running.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: room for a run's records, none for a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_no_partial_checkpoint(
    recipe: Path, small_disk: Path, paceline: Paceline
) -> None:
    result = paceline("train", recipe, f"run.dir={small_disk / 'run'}")
    refused(result, 6, str(small_disk / "run"))
    assert not checkpoints(small_disk / "run")

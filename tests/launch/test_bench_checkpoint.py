"""`paceline bench drafter-checkpoint` on a tiny geometry: what is proved, and what is timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import drafter.checkpoint
from configs.schema import DrafterConfig
from drafter.features import FeatureBatch
from launch import bench, bench_checkpoint
from launch.bench_checkpoint import Job, run
from launch.bench_drafter import random_features
from launch.bench_report import WrongResultError
from launch.exits import outcome

JOB = Job(("tiny",), "cpu", 300, checkpoints=2, seconds=0, seed=0)


def no_one(result: dict[str, Any]) -> None:
    """Keeps nothing."""


def test_every_checkpoint_is_timed_proved_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out = tmp_path / "results" / "out.json"
    given = ["--geometry", "tiny", "--tokens", "64", "--checkpoints", "3", "--device", "cpu", "--json", str(out)]
    result = CliRunner().invoke(bench.app, ["drafter-checkpoint", *given], catch_exceptions=False)
    assert result.exit_code == 0 and "asked 10 at most" in result.stdout
    (cell,) = json.loads(out.read_text())["cells"]
    for name in ("call_ms", "held_up_ms"):
        assert len(cell[name]) == 3
    assert all(call <= held for call, held in zip(cell["call_ms"], cell["held_up_ms"], strict=True))
    assert cell["num_beside"] >= 3, "training goes on beside every write"
    assert cell["within_limit"] == (max(cell["held_up_ms"]) <= 10)
    assert [len(cell["seconds"][name]) for name in ("writing", "proving")] == [3, 3]
    assert list(tmp_path.iterdir()) == [out.parent]


def test_the_state_of_a_run_is_what_is_written() -> None:
    """Weights and two moments in float32, the head served and the one before it."""
    (cell,) = run(JOB, keep=no_one)["cells"]
    trainer = bench_checkpoint.random_trainer("tiny", DrafterConfig(), device="cpu", seed=0)
    weights = sum(parameter.nbytes for parameter in trainer.head.parameters())
    buffers = trainer.head.d2t.nbytes + trainer.head.t2d.nbytes
    assert cell["bytes"] == 5 * weights + buffers + 8  # and the number of updates


def test_what_was_measured_is_kept_when_a_later_geometry_fails() -> None:
    kept: list[dict[str, Any]] = []

    def interrupt(result: dict[str, Any]) -> None:
        kept.append(result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(replace(JOB, geometries=("tiny", "smollm2-135m")), keep=interrupt)
    assert [cell["geometry"] for cell in kept[0]["cells"]] == ["tiny"]


def test_no_checkpoint_is_begun_that_would_end_too_late() -> None:
    (cell,) = run(replace(JOB, checkpoints=9, seconds=1e-6), keep=no_one)["cells"]
    assert len(cell["call_ms"]) == 2, "the first, and one that finds what the first has left, are always measured"


def test_a_checkpoint_of_other_values_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor + 1 for name, tensor in tensors.items()}  # as if training got into it

    monkeypatch.setattr(drafter.checkpoint, "_copy", late)
    with pytest.raises(WrongResultError, match="a checkpoint of tiny holds another"):
        run(JOB, keep=no_one)


def test_nothing_is_timed_beside_training_that_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> FeatureBatch:
        batch = random_features(*given, **named)
        return replace(batch, aux=batch.aux * torch.nan)

    monkeypatch.setattr(bench_checkpoint, "random_features", broken)
    with pytest.raises(WrongResultError, match="not finite"):
        run(JOB, keep=no_one)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--geometry", "tiny,tiny"], "--geometry 'tiny,tiny': give different names"),
        (["--geometry", "tiny,huge"], "--geometry huge: unknown; choose one of tiny"),
        (["--geometry", "tiny", "--tokens", "5000"], "--tokens 5000 is beyond the 4096 positions of tiny; go below"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    given = ["drafter-checkpoint", "--device", "cpu", *arguments]
    error = CliRunner().invoke(bench.app, given, standalone_mode=False).exception
    assert isinstance(error, BaseException)
    code, line = outcome(error)
    assert (code, said in line) == (2, True), line

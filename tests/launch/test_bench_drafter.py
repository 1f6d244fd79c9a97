"""`paceline bench drafter-training` on a tiny geometry: the same rollouts on every side, and equal gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.schema import DrafterConfig
from launch import bench, bench_drafter
from launch.bench_drafter import Job, long_tail, padded
from launch.bench_report import WrongResultError

JOB = Job("tiny", "cpu", 4, 2, 40, 1.0, 300, 1, 0, DrafterConfig(draft_vocab=64, unroll=2))


def test_every_side_trains_on_the_same_rollouts(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    given = ["--geometry", "tiny", "--samples", "4", "--batches", "2", "--median-tokens", "40", "--max-tokens", "200"]
    result = CliRunner().invoke(
        bench.app,
        ["drafter-training", *given, "--rounds", "1", "--device", "cpu", "--json", str(out)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert "packed gains" in result.stdout
    written = json.loads(out.read_text())
    positions = {cell["side"]: cell["positions"] for cell in written["cells"]}
    assert positions["packed"] == written["lengths"]["tokens"]
    assert positions["packed"] < positions["sorted"] <= positions["padded"]
    assert written["verified"]["gradient_error"] < 1e-4
    assert written["packed_step_ms"]["median"] > 0
    assert set(written["window_step_ms"]) == {"as trained", "launched by the host"}


def test_lengths_have_a_long_tail_within_bounds() -> None:
    job = replace(JOB, num_samples=500, median_tokens=100, max_tokens=1000)
    lengths = torch.tensor(long_tail(job, torch.Generator().manual_seed(0))).float()
    assert lengths.min() >= 16
    assert lengths.max() == 1000
    assert float(lengths.median()) == pytest.approx(100, rel=0.1)
    assert lengths.mean() > 1.4 * lengths.median()


def test_other_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(batch: bench_drafter.FeatureBatch) -> bench_drafter.FeatureBatch:
        filled = padded(batch)
        return replace(filled, next_ids=filled.next_ids.clamp(min=0))  # padding becomes a target

    monkeypatch.setattr(bench_drafter, "padded", careless)
    with pytest.raises(WrongResultError, match="gradients"):
        bench_drafter.run(JOB)


def test_rollouts_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-tokens 5000"):
        bench_drafter.run(replace(JOB, max_tokens=5000))

import json
from pathlib import Path

import pytest

from configs.errors import PreflightError
from launch.curve import curve, draw


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a run of two steps."""
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    steps = [{"step": n, "reward_mean": n / 4, "seconds": 2.0, "not_kept": 1} for n in (1, 2)]
    evaluations = [{"stage": stage, "step": 0, "reward_mean": 0.1, "seconds": 1.0} for stage in ("base", "warmstart")]
    (metrics / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)))
    (metrics / "eval.jsonl").write_text("\n".join(map(json.dumps, evaluations)))
    (tmp_path / "env.json").write_text("{}")
    (tmp_path / "plan.json").write_text("{}")
    return tmp_path


def test_a_curve_keeps_every_step_and_evaluation(run: Path) -> None:
    result = curve(run)
    assert [record["reward_mean"] for record in result["steps"]] == [0.25, 0.5]
    assert [record["stage"] for record in result["evaluations"]] == ["base", "warmstart"]
    assert result["seconds"] == {"warmstart": 0.0, "evaluation": 2.0, "steps": 4.0}
    assert "not_kept" not in result["steps"][0]


def test_a_curve_is_drawn_as_a_picture(run: Path) -> None:
    draw(curve(run), run / "curve.png")
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluations_is_refused_by_name(run: Path) -> None:
    (run / "metrics" / "eval.jsonl").unlink()
    with pytest.raises(PreflightError, match=r"eval\.jsonl.*eval\.every"):
        curve(run)

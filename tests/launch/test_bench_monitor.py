"""The bench of what watching costs, on a tiny run: that it takes both kinds of steps and says what they were."""

import json
from pathlib import Path

import pytest
import yaml

from launch import bench_monitor
from launch.bench_monitor import UNWATCHED, WATCHED


@pytest.mark.slow
def test_steps_are_taken_watched_and_unwatched_in_turns(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    rows = [{"prompt": f"say {index}", "answer": "a"} for index in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": str(tiny_model_dir),
        "compute": {"dtype": "float32", "device": "cpu"},
        "data": {"source": "file", "name": str(tmp_path / "rows.jsonl")},
        "reward": {"functions": {"format": 1.0}, "format": "a.*", "workers": 1},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 16},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    result = bench_monitor.run(tmp_path / "tiny.yaml", [], pairs=2, folder=tmp_path)
    turns = result["turns"]
    assert [turn["arm"] for turn in turns] == [WATCHED, UNWATCHED, UNWATCHED, WATCHED]
    watched = [turn for turn in turns if turn["arm"] == WATCHED]
    unwatched = [turn for turn in turns if turn["arm"] == UNWATCHED]
    assert all(turn["recorder_s"] > 0 and turn["num_bytes"]["lanes"] > 0 for turn in watched)
    assert all(turn["recorder_s"] == 0 and turn["num_bytes"]["lanes"] == 0 for turn in unwatched)
    assert all(turn["num_bytes"]["steps"] > 0 and turn["tokens"] > 0 for turn in turns)
    assert result["own_share"]["median"] > 0 and result["aside"]["cycle_s"] > 0
    assert result["wall_ratio"]["rounds"] == [
        pytest.approx(on["seconds"] / off["seconds"]) for on, off in zip(watched, unwatched, strict=True)
    ]
    json.dumps(result)
    assert bench_monitor.table(result).row_count == 6

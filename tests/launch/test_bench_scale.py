"""`paceline bench scale`: one recipe in several sizes, held against the first."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError, PreflightError, ResourceError
from launch import bench, bench_scale, scale_report
from launch.bench_recipe import Asked
from launch.exits import outcome
from launch.scale_report import agreement

JOB = bench_scale.Job(("one", "separate"), steps=2, skip=1, minutes=1)


def test_agreement_counts_rollouts_tokens_before_they_part_and_rewards() -> None:
    mine = {("a", 0): ([1, 2, 3, 4], 1.0), ("a", 1): ([5, 6], 0.0), ("b", 0): ([7], 1.0)}
    theirs = {("a", 0): ([1, 2, 9], 0.0), ("a", 1): ([5, 6], 0.0), ("b", 0): ([7, 8], 1.0)}
    found = agreement(mine, theirs)
    assert found["rollouts"] == pytest.approx(1 / 3) and found["rewards"] == pytest.approx(2 / 3)
    assert found["prefix"] == pytest.approx((2 + 2 + 1) / (4 + 2 + 2))
    assert agreement(mine, mine) == {"rollouts": 1.0, "prefix": 1.0, "rewards": 1.0}


def keep_run(path: Path, *, seconds: list[float], tokens: list[int], moved: int) -> None:
    """A run directory of steps that end 100 s after the epoch and later; its process began at 40 s."""
    for name in ("metrics", "samples"):
        (path / name).mkdir(parents=True)
    (path / "env.json").write_text(json.dumps({"time": "1970-01-01T00:00:50+00:00"}))
    memory = {"worker": {"always": {"weights": 5}, "rollout": {"logits": 2}, "training": {"logits": 1}}}
    (path / "plan.json").write_text(json.dumps({"memory": memory}))
    records = []
    for number, each in enumerate(seconds, start=1):
        figures = {"loss": 0.5, "grad_norm": 1.0, "reward_mean": 0.25, "tokens": 100, "memory_bytes": 6}
        times = {"seconds": each, "seconds_rollout": each / 2, "seconds_sync": 0.5, "time": 100.0 + number}
        records.append({"step": number, **figures, **times} | ({"weight_sync_bytes": moved} if moved else {}))
        rows = [{"prompt_id": "p", "sample": 0, "token_ids": tokens, "reward": 0.25}]
        pq.write_table(pa.Table.from_pylist(rows), path / "samples" / f"step_{number}.parquet")
    (path / "metrics" / "steps.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_the_report_reads_times_transfers_and_what_lies_outside_the_steps(tmp_path: Path) -> None:
    keep_run(tmp_path / "one", seconds=[9.0, 4.0, 2.0], tokens=[1, 2], moved=0)
    keep_run(tmp_path / "separate", seconds=[9.0, 6.0], tokens=[1, 3], moved=10**9)
    clocks = {
        "one": {"begin": 40.0, "end": 110.0, "error": ""},
        "separate": {"begin": 40.0, "end": 130.0, "error": "x"},
    }
    found = scale_report.report(tmp_path, clocks, skip=1)
    one, separate = found["arms"]["one"], found["arms"]["separate"]
    assert one["step"]["median"] == 3.0 and one["rollout"]["median"] == 1.5 and "sync_bytes" not in one
    assert one["outside"] == {"in_all": 70.0, "to_directory": 10.0, "to_first_step": 42.0, "after_last_step": 7.0}
    assert one["memory"] == {"planned_worker_bytes": 7, "trained_bytes": 6}
    assert separate["sync_bytes"] == 10**9 and separate["sync_gb_per_s"]["median"] == pytest.approx(2.0)
    assert separate["agreement"] == [{"rollouts": 0.0, "prefix": 0.5, "rewards": 1.0}] * 2, "of steps that both did"
    assert found["failed"] == {"separate": "x"}
    about = {"recipe": "r", "dtype": "float32", "device": "cpu", "steps": 3, "skip": 1}
    assert scale_report.table(found | about).renderables


def test_an_arm_without_a_step_is_reported_with_its_error(tmp_path: Path) -> None:
    clocks = {"one": {"begin": 40.0, "end": 41.0, "error": "ended with 3: error: no model"}}
    found = scale_report.report(tmp_path, clocks, skip=0)
    assert found["arms"]["one"]["outside"] == {"in_all": 1.0} and found["failed"] == {"one": clocks["one"]["error"]}
    about = {"recipe": "r", "dtype": "bfloat16", "device": "cpu", "steps": 1, "skip": 0}
    assert scale_report.table(found | about).renderables


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smoke", "longtail"], "longtail: scale takes one recipe"),
        (["smoke", "--arms", "one,half"], "--arms one,half: name some of one, colocated, zero3, separate, nodes"),
        (["smoke", "--arms", "one,one"], "each once"),
        (["smoke", "--steps", "2", "--skip", "2"], "--skip 2 leaves nothing of --steps 2"),
        (["smoke", "train.lr=-1"], "train.lr"),
    ],
)
def test_bad_options_end_before_anything_runs(monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.setattr(bench_scale, "take", lambda *_, **__: pytest.fail("an arm was run"))
    error = CliRunner().invoke(bench.app, ["scale", *words]).exception
    assert error is not None
    code, reason = outcome(error)
    assert code == ConfigError.exit_code and said in reason


def test_arms_need_two_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ResourceError, match="need two GPUs, and there are 1; give --arms one"):
        bench_scale.require_devices(("one", "colocated"), "cuda")
    bench_scale.require_devices(("one",), "cuda")
    bench_scale.require_devices(("one", "colocated", "nodes"), "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    bench_scale.require_devices(("one", "colocated"), "cuda")
    with pytest.raises(PreflightError, match="--arms nodes"):
        bench_scale.require_devices(("one", "nodes"), "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert bench_scale.visible() == ["0", "1"]


def test_an_arm_runs_on_the_gpus_it_needs_and_is_ended_when_it_is_late(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    started: list[Any] = []

    class Process:
        """Ends when told to."""

        told = False

        def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
            started.append((command, env["CUDA_VISIBLE_DEVICES"]))

        def terminate(self) -> None:
            self.told = True

        def wait(self, limit_s: float | None = None) -> int:
            if not self.told:
                raise subprocess.TimeoutExpired("train", limit_s or 0)
            return -15

    monkeypatch.setattr(subprocess, "Popen", Process)
    for name in JOB.arms:
        found = bench_scale.take(name, Asked("smoke", None), JOB, folder=tmp_path, device="cuda")
        assert found["error"].startswith("took more than 1 minutes; see")
    assert [gpus for _, gpus in started] == ["3", "3,5"]
    assert "train.steps=2" in started[1][0] and "compute.placement=separate" in started[1][0]


@pytest.mark.slow
def test_two_sizes_of_a_run_sample_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {index}", "answer": "a"} for index in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "compute": {"dtype": "float32", "device": "cpu"},
        "model": str(tiny_model_dir),
        "data": {"source": "file", "name": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 64},
        "reward": {"functions": {"format": 1.0}, "workers": 1},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16},
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    out = tmp_path / "out.json"
    given = ["scale", str(tmp_path / "tiny.yaml"), "--arms", "one,nodes", "--steps", "2", "--json", str(out)]
    done = CliRunner().invoke(bench.app, given, catch_exceptions=False)
    result = json.loads(out.read_text())
    assert done.exit_code == 0 and not result["failed"], result["failed"]
    assert result["arms"]["nodes"]["agreement"] == [{"rollouts": 1.0, "prefix": 1.0, "rewards": 1.0}] * 2
    assert [len(arm["steps"]) for arm in result["arms"].values()] == [2, 2]

"""`paceline bench longtail`: the same run by several drafts, in turns, and honest sums."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

from configs.errors import ConfigError, PreflightError
from drafter.evaluate import Cycles
from launch import arms, bench, bench_longtail, longtail_drafter, longtail_report
from launch.exits import outcome
from rl.loop import Loop

LONGTAIL = Path(bench.__file__).parents[1] / "configs" / "longtail.yaml"


@pytest.fixture
def recipe(deep_model_dir: Path, tmp_path: Path) -> Path:
    """The shipped recipe at a size for a test."""
    config = yaml.safe_load(LONGTAIL.read_text())
    config |= {"model": str(deep_model_dir), "compute": {"dtype": "float32", "device": "cpu"}}
    config["data"] |= {"options": {"max_terms": 12}, "size": 100}
    config["reward"]["workers"] = 1
    config["rollout"] = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 64, "temperature": 0.3}
    config["warmstart"] |= {"steps": 2, "warmup_steps": 1, "examples_per_step": 4}
    config["eval"] = {"every": 1, "num_prompts": 4}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def measure(recipe: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the bench: its JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        given = ["longtail", "--recipe", str(recipe), "--json", str(out), "rollout.kv_tokens=4096", *arguments]
        result = CliRunner().invoke(bench.app, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


def test_arms_start_alike_take_turns_and_sample_the_same(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    result = measure("--arms", "off,suffix", "--steps", "3", "--skip", "1", "--runs", str(runs))
    assert [record["stage"] for record in result["warmstart"]["eval"]] == ["warmstart"]
    assert len(result["warmstart"]["warmstart"]) == 2
    off, suffix = result["arms"]["off"], result["arms"]["suffix"]
    assert [step["step"] for step in suffix["steps"]] == [1, 2, 3]
    assert len(off["step"]["rounds"]) == len(suffix["gain"]["rollout"]["rounds"]) == 2
    assert off["accept_length"] == 1.0 < suffix["accept_length"]
    assert suffix["agreement"] == [{"rollouts": 1.0, "prefix": 1.0}] * 3
    assert [step["reward_mean"] for step in off["steps"]] == [step["reward_mean"] for step in suffix["steps"]]
    assert off["tail"]["median"] <= off["rollout"]["median"]

    again = measure("--arms", "off", "--steps", "1", "--skip", "0", "--checkpoint", str(runs / "warm"))
    assert again["arms"]["off"]["steps"][0]["reward_mean"] == off["steps"][0]["reward_mean"]
    picture = tmp_path / "out.png"
    drawn = CliRunner().invoke(bench.app, ["longtail-picture", str(tmp_path / "out.json"), str(picture)])
    assert drawn.exit_code == 0 and picture.stat().st_size > 10_000


@pytest.mark.slow
def test_learned_drafters_start_from_one_that_was_trained_and_measured_before(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    runs, arms = tmp_path / "runs", ("--arms", "off,tlt,ours", "--steps", "3", "--skip", "1")
    small = ("drafter.batch_tokens=128", "drafter.feature_window=32", "drafter.window=32", "drafter.draft_vocab=64")
    result = measure(*arms, "--drafter-steps", "30", "--runs", str(runs), *small)
    assert result["settings"]["tlt"]["below"] == 32
    for name in ("tlt", "ours"):
        arm = result["arms"][name]
        assert arm["agreement"] == [{"rollouts": 1.0, "prefix": 1.0}] * 3
        assert arm["steps"][0]["drafter_version"] == 1, "served from the first step on"
        assert 0 < arm["sources"]["eagle"]["share"] <= 1 <= arm["sources"]["eagle"]["accept_length"]
    drafter = result["drafter"]
    assert drafter["steps"] == 30 and drafter["seconds"]["training"] > 0
    assert drafter["accept_length"]["after"] > drafter["accept_length"]["before"]
    assert [list(drafter[when]) for when in ("start", "end")] == [["untrained", "static"], ["static", "online"]]
    for figures in (*drafter["start"].values(), *drafter["end"].values()):
        assert len(figures["by_depth"]) == 15 and figures["accept_length"] >= 1
    assert longtail_report.drafter_table(drafter).row_count == 4

    given = measure(*arms, "--checkpoint", str(runs / "warm"), "--drafter", str(runs / "drafter"), *small)
    assert given["drafter"]["steps"] == 0
    assert given["drafter"]["start"] == {"static": drafter["start"]["static"]}, "the same policy, answers and drafter"
    assert given["arms"]["ours"]["agreement"] == result["arms"]["ours"]["agreement"]


def test_an_arm_that_fails_ends_alone_and_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.train_step

    async def train_step(loop: Loop) -> None:
        if loop.config.spec.source == "suffix" and loop.step == 1:
            raise RuntimeError("no such luck")
        await step(loop)

    monkeypatch.setattr(Loop, "train_step", train_step)
    job = bench_longtail.Job(("off", "suffix"), steps=3, skip=0, drafter_steps=0, minutes=0)
    seen: list[dict[str, Any]] = []
    overrides = ["rollout.kv_tokens=4096", "eval.every=0", "warmstart.steps=0", "warmstart.warmup_steps=0"]
    with pytest.raises(RuntimeError, match="no such luck"):
        bench_longtail.run(
            recipe, overrides, job, checkpoint=None, drafter=None, folder=tmp_path / "runs", keep=seen.append
        )
    assert [len(seen[-1]["arms"][name]["steps"]) for name in job.arms] == [3, 1]
    assert seen[-1]["failed"] == {"suffix": "RuntimeError: no such luck"}
    assert longtail_report.table(seen[-1]).row_count == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--arms", "off,fast"], 2, "--arms off,fast: name some of off, suffix, tlt, ours"),
        (["--steps", "3", "--skip", "3"], 2, "--skip 3 leaves nothing of --steps 3; lower it"),
        (["--checkpoint", "nowhere"], 3, "nowhere is not a run directory"),
        (["--drafter", "nowhere"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    recipe: Path, arguments: list[str], code: int, said: str
) -> None:
    given = ["longtail", "--recipe", str(recipe), *arguments]
    result = CliRunner().invoke(bench.app, given, standalone_mode=False)
    assert isinstance(result.exception, BaseException)
    found, line = outcome(result.exception)
    assert (found, said in line) == (code, True), line


@pytest.mark.parametrize(
    ("taken", "arguments"),
    [
        ("suffix", ["--arms", "off,suffix"]),
        ("warm", ["--arms", "off"]),
        ("drafter", ["--arms", "off,ours"]),
    ],
)
def test_a_taken_folder_is_found_before_anything_is_measured(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str, arguments: list[str]
) -> None:
    runs = tmp_path / "runs"
    (runs / taken / "mine").mkdir(parents=True)
    monkeypatch.setattr(arms, "make_loop", pytest.fail)
    given = ["longtail", "--recipe", str(recipe), "--runs", str(runs), *arguments]
    error = CliRunner().invoke(bench.app, given, standalone_mode=False).exception
    assert isinstance(error, PreflightError) and f"runs/{taken} already exists" in str(error)


def test_a_policy_too_short_for_a_drafter_is_found_before_anything_is_measured(
    recipe: Path, tiny_model_dir: Path
) -> None:
    given = ["longtail", "--recipe", str(recipe), "--arms", "off,ours", f"model={tiny_model_dir}"]
    error = CliRunner().invoke(bench.app, given, standalone_mode=False).exception
    assert isinstance(error, PreflightError) and "engines need three different" in str(error)


@pytest.mark.parametrize("written", ['{"what": "milliseconds per cycle"}', '{"arms": []}', "[1]"])
def test_a_picture_is_drawn_of_long_tail_results_alone(tmp_path: Path, written: str) -> None:
    other, picture = tmp_path / "other.json", tmp_path / "x.png"
    other.write_text(written)
    error = CliRunner().invoke(bench.app, ["longtail-picture", str(other), str(picture)]).exception
    assert isinstance(error, ConfigError)
    assert str(other) in str(error) and "paceline bench longtail --json" in str(error)
    assert not picture.exists()


def test_the_title_counts_the_steps_there_are(tmp_path: Path) -> None:
    runs = {name: write_run(tmp_path / name, [record(1), record(2)], ["a"]) for name in ("off", "ours")}
    found = {"what": longtail_report.WHAT, "model": "m", "steps": 14, "skip": 1, "failed": {}}
    title = longtail_report.table(found | {"arms": longtail_report.report(runs, skip=1)}).title
    assert "2 steps less 1" in str(title)


def record(step: int, **values: float) -> dict[str, float]:
    known = {"seconds_rollout": 2.0, "seconds_tail": 1.0, "seconds_train": 1.0, "seconds": 3.0, "tokens": 100}
    known |= {"draft_share_eagle": 0.5, "accept_length_eagle": 3.0}
    known |= {"accept_length": 2.0, "reward_mean": 0.5, "num_rollouts": 4, "response_len_max": 60}
    return {"step": step} | known | values


def write_run(run: Path, steps: list[dict[str, float]], texts: list[str]) -> Path:
    for name in ("metrics", "samples"):
        (run / name).mkdir(parents=True)
    (run / "metrics" / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)))
    rows = [{"prompt_id": "p", "sample": i, "text": text, "num_tokens": len(text)} for i, text in enumerate(texts)]
    for step in steps:
        pq.write_table(pa.Table.from_pylist(rows), run / "samples" / f"step_{step['step']}.parquet")
    return run


def test_figures_are_sums_over_counted_steps_that_both_sides_did(tmp_path: Path) -> None:
    off = [record(1, seconds_rollout=90), record(2), record(3, seconds_rollout=4, seconds=5, accept_length=1.0)]
    off[2] |= {"draft_share_eagle": 0.1, "accept_length_eagle": 1.0}
    ours = [record(1), record(2, seconds_rollout=1.0, seconds=2.0)]
    runs = {
        "off": write_run(tmp_path / "off", off, ["abcd", "xy"]),
        "ours": write_run(tmp_path / "ours", ours, ["abzz", "xy"]),
    }
    found = longtail_report.report(runs, skip=1)
    assert found["off"]["rollout"]["rounds"] == [2.0, 4.0]
    assert found["off"]["tokens_per_s"] == pytest.approx(200 / 6)
    assert found["off"]["accept_length"] == pytest.approx(200 / 150)  # 50 and 100 forwards
    eagle = found["off"]["sources"]["eagle"]  # 25 and 10 forwards
    assert eagle == {"share": pytest.approx(35 / 150), "accept_length": pytest.approx((25 * 3 + 10) / 35)}
    assert found["ours"]["gain"]["rollout"]["total"] == 2.0 and found["ours"]["gain"]["step"]["total"] == 1.5
    assert found["ours"]["agreement"] == [{"rollouts": 0.5, "prefix": pytest.approx(4 / 6)}] * 2


def test_an_arm_without_counted_steps_has_no_figures(tmp_path: Path) -> None:
    runs = {name: write_run(tmp_path / name, [record(1)], ["a"]) for name in ("off", "ours")}
    found = longtail_report.report(runs, skip=1)
    assert found["ours"].keys() == {"steps", "gain", "agreement"} and found["ours"]["gain"] == {}


def test_early_and_late_drafts_are_told_apart_by_where_they_begin() -> None:
    cycles = Cycles(depth=3, places=[0, 127, 128, 511, 512, 900], accepted=[1, 2, 0, 0, 3, 3])
    found = longtail_drafter.early_and_late(cycles)
    assert found == {"early": 2.5, "early_se": pytest.approx(0.5), "late": 4.0, "late_se": 0.0}
    nothing = {"early": None, "early_se": None, "late": None, "late_se": None}
    assert longtail_drafter.early_and_late(Cycles(3, [], [])) == nothing

"""`paceline bench online` at a tiny size: a drafter that stays, one that learns on, one that begins at nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

from configs.errors import ConfigError, PreflightError
from drafter.export import read_drafter
from launch import arms, bench, bench_online
from launch.bench_report import WrongResultError
from launch.exits import outcome

SMALL = ("--drafter-steps", "2", "--texts", "8")


@pytest.fixture
def recipe(deep_model_dir: Path, tmp_path: Path) -> Path:
    config = {
        "model": str(deep_model_dir),
        "compute": {"dtype": "float32", "device": "cpu"},
        "data": {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2}, "size": 60},
        "reward": {"workers": 1},
        "rollout": {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 32, "temperature": 0.3},
        "drafter": {"draft_vocab": 100, "window": 32, "batch_tokens": 128, "feature_window": 16, "unroll": 2},
        "warmstart": {"steps": 1, "examples_per_step": 4, "solutions": "rl.worked:chain_sum"},
        "train": {"lr": 1e-3},
        "eval": {"every": 2, "num_prompts": 6},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def refused(*arguments: str) -> BaseException:
    error = CliRunner().invoke(bench.app, ["online", *arguments], standalone_mode=False).exception
    assert isinstance(error, BaseException)
    return error


def test_one_drafter_stays_one_learns_on_and_one_begins_at_nothing(recipe: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "results" / "out.json"
    given = ["online", str(recipe), *SMALL, "--steps", "3", "--minutes", "0", "--runs", str(runs), "--json", str(out)]
    shown = CliRunner().invoke(
        bench.app, [*given, "drafter.budget=1", "rollout.kv_tokens=4096"], catch_exceptions=False
    )
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stdout.split())
    assert "asked: online over static" in said and "asked: late no worse than early" in said
    result: dict[str, Any] = json.loads(out.read_text())
    steps = {name: arm["steps"] for name, arm in result["arms"].items()}
    assert [len(of) for of in steps.values()] == [3, 3, 3]
    assert [step["drafter_version"] for step in steps["static"]] == [1, 1, 1]
    assert sum(step["drafter_steps"] for step in steps["static"]) == 0
    assert all(sum(step["drafter_steps"] for step in steps[name]) > 0 for name in ("online", "random"))
    assert steps["online"][0]["accept_length"] == steps["static"][0]["accept_length"] > 1
    assert (steps["random"][0]["drafter_version"], steps["random"][0]["accept_length"]) == (0, 1)
    assert [arm["first_rollouts_equal"] for arm in result["arms"].values()] == [1, 1, 1]
    for at in range(3):
        assert len({steps[name][at]["reward_mean"] for name in steps}) == 1, "drafts change no sample"
    assert len(read_drafter(runs / "drafter").target_ids()) == 100
    end = result["end"]
    assert 0 < end["bounds"]["early"] <= end["bounds"]["late"] <= end["median_tokens"]
    static = end["arms"]["static"]
    assert len(static["by_depth"]) == 4 and static["accept_length"] >= 1 <= static["early"]
    served = steps["random"][-1]["drafter_version"] > 0
    assert (end["arms"]["random"] is not None) == served


def test_arms_that_are_not_what_their_names_say_are_refused() -> None:
    step = {"drafter_version": 1, "accept_length": 2.0}
    random = {"drafter_version": 0, "accept_length": 1.0}
    bench_online.verify({"static": [step, step], "random": [random, step]})
    with pytest.raises(WrongResultError, match=r"stay as it is changed: its versions are \[1, 2\]"):
        bench_online.verify({"static": [step, step | {"drafter_version": 2}], "random": [random]})
    with pytest.raises(WrongResultError, match="before it had learned"):
        bench_online.verify({"static": [step], "random": [step]})


def test_a_long_run_is_told_in_few_rows_with_the_last_step_among_them() -> None:
    steps = [{"step": n, "accept_length": 1.0, "drafter_version": 1, "reward_mean": 0.5} for n in range(1, 101)]
    arm = {"steps": steps, "first_rollouts_equal": 1.0}
    found = bench_online.table({"what": "w", "model": "m", "arms": {"static": arm, "random": arm}})
    (numbers,) = ([*column.cells] for column in found.columns[:1])
    assert numbers[0] == "1" and numbers[-1] == "100" and len(numbers) <= bench_online.ROWS + 1


def test_an_arm_that_serves_nothing_yet_has_no_figures() -> None:
    figures = {
        "depth": 3, "accept_length": 1.5, "early": 1.5, "early_se": 0.25, "late": None, "late_se": None,
        "by_depth": [0.5, 0.25, 0.0],
    }  # fmt: skip
    end = {"bounds": {"early": 3, "late": 6}, "arms": {"static": figures, "random": None}}
    rows = list(zip(*(column.cells for column in bench_online.end_table({"end": end}).columns), strict=True))
    assert rows == [
        ("static", "1.50", "1.50 ±0.25", "-", "50%", "25%", "0%"),
        ("random", "-", "-", "-", "-", "-", "-"),
    ]


@pytest.mark.parametrize("taken", ["online", "warm", "drafter"])
def test_a_taken_folder_is_found_before_anything_is_measured(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    runs = tmp_path / "runs"
    (runs / taken / "mine").mkdir(parents=True)
    monkeypatch.setattr(bench_online, "train_before", pytest.fail)
    monkeypatch.setattr(arms, "make_loop", pytest.fail)
    error = refused(str(recipe), "--runs", str(runs))
    assert isinstance(error, PreflightError) and f"runs/{taken} already exists" in str(error)


def test_what_cannot_be_measured_is_refused_in_one_line(recipe: Path, tiny_model_dir: Path) -> None:
    assert "nowhere.yaml does not exist" in str(error := refused("nowhere.yaml")) and outcome(error)[0] == 2
    error = refused(str(recipe), f"model={tiny_model_dir}")
    assert isinstance(error, PreflightError) and "engines need three different" in str(error)
    error = refused(str(recipe), *SMALL, "--minutes", "0.0001", "rollout.kv_tokens=4096")
    assert isinstance(error, ConfigError), error
    assert outcome(error)[0] == 2 and "--minutes 0.0001 were over before the first step" in str(error)

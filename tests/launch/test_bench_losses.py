"""`paceline bench drafter-losses` at a tiny size: the same start and updates by every loss, and honest figures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from drafter.eagle import EagleHead
from drafter.features import FeatureBatch
from launch import bench, bench_losses
from launch.bench_losses import Job
from launch.bench_report import WrongResultError
from launch.exits import outcome
from launch.offline import start_head

JOB = Job(("lk", "kl"), seeds=1, steps=2, texts=8, heldout=4, depth=2)
RECIPE = """
model: {model}
compute: {{device: cpu, dtype: float32}}
data: {{name: chain_sum, options: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}, size: 40}}
rollout: {{max_new_tokens: 24, temperature: 0.5}}
drafter: {{draft_vocab: 100, window: 32, batch_tokens: 128, feature_window: 16, unroll: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path, deep_model_dir: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=deep_model_dir))
    return path


@pytest.fixture
def refused(recipe: Path) -> Callable[..., tuple[int, str]]:
    """Exit code and line of a command that fails."""

    def run(*arguments: str) -> tuple[int, str]:
        given = ["drafter-losses", str(recipe), *arguments]
        error = CliRunner().invoke(bench.app, given, standalone_mode=False).exception
        assert isinstance(error, BaseException)
        return outcome(error)

    return run


def test_losses_start_alike_and_are_told_apart_by_seed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out.json"
    given = ["--losses", "lk,kl,tv", "--seeds", "2", "--steps", "20", "--texts", "24", "--heldout", "8", "--depth", "3"]
    result = CliRunner().invoke(
        bench.app, ["drafter-losses", str(recipe), *given, "--json", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0 and "over kl, by seed" in result.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["answers"]["heldout"] <= 8 and found["batches"]["count"] > 1
    assert [(run["seed"], run["loss"]) for run in found["runs"]] == [(s, n) for s in (0, 1) for n in ("lk", "kl", "tv")]
    for seed in (0, 1):
        of_seed = [run for run in found["runs"] if run["seed"] == seed]
        assert len({run["expected"]["0"] for run in of_seed}) == 1
        assert len({run["expected"]["20"] for run in of_seed}) == 3, "a loss that is not used changes nothing"
        assert all(list(run["expected"]) == ["0", "5", "10", "20"] for run in of_seed)
        assert all(run["expected"]["20"] > run["expected"]["0"] for run in of_seed), "they learn"
        assert all(len(run["by_depth"]) == 3 for run in of_seed)
    lk, kl = found["losses"]["lk"], found["losses"]["kl"]
    for name in ("expected", "replayed"):
        pairs = zip(lk[name]["rounds"], kl[name]["rounds"], strict=True)
        assert lk["over_kl"][name] == pytest.approx([a - b for a, b in pairs])
    assert "over_kl" not in kl


def test_differences_are_of_the_same_seed() -> None:
    def one(loss: str, expected: float, replayed: float) -> dict[str, Any]:
        return {"loss": loss, "expected": {"0": 1.0, "9": expected}, "replayed": replayed}

    runs = [one("tv", 1.5, 1.25), one("kl", 2.0, 1.5), one("tv", 3.0, 2.75), one("kl", 2.5, 2.0)]
    found = bench_losses.compare(runs)
    assert found["tv"]["over_kl"] == {"expected": [-0.5, 0.5], "replayed": [-0.25, 0.75]}
    assert found["kl"]["expected"]["mean"] == 2.25
    assert (found["tv"]["replayed"]["min"], found["tv"]["replayed"]["max"]) == (1.25, 2.75)
    assert "over_kl" not in bench_losses.compare(runs[::2])["tv"]


def test_every_epoch_has_every_batch_once_in_an_order_of_the_seed() -> None:
    first, second = (bench_losses.order(seed, num_batches=5, steps=12) for seed in (0, 1))
    assert sorted(first[:5]) == sorted(first[5:10]) == [0, 1, 2, 3, 4] and len(first) == 12
    assert first[:5] != first[5:10] and first != second
    assert bench_losses.order(0, num_batches=5, steps=7) == first[:7]


def test_heads_that_start_elsewhere_are_not_compared(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(9))

    def other(*given: Any) -> EagleHead:
        head = start_head(*given)
        with torch.no_grad():
            head.fc.weight.mul_(1 + next(count))
        return head

    monkeypatch.setattr(bench_losses, "start_head", other)
    with pytest.raises(WrongResultError, match="heads of seed 0 start at other accept lengths"):
        bench_losses.run(recipe, [], JOB)


def test_an_update_that_is_not_finite_ends_the_comparison(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = bench_losses.cut

    def broken(*given: Any, **named: Any) -> list[FeatureBatch]:
        return [replace(batch, aux=batch.aux * torch.nan) for batch in cut(*given, **named)]

    monkeypatch.setattr(bench_losses, "cut", broken)
    with pytest.raises(WrongResultError, match="update 1 by lk, seed 0, was not finite"):
        bench_losses.run(recipe, [], JOB)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--losses", "lk,fast"], "--losses 'lk,fast': name some of lk, kl, ce, tv, each once"),
        (["--losses", "lk,lk"], "--losses 'lk,lk': name some of"),
        (["drafter.loss=fast"], "drafter.loss='fast': expected one of lk, kl, ce, tv"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    refused: Callable[..., tuple[int, str]], arguments: list[str], said: str
) -> None:
    code, line = refused(*arguments)
    assert (code, said in line) == (2, True), line


def test_a_recipe_that_is_not_there_is_named() -> None:
    error = CliRunner().invoke(bench.app, ["drafter-losses", "nowhere.yaml"], standalone_mode=False).exception
    assert isinstance(error, BaseException) and outcome(error)[0] == 2 and "nowhere.yaml" in str(error)

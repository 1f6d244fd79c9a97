"""`paceline bench memory`: recipes as they are asked for, phases as they are measured, a plan held against them."""

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from configs.errors import ConfigError, PreflightError
from launch import bench, bench_memory
from launch.bench_memory import FIXED, Peaks, Reading
from launch.bench_recipe import Asked, asked, random_folder
from launch.exits import outcome
from launch.plan import derive
from rollout.model import load_config, load_policy


class Counted:
    """A meter that finds a little more at every reading."""

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> Reading:
        self.readings += 1
        return Reading(allocated=1000 * self.readings, reserved=2000 * self.readings, device=3000)


class Silent:
    """A Progress that shows nothing."""

    def phase(self, name: str) -> None: ...
    def rollouts(self, done: int, total: int) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def test_keys_belong_to_the_recipe_before_them() -> None:
    words = ["smoke", "train.lr=1e-4", "smoke@tiny", "model=a@b", "train.lr=2e-4"]
    assert asked(words) == [
        Asked("smoke", None, ("train.lr=1e-4",)),
        Asked("smoke", "tiny", ("model=a@b", "train.lr=2e-4")),
    ]
    assert [each.name for each in asked(words)] == ["smoke", "smoke@tiny"]
    assert [each.config(FIXED).train.lr for each in asked(words)] == [1e-4, 2e-4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no recipe"),
        (["train.lr=1", "smoke"], "train.lr=1 stands before any recipe; give the recipe first"),
        (["smoke@qwen9"], "smoke@qwen9: unknown; choose one of tiny"),
    ],
)
def test_words_that_make_no_recipe_name_the_remedy(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(words)


def test_bad_options_end_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "in_child", lambda *_, **__: pytest.fail("a recipe was run"))

    def code(*words: str) -> tuple[int, str]:
        error = CliRunner().invoke(bench.app, ["memory", *words]).exception
        assert error is not None
        return outcome(error)

    assert code("smoke", "smoke")[0] == 2 and "two recipes of one name" in code("smoke", "smoke")[1]
    assert code("smoke", "train.lr=-1")[0] == 2
    assert code("smoke", "rollout.backend=vllm", "spec.source=off")[0] == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert code("smoke")[0] == PreflightError.exit_code and "`paceline plan`" in code("smoke")[1]


def test_a_recipe_that_fails_is_named_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_child(each: Asked, *, steps: int) -> tuple[dict[str, Any] | None, str]:
        phases = {"train": dict.fromkeys(("allocated", "reserved", "device", "graphs", "used"), 10**9)}
        taken = {"planned_bytes": 12 * 10**8, "used_bytes": 10**9, "off": 0.2, "phases": phases}
        return (taken, "") if each.recipe == "smoke" else (None, "ended with 4: error: out of memory")

    monkeypatch.setattr(bench_memory, "in_child", in_child)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_memory, "provenance", lambda **about: about)
    kept: list[list[str]] = []
    recipes = asked(["longtail", "smoke"])
    result = bench_memory.run(recipes, steps=2, keep=lambda so_far: kept.append(list(so_far["recipes"])))
    assert result["failed"] == {"longtail": "ended with 4: error: out of memory"} and kept == [[], ["smoke"]]
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(bench_memory.table(result))
    text = shown.export_text()
    assert "1.20" in text and "+20.0%" in text and "outside" in text and "out of memory" in text


def test_a_phase_keeps_its_most_and_graphs_count_as_used() -> None:
    class Engine:
        graph_bytes = 0

    meter, engine = Counted(), Engine()
    peaks = Peaks(meter, Silent())
    peaks.phase("rollout")  # the first reading is the start's
    engine.graph_bytes = 500
    peaks.engine = engine  # type: ignore[assignment]
    peaks.phase("train")
    engine.graph_bytes = 0
    peaks.step({"memory_bytes": 7000})
    assert [phase["used"] for phase in peaks.phases.values()] == [1000, 2500, 7000]
    assert list(peaks.phases) == ["start", "rollout", "train"]
    peaks.phase("rollout")
    assert peaks.phases["train"]["allocated"] == 7000 and peaks.phases["train"]["reserved"] == 8000


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A recipe of quick steps, with a warm start."""
    rows = [{"prompt": f"say {index}", "answer": "a", "solution": "a" * 9} for index in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": str(tiny_model_dir),
        "compute": {"dtype": "float32", "device": "cpu"},
        "data": {"source": "file", "name": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 64},
        "reward": {"functions": {"format": 1.0}, "workers": 1},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8},
        "train": {"steps": 6, "micro_tokens": 512},
        "warmstart": {"steps": 9, "examples_per_step": 2, "warmup_steps": 5},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path


def test_a_few_steps_are_held_against_the_plan_and_leave_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    config = Asked(str(recipe), None).config(FIXED)
    found = asyncio.run(bench_memory.take(config, Counted(), folder=tmp_path, steps=2))
    (planned,) = derive(config, load_config(Path(config.model))).memory.values()
    assert found["planned_bytes"] == planned.total > 0
    assert list(found["phases"]) == ["start", "warmstart", "rollout", "reward", "train"]
    most = max(phase["allocated"] for phase in found["phases"].values())
    assert found["used_bytes"] == most and found["off"] == planned.total / most - 1
    assert len(found["seconds_steps"]) == len(found["longest"]) == 2
    assert len((tmp_path / "memory/metrics/warmstart.jsonl").read_text().splitlines()) == 2, "not the recipe's nine"
    assert not list((tmp_path / "memory/checkpoints").iterdir())
    whole = {"what": "w", "steps": 2, "limit": 0.1, "recipes": {"tiny": found | {"seconds_in_all": 1.0}}, "failed": {}}
    assert bench_memory.table(whole).renderables


def test_random_weights_are_a_model_folder_under_the_recipes_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    make: Callable[..., Path] = lambda model: random_folder(  # noqa: E731
        str(model), "tiny", tmp_path / "made", device="cpu", dtype="float32", seed=0
    )
    policy = load_policy(make(tiny_model_dir), device="cpu", dtype="float32")
    assert policy.config.vocab_size == 512 and policy.config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens([f"<{number}>" for number in range(300)])
    wide = tmp_path / "wide"
    load_policy(tiny_model_dir, device="cpu", dtype="float32").save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    with pytest.raises(ConfigError, match="@tiny has 512 tokens, the tokenizer of .* 559; name another"):
        make(wide)

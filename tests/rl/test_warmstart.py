from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from configs.errors import ConfigError, DataError
from configs.schema import WarmstartConfig
from rl.data import DataSet
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch, StepStats
from rl.warmstart import solver, warm_start
from rollout.types import Prompt


class Sums:
    """Twenty additions, as a source of rows."""

    def __len__(self) -> int:
        return 20

    def prompt(self, index: int) -> Prompt:
        return Prompt(f"sum-{index}", [1, 50 + index], answer=str(index), task={"solution": f"it is {index}"})

    def heldout(self) -> list[Prompt]:
        return []


class Recorder:
    """Keeps the batches it is asked to learn."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.rates: list[float] = []

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        self.batches.append(batch)
        self.rates.append(lr)
        values: dict[str, Any] = dict.fromkeys(StepStats.__dataclass_fields__, 0)
        return StepStats(**values | {"lr": lr})

    def step(self, batch: Batch) -> StepStats:
        raise AssertionError("a warm start takes no reinforcement step")

    def save(self, folder: Path) -> None:
        raise AssertionError("a warm start saves nothing")

    def load(self, folder: Path) -> None:
        raise AssertionError("a warm start loads nothing")


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def warmed(tokenizer: Any, **options: Any) -> Recorder:
    trainer, data = Recorder(), DataSet(Sums(), seed=7, num_heldout=0)
    config = WarmstartConfig(**{"steps": 3, "examples_per_step": 4} | options)
    warm_start(trainer, data, tokenizer, config, report=lambda step, stats: None)
    return trainer


def responses(batch: Batch) -> list[list[int]]:
    bounds = batch.cu_seqlens.tolist()
    return [batch.token_ids[s:e][batch.loss_mask[s:e]].tolist() for s, e in zip(bounds, bounds[1:], strict=False)]


def test_solutions_are_learnt_up_to_the_end_token(tokenizer: Any) -> None:
    for batch in warmed(tokenizer).batches:
        rows = [int(token) - 50 for token in batch.token_ids[batch.cu_seqlens[:-1].long() + 1]]
        texts = [tokenizer.decode(response) for response in responses(batch)]
        assert texts == [f"it is {row}{tokenizer.eos_token}" for row in rows]


def test_problems_are_the_same_in_every_run_and_new_in_every_step(tokenizer: Any) -> None:
    first, second = warmed(tokenizer), warmed(tokenizer)
    ids = [batch.token_ids.tolist() for batch in first.batches]
    assert ids == [batch.token_ids.tolist() for batch in second.batches]
    assert len({tuple(row) for row in ids}) == 3


def test_the_rate_rises_and_falls_as_configured(tokenizer: Any) -> None:
    trainer = warmed(tokenizer, steps=5, lr=1.0, schedule="linear", warmup_steps=2)
    assert trainer.rates == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])
    assert warmed(tokenizer, steps=3, lr=2.0).rates == [2.0, 2.0, 2.0]


def test_a_function_can_give_the_solutions(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text("def shout(prompt):\n    return prompt.answer + '!'\n")
    monkeypatch.syspath_prepend(tmp_path)
    (batch,) = warmed(tokenizer, steps=1, solutions="shouting:shout").batches
    assert all(tokenizer.decode(response).endswith(f"!{tokenizer.eos_token}") for response in responses(batch))


@pytest.mark.parametrize("source", ["nowhere:solve", "json:nothing", "json", ":loads", "json.:x"])
def test_unusable_function_is_a_config_error_naming_it(source: str) -> None:
    with pytest.raises(ConfigError, match=f'warmstart.solutions="{source}"'):
        solver(source)


def test_function_that_fails_names_prompt_and_error(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text("def solve(prompt):\n    return prompt.task['steps']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"failed on prompt sum-\d+: KeyError: 'steps'"):
        warmed(tokenizer, solutions="failing:solve")


@pytest.mark.parametrize("solution", ["", None, 3])
def test_missing_solution_names_the_prompt(tokenizer: Any, solution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Prompt("sum-3", [1], answer="", task={} if solution is None else {"solution": solution})
    monkeypatch.setattr(Sums, "prompt", lambda self, index: bare)
    with pytest.raises(DataError, match=r"prompt sum-3 has no worked solution .*, as to rl\.worked:chain_sum"):
        warmed(tokenizer)


def test_real_trainer_gets_better_and_reports_every_step(
    tokenizer: Any, make_trainer: Callable[..., DeepSpeedTrainer]
) -> None:
    reports: list[tuple[int, StepStats]] = []
    warm_start(
        make_trainer(),
        DataSet(Sums(), seed=0, num_heldout=0),
        tokenizer,
        WarmstartConfig(steps=12, examples_per_step=8, lr=5e-3),
        report=lambda step, stats: reports.append((step, stats)),
    )
    assert [step for step, _ in reports] == list(range(1, 13))
    assert reports[-1][1].loss < 0.5 * reports[0][1].loss

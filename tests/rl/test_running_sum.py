"""The long-tailed task: how long its sums are, what its rows hold and what an answer earns."""

from statistics import median
from typing import Any

import pytest

from configs.errors import ConfigError
from rl.running_sum import heavy_tailed
from rl.tasks import create_task


def lengths(**options: Any) -> list[int]:
    task = create_task("running_sum", options, seed=1, size=3000)
    return [len(task[index]["metadata"]["terms"]) for index in range(3000)]


def test_most_sums_are_short_and_a_few_very_long() -> None:
    found = lengths()
    assert min(found) == 2 and 140 <= max(found) <= 150
    assert median(found) <= 8
    assert 0.03 < sum(length >= 75 for length in found) / len(found) < 0.08  # 0.054 by the formula


def test_a_smaller_exponent_gives_a_heavier_tail() -> None:
    assert sum(lengths(tail=0.2)) > 1.3 * sum(lengths(tail=0.5)) > 1.3 * sum(lengths(tail=1.0))


def test_the_quantile_stays_within_its_bounds_and_never_falls() -> None:
    values = [heavy_tailed(step / 10_000, low=2, high=150, tail=0.5) for step in range(10_000)]
    assert (values[0], values[-1]) == (2, 150) and values == sorted(values)
    assert heavy_tailed(0.999999, low=7, high=7, tail=3.0) == 7


def test_a_row_lists_its_terms_by_number_and_answers_their_sum() -> None:
    task = create_task("running_sum", {"min_terms": 3, "max_terms": 3}, seed=5, size=10)
    row, again = task[4], create_task("running_sum", {"min_terms": 3, "max_terms": 3}, seed=5, size=10)[4]
    terms = row["metadata"]["terms"]
    assert row == again
    assert row["question"].splitlines()[1:] == [f"{number}: {term}" for number, term in enumerate(terms, 1)]
    assert row["answer"] == str(sum(terms)) and all(1 <= term <= 9 for term in terms)


def test_only_the_whole_sum_scores() -> None:
    task = create_task("running_sum", {}, seed=5, size=10)
    row = task[0] | {"answer": "89"}
    assert [task.score_answer(answer, row) for answer in ("89", "1: 89", "890", "8", "", None)] == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"min_terms": 9, "max_terms": 3}, "min_terms=9"), ({"tail": 0}, "tail=0"), ({"min_value": -1}, "min_value=-1")],
)
def test_options_that_describe_no_sum_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"data.options are refused by reasoning-gym's 'running_sum': {named}"):
        create_task("running_sum", options, seed=0, size=1)

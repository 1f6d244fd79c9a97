"""Worked solutions earn the full reward of the task they solve."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from rl import worked
from rl.reward import extract_answer, score_task
from rl.tasks import create_task
from rollout.types import Prompt

LAST_INTEGER = re.compile(r"(-?\d+)")


def prompts(name: str, options: dict[str, Any], count: int) -> list[Prompt]:
    task = create_task(name, options, seed=3, size=count)
    return [
        Prompt(
            id=f"{name}:{index}",
            token_ids=[],
            answer=row["answer"],
            task={"name": name, "question": row["question"], "metadata": row["metadata"], "options": options},
        )
        for index in range(count)
        for row in (task[index],)
    ]


@pytest.mark.parametrize(
    ("name", "options", "solve"),
    [
        ("chain_sum", {"min_terms": 1, "max_terms": 5, "min_digits": 1, "max_digits": 3}, worked.chain_sum),
        ("chain_sum", {"min_terms": 2, "max_terms": 4, "allow_negation": True}, worked.chain_sum),
        ("running_sum", {"min_terms": 1, "max_terms": 40}, worked.running_sum),
    ],
)
def test_worked_solutions_score_1(name: str, options: dict[str, Any], solve: Callable[[Prompt], str]) -> None:
    for prompt in prompts(name, options, 200):
        assert score_task(prompt, extract_answer(LAST_INTEGER, solve(prompt))) == 1.0, (prompt.task, solve(prompt))


def test_a_chain_sum_is_worked_from_left_to_right() -> None:
    prompt = Prompt("p", [], "130", {"metadata": {"expression": "98 - 193 + 225"}})
    assert worked.chain_sum(prompt) == "98 - 193 = -95\n-95 + 225 = 130"


def test_a_running_sum_numbers_its_lines_as_the_terms() -> None:
    prompt = Prompt("p", [], "89", {"metadata": {"terms": [47, 12, 30]}})
    assert worked.running_sum(prompt) == "1: 47\n2: 47 + 12 = 59\n3: 59 + 30 = 89"

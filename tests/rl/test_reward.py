"""Reward functions: parity with the libraries behind them, extraction, and the ways a configuration is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from configs.errors import ConfigError, DataError
from configs.schema import RewardConfig
from rl.plain import from_plain, to_plain
from rl.reward import build_rewards, check_prompt, check_rewards, extract_answer
from rollout.types import Prompt, Rollout, SpecStats


def rollout(text: str) -> Rollout:
    spec = SpecStats(forwards=1, proposed=0, accepted=0)
    return Rollout("p", 0, [1, 2], [-0.5, -0.25], [(0, 2)], "stop", spec, text)


def score(name: str, prompt: Prompt, text: str, **options: Any) -> float:
    return build_rewards(RewardConfig(functions={name: 1.0}, **options))[name](prompt, rollout(text))


def prompt_of(name: str, entry: dict[str, Any]) -> Prompt:
    """The prompt rl.tasks makes of an entry, after a journey through JSON."""
    task = {"question": entry["question"], "name": name, "options": {}, "metadata": to_plain(entry["metadata"])}
    if not isinstance(entry["answer"], str):
        task["entry_answer"] = to_plain(entry["answer"])
    return Prompt("p", [1], entry["answer"] or "", json.loads(json.dumps(task)))


# chain_sum and word_sorting give partial credit; graph_color has no single answer and integer keys in its metadata;
# complex_arithmetic and advanced_geometry have tuples, knights_knaves numpy strings
@pytest.mark.parametrize(
    "name",
    [
        "chain_sum",
        "word_sorting",
        "countdown",
        "graph_color",
        "complex_arithmetic",
        "advanced_geometry",
        "knights_knaves",
    ],
)
def test_the_task_reward_is_reasoning_gyms_own_score(name: str) -> None:
    task = reasoning_gym.create_dataset(name, seed=7, size=4)
    seen = set()
    for index in range(4):
        entry = task[index]
        answers = ["", "nonsense", str(entry["answer"]), f"{entry['answer']} or so", "3 + 4", '{"0": 1, "1": 2}']
        if name == "graph_color":
            answers.append(json.dumps(entry["metadata"]["possible_answer"]))
        for answer in answers:
            expected = task.score_answer(answer.strip(), entry)
            assert score("task", prompt_of(name, entry), f"So <answer>{answer}</answer>") == expected
            seen.add(expected)
    assert len(seen) > 1


def test_partial_credit_is_kept() -> None:
    task = reasoning_gym.create_dataset("chain_sum", seed=7, size=1)
    entry = task[0]
    assert 0 < score("task", prompt_of("chain_sum", entry), f"the sum is {entry['answer']}") < 1


def test_an_answer_the_scorer_chokes_on_earns_nothing() -> None:
    entry = reasoning_gym.create_dataset("prime_factorization", seed=7, size=1)[0]
    prompt = prompt_of("prime_factorization", entry)
    assert score("task", prompt, "no idea") == 0
    assert score("task", prompt, entry["answer"]) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        score("task", Prompt("p", [1], "a reference as bad", prompt.task), "no idea")


def test_the_task_reward_needs_a_task() -> None:
    with pytest.raises(ValueError, match="comes from no reasoning-gym task"):
        score("task", Prompt("p", [1], "1", {"question": "?"}), "1")


@pytest.mark.parametrize(
    ("name", "told"),
    [("task", "comes from no reasoning-gym task; use the reward 'math'"), ("code", "not a list of statements")],
)
def test_a_row_with_nothing_to_score_by_is_told_of_before_it_is_answered(name: str, told: str) -> None:
    row = Prompt("rows.jsonl:14", [1], "1", {"question": "?"})
    with pytest.raises(DataError, match=f"reward.functions: '{name}' cannot score prompt 'rows.jsonl:14': .*{told}"):
        check_prompt(RewardConfig(functions={name: 1.0}), row)
    check_prompt(RewardConfig(functions={name: 1.0}, on_error="zero"), row)  # it counts as zero, as was asked for
    check_prompt(RewardConfig(functions={"math": 1.0}), row)


def test_entries_exported_by_reasoning_gym_name_their_task() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=7, size=1)[0]
    prompt = Prompt("p", [1], entry["answer"], {"question": entry["question"], "metadata": to_plain(entry["metadata"])})
    assert score("task", prompt, entry["answer"]) == 1


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        ("0.5", r"\frac{1}{2}", 1),
        (r"\frac{1}{2}", "1/3", 0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("1,234", "1234", 1),
        ("(1, 2)", "(1, 2)", 1),
        (r"\{1, 3\}", r"\{3, 1\}", 1),
        ("x^2 + 2x + 1", "(x + 1)^2", 1),
        ("7", r"Hence $\boxed{7}$.", 1),
        ("7", "", 0),
        ("50\\%", "0.5", 1),
    ],
)
def test_math_answers_are_compared_as_mathematics(reference: str, answer: str, expected: float) -> None:
    assert score("math", Prompt("p", [1], reference), f"<answer>{answer}</answer>") == expected


def test_math_reads_a_whole_response_without_tags() -> None:
    assert score("math", Prompt("p", [1], "7"), "Adding 3 and 4 gives $3 + 4 = 7$, so the result is $7$.") == 1


def test_a_reference_that_is_no_mathematics_is_an_error() -> None:
    with pytest.raises(ValueError, match="the reference answer '' is no mathematical expression"):
        score("math", Prompt("p", [1], ""), "7")


def test_the_format_must_match_in_full() -> None:
    prompt = Prompt("p", [1], "")
    assert score("format", prompt, "I think\n<answer>7</answer>\n") == 1
    assert score("format", prompt, "<answer>7</answer> I think") == 0
    assert score("format", prompt, "7", format=r"\d") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 1 </answer> no, <answer>\n2\n</answer>", "2"),
        (" just 3 ", "just 3"),
        ("<answer>4", "<answer>4"),
        ("<answer></answer>", ""),
    ],
)
def test_the_last_answer_counts_and_without_one_the_whole_text(text: str, expected: str) -> None:
    assert extract_answer(re.compile(RewardConfig().answer), text) == expected
    assert extract_answer(re.compile(r"(?s)<answer>(.*?)</answer>"), text) == expected


def test_plain_values_come_back_equal() -> None:
    from decimal import Decimal
    from fractions import Fraction

    import numpy as np

    value = {
        "nested": [(1, (2.5, None)), {3, 1}, frozenset({"a"})],
        "keys": {1: "one", (2, 3): True, "$tuple": []},
        "numbers": [Decimal("1.10"), Fraction(1, 3), np.int64(4), np.str_("s")],
    }
    there_and_back = from_plain(json.loads(json.dumps(to_plain(value))))
    assert there_and_back == value
    assert type(there_and_back["numbers"][0]) is Decimal
    with pytest.raises(TypeError, match="a complex cannot"):
        to_plain([1j])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functions": {"maths": 1.0}}, "reward 'maths' is unknown; did you mean 'math'"),
        ({"functions": {}}, "reward.functions is empty"),
        ({"functions": {"absent_module:f": 1.0}}, "reward 'absent_module:f': cannot import 'absent_module'"),
        ({"functions": {"json:absent": 1.0}}, "module 'json' has no function 'absent'"),
        ({"functions": {"faulty:f": 1.0}}, "cannot import 'faulty': ZeroDivisionError: division by zero"),
        ({"functions": {"fatal:f": 1.0}}, "the reward worker did not start: exited with code 3: farewell;"),
        ({"format": "("}, "reward.format='(' is no regular expression"),
        ({"answer": "a"}, "reward.answer='a' has no group 1"),
    ],
)
def test_wrong_rewards_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    (tmp_path / "fatal.py").write_text("import os\nprint('farewell', flush=True)\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_rewards(RewardConfig(**options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_in_the_working_folder_is_found_and_stays_out_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward.py").write_text("def f(prompt, rollout):\n    return 1\n")
    (tmp_path / "rl").mkdir()  # a project of the user's may have a package called like ours
    (tmp_path / "rl" / "__init__.py").write_text("raise ImportError('not Paceline')")
    monkeypatch.chdir(tmp_path)
    check_rewards(RewardConfig(functions={"my_reward:f": 1.0}))
    assert "my_reward" not in sys.modules


def test_rewards_need_no_torch() -> None:
    code = (
        "import sys, rl.worker; from configs.schema import RewardConfig; from rl.reward import build_rewards\n"
        "build_rewards(RewardConfig(functions={'task': 1.0, 'math': 1.0})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

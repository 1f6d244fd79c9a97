"""Reward functions by name. Runs in a worker process (rl/worker.py), which never imports torch."""

import json
import logging
import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, DataError
from configs.schema import RewardConfig
from rl.cell import check_sandbox
from rl.code import CodeReward, parse_tests
from rl.plain import from_plain
from rl.process import Worker
from rollout.types import Prompt, Rollout

if TYPE_CHECKING:
    from rl.tasks import Task

RewardFunction = Callable[[Prompt, Rollout], float]
BUILT_IN = ("task", "math", "format", "code")
IMPORTS = {"task": "rl.tasks", "math": "math_verify"}  # slow ones, made before the first request
DOLLAR_OR_BOXED = re.compile(r"\$|\\boxed|\\\(|\\\[")


def build_rewards(config: RewardConfig) -> dict[str, RewardFunction]:
    """The configured functions by name; "code" starts its sandbox.

    Raises ConfigError for an unknown name, module, function or bad pattern, PreflightError without a sandbox.
    """
    if not config.functions:
        raise ConfigError(f"reward.functions is empty; name at least one of {', '.join(BUILT_IN)} or module:function")
    answer = _pattern("reward.answer", config.answer)
    if answer.groups < 1:
        raise ConfigError(f"reward.answer={config.answer!r} has no group 1; put the answer in parentheses")
    layout = _pattern("reward.format", config.format)
    built_in: dict[str, RewardFunction] = {
        "task": lambda prompt, rollout: score_task(prompt, extract_answer(answer, rollout.text)),
        "math": lambda prompt, rollout: score_math(prompt, extract_answer(answer, rollout.text)),
        "format": lambda prompt, rollout: float(layout.fullmatch(rollout.text) is not None),
    }
    if "code" in config.functions:
        built_in["code"] = CodeReward(config)
    for name in config.functions.keys() & IMPORTS.keys():
        import_module(IMPORTS[name])
    return {name: _finite(built_in.get(name) or import_function(name)) for name in config.functions}


def check_rewards(config: RewardConfig) -> None:
    """Raises ConfigError unless a worker can load every function, PreflightError where "code" finds no sandbox.

    Nothing is imported into this process.
    """
    if "code" in config.functions:
        check_sandbox(config.sandbox)
    Worker(config).close()


def extract_answer(pattern: re.Pattern[str], text: str) -> str:
    """Group 1 of the last match, stripped; without a match, the whole text."""
    last = None
    for match in pattern.finditer(text):
        last = match
    answer = text if last is None or last[1] is None else last[1]
    return answer.strip()


def check_prompt(config: RewardConfig, prompt: Prompt) -> None:
    """Raise DataError for a prompt with nothing to score by, where that would stop the run at its first rollout."""
    if config.on_error == "zero":
        return
    needed: dict[str, Callable[[], object]] = {
        "task": lambda: _task_of(prompt),
        "code": lambda: parse_tests(prompt.task.get("tests")),
    }
    for name, look in needed.items():
        if name not in config.functions:
            continue
        try:
            look()
        except ValueError as error:
            raise DataError(f"reward.functions: {name!r} cannot score prompt {prompt.id!r}: {error}") from error


def score_task(prompt: Prompt, answer: str) -> float:
    """reasoning-gym's own score of the answer, in its own scale (partial credit included)."""
    name, metadata = _task_of(prompt)
    oracle = from_plain(prompt.task["entry_answer"]) if "entry_answer" in prompt.task else prompt.answer
    entry = {"question": prompt.task["question"], "answer": oracle, "metadata": metadata}
    task = _scorer(name, json.dumps(prompt.task.get("options", {})))
    try:
        return float(task.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception:
        # A few scorers raise on text they cannot read ("x" for prime_factorization), which earns nothing.
        # A scorer that raises on the reference as well is broken, and says so here.
        task.score_answer(oracle, entry)
        return 0.0


def _task_of(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """The reasoning-gym task a prompt comes from, and what its scorer reads. Raises ValueError for one of none."""
    metadata = from_plain(prompt.task.get("metadata", {}))
    name = prompt.task.get("name", metadata.get("source_dataset"))
    if name is None:
        raise ValueError("the prompt comes from no reasoning-gym task; use the reward 'math' or module:function")
    return name, metadata


@cache
def _scorer(name: str, options: str) -> "Task":
    from rl.tasks import create_task

    # some scorers read their generator's options
    return create_task(name, json.loads(options), seed=0, size=1)


def score_math(prompt: Prompt, answer: str) -> float:
    """1 when math-verify finds the answer equal to the reference, else 0. Raises ValueError for a bad reference."""
    from math_verify import verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    gold = _parse_math(prompt.answer)
    if not gold:
        raise ValueError(f"the reference answer {prompt.answer!r} is no mathematical expression")
    # no time limits of its own: they are SIGALRM handlers, and the worker is killed anyway
    return float(verify(gold, _parse_math(answer), timeout_seconds=None))


def _parse_math(text: str) -> list[object]:
    """What math-verify reads in the text, [] for nothing; text with no mathematics marked is taken as one formula."""
    from math_verify import parse

    marked = text if DOLLAR_OR_BOXED.search(text) else f"${text}$"
    parsed: list[object] = parse(marked, parsing_timeout=None)
    return parsed


def import_function(name: str) -> RewardFunction:
    """The function named "module:function". Raises ConfigError when there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        close = get_close_matches(name, BUILT_IN, n=1, cutoff=0)[0]
        raise ConfigError(f"reward {name!r} is unknown; did you mean {close!r}, or a module:function?")
    try:
        function = getattr(import_module(module), attribute, None)
    # importing runs the user's code, which may raise anything
    except Exception as error:
        raise ConfigError(f"reward {name!r}: cannot import {module!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward {name!r}: module {module!r} has no function {attribute!r}")
    return function


def _finite(function: RewardFunction) -> RewardFunction:
    """The function, raising TypeError or ValueError where it returns anything but a finite number."""

    def checked(prompt: Prompt, rollout: Rollout) -> float:
        value = function(prompt, rollout)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"returned {value!r:.80}, not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"returned {number}, not a finite number")
        return number

    return checked


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{key}={text!r} is no regular expression: {error}") from error

"""The reward of programs: a response's code block is run, confined, against its problem's tests."""

import io
import json
import re
import time
from decimal import Decimal, InvalidOperation
from itertools import zip_longest
from typing import Any

from configs.errors import PreflightError
from configs.schema import RewardConfig
from rl.cell import Cell, CellError, check_sandbox
from rollout.types import Prompt, Rollout

BLOCK = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)
TIME_SHARE = 0.8  # of reward.timeout_s for all tests of a program; the rest is for starting it and telling
LONGEST_NUMBERS = 64  # times as long as expected is what may still be the same numbers, written in another way

Pair = tuple[str, str]  # what a program reads, and what it must write


class CodeReward:
    """A warm cell, and the share of a prompt's tests that a response passes in it (or 1 for all and 0 for less)."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises PreflightError where no sandbox works, or not the chosen one."""
        self._config = config
        kind = check_sandbox()[0] if config.sandbox == "auto" else config.sandbox
        try:
            self._cell = Cell(kind, memory_mb=config.memory_mb)
        except CellError as error:
            raise PreflightError(f"reward.sandbox={kind} does not start: {error}; see paceline doctor") from error

    def __call__(self, prompt: Prompt, rollout: Rollout) -> float:
        """Raises ValueError for tests that cannot be run. Ends this process where the cell is lost.

        A program that takes the cell with it costs a worker, which the pool replaces, and earns nothing.
        """
        tests = parse_tests(prompt.task.get("tests"))
        program = extract_program(rollout.text)
        if program is None:
            return 0.0
        deadline = time.monotonic() + TIME_SHARE * self._config.timeout_s
        try:
            passed = self._passed(program, tests, deadline)
        except CellError as error:
            raise SystemExit(f"the sandbox is lost: {error}") from error
        return passed / len(tests) if self._config.tests == "share" else float(passed == len(tests))

    def _passed(self, program: str, tests: list[str] | list[Pair], deadline: float) -> int:
        """How many tests pass before the deadline; for reward.tests=all, before one fails."""
        go_on = self._config.tests == "share"
        if isinstance(tests[0], str):  # all are
            left_s = deadline - time.monotonic()
            return sum(self._cell.call(program, tests, timeout_s=left_s, go_on=go_on))
        num_passed = 0
        for given, expected in tests:
            left_s = deadline - time.monotonic()
            output = self._cell.feed(program, given, timeout_s=left_s) if left_s > 0 else None
            if output is not None and same_output(output, expected):
                num_passed += 1
            elif not go_on:
                break
        return num_passed


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are equal line by line, but for white space at the ends and the way numbers are written."""
    # one line at a time: a program may write millions
    ours, theirs = (map(str.strip, io.StringIO(text.strip(), newline=None)) for text in (output, expected))
    return all(_same_line(line, other) for line, other in zip_longest(ours, theirs))


def _same_line(line: str | None, expected: str | None) -> bool:
    """None: there is no such line."""
    if line == expected:
        return True
    if line is None or expected is None or len(line) > LONGEST_NUMBERS * (1 + len(expected)):
        return False
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in expected.split()]
    except InvalidOperation:
        return False


def extract_program(text: str) -> str | None:
    """The last fenced block that is marked as Python or not marked at all; None without one."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else None


def parse_tests(value: Any) -> list[str] | list[Pair]:
    """A row's tests, which may also be JSON text of: Python statements, {"input", "output"} pairs, or one
    {"inputs": [...], "outputs": [...]}. Raises ValueError for anything else, and for none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"tests are no JSON: {error}") from error
    match value:
        case {"inputs": [*inputs], "outputs": [*outputs]} if len(inputs) == len(outputs) and "fn_name" not in value:
            value = [{"input": given, "output": output} for given, output in zip(inputs, outputs, strict=True)]
        case [*_]:
            pass
        case _:
            raise ValueError(f"tests are {value!r:.80}, not a list of statements or of input and output")
    if not value:
        raise ValueError("there are no tests")
    if all(isinstance(test, str) for test in value):
        return list(value)
    pairs: list[Pair] = []
    for test in value:
        match test:
            case {"input": str(given), "output": str(output)}:
                pairs.append((given, output))
            case _:
                raise ValueError(f"among statements or pairs of texts (input, output) there is the test {test!r:.80}")
    return pairs

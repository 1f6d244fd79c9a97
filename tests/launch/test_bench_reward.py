"""paceline bench reward: it finds its sandboxes sound, scores what it times, and shows every side."""

import pytest

from configs.errors import ConfigError, PreflightError
from launch.bench_reward import TESTS, Job, run, table
from rl.cell import check_sandbox


def test_every_side_is_timed_and_shown() -> None:
    try:
        kind, _ = check_sandbox()
    except PreflightError as error:
        pytest.skip(str(error))
    result = run(Job(workers=(1, 2), sandboxes=(kind,), rewards=4, rounds=1))
    assert [(row["tests"], row["sandbox"], row["workers"]) for row in result["rows"]] == [
        (tests, *side) for tests in TESTS for side in (("a Python start a test", 1), (kind, 1), (kind, 2))
    ]
    assert all(row["per_second"]["median"] > 0 for row in result["rows"])
    assert table(result).row_count == len(result["rows"])


def test_an_unknown_sandbox_is_refused() -> None:
    with pytest.raises(ConfigError, match="names 'jail'"):
        run(Job(workers=(1,), sandboxes=("jail",), rewards=1, rounds=1))

"""What the page draws of a run's lines."""

from typing import Any

import pytest

from launch.monitor.drawing import curve_columns


def point(at: float, *strategies: str, first: int | None) -> dict[str, Any]:
    """A line of the curve: workers from a number on, or lines of a version that told none."""
    workers = [{"running": 1, "waiting": 0, "strategy": name} for name in strategies]
    if first is not None:
        workers = [{"worker": first + place, **worker} for place, worker in enumerate(workers)]
    return {"time": at, "finished": 0, "total": 4, "tokens": 0, "workers": workers}


@pytest.mark.parametrize(("first", "numbers"), [(2, (2, 3)), (0, (0, 1)), (None, (0, 1))])
def test_strategies_stand_under_the_workers_that_errors_name(first: int | None, numbers: tuple[int, int]) -> None:
    lines = [point(5.0, "off", "off", first=first), point(6.0, "suffix d4", "off", first=first)]
    lines.append(point(8.0, "suffix d4", "off", first=first))
    here, there = numbers
    assert curve_columns(lines)["strategies"] == [
        [here, 0.0, 1.0, "off"],
        [here, 1.0, 3.0, "suffix d4"],
        [there, 0.0, 3.0, "off"],
    ]

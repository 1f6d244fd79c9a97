"""What a step's clock says of its phases and of the rollouts' tail."""

import pytest

from rl import metrics
from rl.metrics import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the last number of this list."""
    times = [0.0]
    monkeypatch.setattr(metrics, "perf_counter", lambda: times[-1])
    return times


def test_the_tail_runs_from_the_rollout_that_makes_nine_in_ten_to_the_last(clock: list[float]) -> None:
    watch = Stopwatch()
    for second in range(1, 20):
        clock.append(float(second))
        watch.arrived()
    clock.append(50.0)
    watch.arrived()
    assert watch.tail() == 50.0 - 18.0  # 18 of 20
    assert watch.record()["seconds_tail"] == 32.0


@pytest.mark.parametrize("arrivals", [0, 1])
def test_there_is_no_tail_without_a_second_rollout(clock: list[float], arrivals: int) -> None:
    watch = Stopwatch()
    clock.append(3.0)
    for _ in range(arrivals):
        watch.arrived()
    assert watch.tail() == 0.0


def test_a_phase_entered_twice_adds_up(clock: list[float]) -> None:
    watch = Stopwatch()
    for end in (2.0, 7.0):
        with watch.phase("train"):
            clock.append(end)
    assert watch.record() == {"seconds_train": 7.0, "seconds_tail": 0.0, "seconds": 7.0}

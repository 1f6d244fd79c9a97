"""When the difference between training and rollout is said, and where."""

from types import SimpleNamespace
from typing import Any

import pytest

from rl.drift import DriftAlarm


def test_each_level_is_said_once_when_it_is_crossed() -> None:
    alarm = DriftAlarm()
    seen = [alarm.crossed(value) for value in (0.001, 0.006, 0.007, 0.02, 0.03, 0.006, 0.02, 0.001, 0.02)]
    assert seen == [None, "warn", None, "alarm", None, None, "alarm", None, "alarm"]


@pytest.mark.parametrize(("value", "level"), [(0.005, None), (0.0051, "warn"), (0.01, "warn"), (0.0101, "alarm")])
def test_a_level_is_crossed_above_its_limit(value: float, level: str | None) -> None:
    assert DriftAlarm().crossed(value) == level


def test_a_crossing_is_an_event_and_a_message() -> None:
    events: list[dict[str, Any]] = []
    messages: list[str] = []
    run = SimpleNamespace(append_event=lambda kind, **about: events.append({"event": kind} | about))
    progress = SimpleNamespace(message=messages.append)
    alarm = DriftAlarm()
    for step, difference in enumerate((0.001, 0.02, 0.03), start=1):
        alarm.check(difference, step, run, progress)  # type: ignore[arg-type]
    assert events == [{"event": "drift", "step": 2, "level": "alarm", "prob_diff_mean": 0.02, "limit": 0.01}]
    (message,) = messages
    assert message.startswith("alarm: ") and "0.0200" in message and "step 2" in message


def test_a_step_without_a_dense_forward_to_compare_with_says_nothing() -> None:
    alarm = DriftAlarm()
    alarm.check(None, 1, None, None)  # type: ignore[arg-type]
    assert alarm.crossed(0.02) == "alarm"

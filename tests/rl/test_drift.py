"""When the difference between training and rollout is said."""

import pytest

from rl.drift import DriftAlarm


def test_each_level_is_said_once_when_it_is_crossed() -> None:
    alarm = DriftAlarm()
    seen = [alarm.crossed(value) for value in (0.001, 0.006, 0.007, 0.02, 0.03, 0.006, 0.02, 0.001, 0.02)]
    assert seen == [None, "warn", None, "alarm", None, None, "alarm", None, "alarm"]


@pytest.mark.parametrize(("value", "level"), [(0.005, None), (0.0051, "warn"), (0.01, "warn"), (0.0101, "alarm")])
def test_a_level_is_crossed_above_its_limit(value: float, level: str | None) -> None:
    assert DriftAlarm().crossed(value) == level

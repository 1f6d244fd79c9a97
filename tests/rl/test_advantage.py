import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantage import group_advantages

rewards_lists = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


def test_known_group_is_centred_and_scaled() -> None:
    assert group_advantages([0.0, 0.0, 0.0, 1.0], "mean") == [-0.25, -0.25, -0.25, 0.75]
    scale = math.sqrt(3) / 4
    assert group_advantages([0.0, 0.0, 0.0, 1.0], "std") == pytest.approx([-0.25 / scale] * 3 + [0.75 / scale])


@pytest.mark.parametrize("kind", ["std", "mean"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3])
def test_group_of_equal_rewards_teaches_nothing(kind: Literal["std", "mean"], reward: float) -> None:
    assert group_advantages([reward] * 7, kind) == [0.0] * 7
    assert group_advantages([reward], kind) == [0.0]


@given(rewards_lists.filter(lambda rewards: max(rewards) - min(rewards) > 1e-3))
def test_advantages_have_mean_zero_and_with_std_unit_deviation(rewards: list[float]) -> None:
    centred, scaled = group_advantages(rewards, "mean"), group_advantages(rewards, "std")
    assert sum(centred) == pytest.approx(0, abs=1e-9)
    assert math.fsum(value**2 for value in scaled) / len(scaled) == pytest.approx(1)
    for values in (centred, scaled):
        assert all(
            values[i] <= values[j] for i in range(len(rewards)) for j in range(len(rewards)) if rewards[i] < rewards[j]
        )


def test_tiny_differences_do_not_underflow() -> None:
    assert group_advantages([0.0, 1e-200], "std") == pytest.approx([-1.0, 1.0])

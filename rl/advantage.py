"""How much better a rollout did than its siblings."""

from math import hypot, sqrt
from typing import Literal


def group_advantages(rewards: list[float], kind: Literal["std", "mean"]) -> list[float]:
    """Centre a group's rewards by their mean and, with "std", divide by their population standard deviation.

    A group whose rewards are all equal teaches nothing: its advantages are exactly zero.
    Source: GRPO, "std" (DeepSeekMath, arXiv 2402.03300, sec. 4.1); Dr. GRPO, "mean" (arXiv 2503.20783, sec. 3.1).
    """
    # the rounded mean of equal rewards need not equal them, and dividing by such a deviation would make noise of it
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if kind == "mean":
        return centred
    deviation = hypot(*centred) / sqrt(len(centred))
    return [value / deviation for value in centred]

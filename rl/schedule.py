"""How a learning rate goes over the steps of a run."""

from math import cos, pi
from typing import Literal, Protocol


class Schedule(Protocol):
    """What TrainConfig and WarmstartConfig both say about it."""

    @property
    def lr(self) -> float:
        """The highest rate."""

    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]:
        """How it falls."""

    @property
    def warmup_steps(self) -> int:
        """Steps in which it rises to lr first."""


def learning_rate(config: Schedule, step: int, total_steps: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then constant, or falling to 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - done)
        case "cosine":
            return config.lr * (1 + cos(pi * done)) / 2

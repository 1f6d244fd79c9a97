"""A task with a long tail: sums of few or very many numbers, so that answers are short or very long.

The terms are numbered, and so are the lines of a worked answer (rl/worked.py), each a look-up and one addition: what is
hard about a long sum is its length alone.
"""

import random
from dataclasses import dataclass
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import register_dataset

NAME = "running_sum"


@dataclass
class RunningSumConfig:
    """Options of the task. The number of terms N has P(N >= n) falling as n to the power of -tail, cut at max_terms."""

    min_terms: int = 2
    max_terms: int = 150
    tail: float = 0.5
    min_value: int = 1
    max_value: int = 9
    seed: int = 0
    size: int = 500

    def validate(self) -> None:
        """Raises ValueError for options that describe no sum."""
        if not 1 <= self.min_terms <= self.max_terms:
            raise ValueError(f"min_terms={self.min_terms} must be from 1 to max_terms={self.max_terms}")
        if not 0 <= self.min_value <= self.max_value:
            raise ValueError(f"min_value={self.min_value} must be from 0 to max_value={self.max_value}")
        if self.tail <= 0:
            raise ValueError(f"tail={self.tail} must be greater than 0; smaller is heavier")


class RunningSum(ProceduralDataset):
    """Row i: numbered terms to add; the answer is their sum."""

    def __init__(self, config: RunningSumConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Row `idx`, from the seed and idx alone."""
        config, rng = self.config, random.Random(self.seed + idx)
        num_terms = heavy_tailed(rng.random(), low=config.min_terms, high=config.max_terms, tail=config.tail)
        terms = [rng.randint(config.min_value, config.max_value) for _ in range(num_terms)]
        listed = "\n".join(f"{number}: {term}" for number, term in enumerate(terms, 1))
        return {
            "question": f"Add these numbers one by one, keeping the running sum.\n{listed}",
            "answer": str(sum(terms)),
            "metadata": {"source_dataset": NAME, "source_index": idx, "terms": terms},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1 for the sum, else 0: half of a sum's digits are worth nothing."""
        return float(answer == entry["answer"])


def heavy_tailed(uniform: float, *, low: int, high: int, tail: float) -> int:
    """The quantile of a Pareto distribution with exponent `tail`, cut to low <= n <= high, at uniform in [0, 1)."""
    first, last = low**-tail, (high + 1) ** -tail
    length = int((first - uniform * (first - last)) ** (-1 / tail))
    return min(high, max(low, length))  # rounding may leave the bounds


register_dataset(NAME, RunningSum, RunningSumConfig)

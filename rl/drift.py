"""Whether the policy that learns is still the one that sampled: the alarm on their difference.

The mean difference of a sampled token's probability in training and in rollout is the noise of two batch shapes where
all is well: in bfloat16 0.0001 to 0.005 on an H100, up to 0.008 on a CPU (docs/results). Above it, what training takes
for the policy's own samples is another's.
"""

LEVELS = {"warn": 0.005, "alarm": 0.01}  # by StepStats.prob_diff_mean, in ascending order


class DriftAlarm:
    """Sounds once when the difference crosses a level, and again only after it was below."""

    def __init__(self) -> None:
        self._level = ""

    def crossed(self, prob_diff_mean: float) -> str | None:
        """The level that this step's difference has risen above; None where it has not risen above another."""
        levels = ["", *LEVELS]
        reached = next((level for level in reversed(LEVELS) if prob_diff_mean > LEVELS[level]), "")
        before, self._level = self._level, reached
        return reached if levels.index(reached) > levels.index(before) else None

"""Whether the policy that learns is still the one that sampled: the alarm on their difference.

The mean difference of a sampled token's probability in training and in rollout is the noise of two batch shapes where
all is well: in bfloat16 0.0001 to 0.005 on an H100, up to 0.008 on a CPU (docs/results). Above it, what training takes
for the policy's own samples is another's.
Rollouts that were sampled under sparse attention are meant to be another's: what is compared then is the dense forward
that rectified them, and nothing where none did.
"""

from typing import TYPE_CHECKING

from rl.rundir import RunDir

if TYPE_CHECKING:
    from rl.metrics import Progress  # it imports torch, which whoever only reads the levels does without

LEVELS = {"warn": 0.005, "alarm": 0.01}  # by StepStats.prob_diff_mean, in ascending order


class DriftAlarm:
    """Sounds once when the difference crosses a level, and again only after it was below."""

    def __init__(self) -> None:
        self._level = ""

    def check(self, prob_diff_mean: float | None, step: int, run: RunDir, progress: "Progress") -> None:
        """Say so, in the run's events and on the terminal, where a step's difference crosses a level.

        None: there is nothing to compare in this step.
        """
        if prob_diff_mean is None or (level := self.crossed(prob_diff_mean)) is None:
            return
        limit = LEVELS[level]
        run.append_event("drift", step=step, level=level, prob_diff_mean=prob_diff_mean, limit=limit)
        progress.message(
            f"{level}: training and rollout give sampled tokens probabilities that differ by {prob_diff_mean:.4f} on"
            f" average at step {step}, more than {limit}; docs/running.md says why"
        )

    def crossed(self, prob_diff_mean: float) -> str | None:
        """The level that this step's difference has risen above; None where it has not risen above another."""
        levels = ["", *LEVELS]
        reached = next((level for level in reversed(LEVELS) if prob_diff_mean > LEVELS[level]), "")
        before, self._level = self._level, reached
        return reached if levels.index(reached) > levels.index(before) else None

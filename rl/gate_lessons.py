"""When gates learn in a run, and what is kept of them: between a step's rollouts and the policy's update.

A lesson is as long as the samples that rollout.gate_sampler kept, some hundreds at most. The gates that a run started
from stay as they are in their folder; those it serves stand in its checkpoints.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from drafter.gate_checkpoint import read_gates, write_gates
from drafter.gate_learner import GateJudgement, GateLearner
from drafter.sealed import write_tensors
from rollout.engine import NativeEngine
from rollout.gate_selector import GateSelector

LR = 1e-3  # as published
TRAINING = "training.safetensors"  # the trained copy and its optimiser, beside the gates that are served


@dataclass(frozen=True, slots=True)
class Learned:
    """What a lesson learned from. losses: of the updates that were applied."""

    num_samples: int
    losses: tuple[float, ...]


class GateLessons:
    """A run's lessons for the gates that an engine drafts by; or one worker's part in them."""

    def __init__(self, engine: NativeEngine) -> None:
        assert engine.sparse is not None and engine.sparse.sampler is not None
        selectors = [part.selector for part in engine.sparse.parts]
        gates = next(each.gates for each in selectors if isinstance(each, GateSelector))  # all parts' are the same
        self._model_config = engine.model_config
        self._sampler = engine.sparse.sampler
        self.learner = GateLearner(
            gates,
            lr=LR,
            budget_blocks=self._sampler.budget_blocks,
            announce=engine.gates_changed,
        )

    def take(self) -> dict[str, Any]:
        """A step's lesson, no sequence running; its figures. What is served afterwards is better, or as before."""
        begun = perf_counter()
        learned = self.learn()
        judgement = self.learner.settle()
        return gate_record([learned], judgement, self.learner.version) | {"gate_s": perf_counter() - begun}

    def learn(self) -> Learned:
        """Learn from what was sampled since the last lesson."""
        samples = self._sampler.take()
        return Learned(len(samples), tuple(stats.loss for stats in self.learner.learn(samples) if stats.applied))

    def save(self, folder: Path, *, base_model: str) -> None:
        """Make this folder: the gates served, for sparse.gate, and what is learned on from. Raises OSError.

        base_model: what others call the policy.
        """
        folder.mkdir()
        served = self.learner.served
        try:
            write_gates(
                folder,
                served,
                model_config=self._model_config,
                base_model=base_model,
                dtype=served.query_weight.dtype,
            )
        except (SafetensorError, RuntimeError) as error:  # what safetensors and torch make of a disk that refuses
            raise OSError(errno.EIO, str(error), str(folder)) from error
        state = {name: tensor.detach().cpu() for name, tensor in self.learner.state_dict().items()}
        write_tensors(folder / TRAINING, state)

    def load(self, folder: Path) -> None:
        """Take up what save wrote, bit for bit. Raises PreflightError for gates of another shape."""
        self.learner.load_state_dict(load_file(folder / TRAINING), read_gates(folder, self._model_config))


def gate_record(lessons: Sequence[Learned], judgement: GateJudgement | None, version: int) -> dict[str, Any]:
    """The gates' part of a step's record, of all workers' lessons; what was not measured is left out."""
    losses = [loss for lesson in lessons for loss in lesson.losses]
    record: dict[str, Any] = {
        "gate_samples": sum(lesson.num_samples for lesson in lessons),
        "gate_updates": len(losses),
        "gate_version": version,
    }
    if losses:
        record["gate_loss"] = sum(losses) / len(losses)
    if judgement is not None and judgement.outcome != "open":
        record |= {
            "gate_recall": judgement.trained.recall,
            "gate_served_recall": judgement.served.recall,
            "gate_outcome": judgement.outcome,
        }
    return record

"""When gates learn in a run, and what is kept of them: between a step's rollouts and the policy's update.

A lesson is as long as the samples that rollout.gate_sampler kept, some hundreds at most. The gates that a run started
from stay as they are in their folder; those it serves stand in its checkpoints.
"""

import errno
from pathlib import Path
from time import perf_counter
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from drafter.gate_checkpoint import read_gates, write_gates
from drafter.gate_learner import GateLearner
from drafter.sealed import write_tensors
from rollout.engine import NativeEngine
from rollout.gate_selector import GateSelector

LR = 1e-3  # as published
TRAINING = "training.safetensors"  # the trained copy and its optimiser, beside the gates that are served


class GateLessons:
    """A run's lessons for the gates that its engine drafts by."""

    def __init__(self, engine: NativeEngine, *, base_model: str) -> None:
        """base_model: what others call the policy."""
        assert engine.sparse is not None and engine.sparse.sampler is not None
        assert isinstance(engine.sparse.selector, GateSelector)
        self._engine = engine
        self._base_model = base_model
        self._sampler = engine.sparse.sampler
        served = engine.sparse.selector.gates
        self.learner = GateLearner(served, lr=LR, budget_blocks=self._sampler.budget_blocks)

    def take(self) -> dict[str, Any]:
        """A step's lesson, no sequence running; its figures. What is served afterwards is better, or as before."""
        begun = perf_counter()
        samples = self._sampler.take()
        applied = [stats for stats in self.learner.learn(samples) if stats.applied]
        judgement = self.learner.settle()
        record: dict[str, Any] = {"gate_samples": len(samples), "gate_updates": len(applied)}
        if applied:
            record["gate_loss"] = sum(stats.loss for stats in applied) / len(applied)
        if judgement is not None:
            if judgement.outcome == "published":
                self._engine.gates_changed()
            record |= {
                "gate_recall": judgement.trained.recall,
                "gate_served_recall": judgement.served.recall,
                "gate_outcome": judgement.outcome,
            }
        return record | {"gate_s": perf_counter() - begun}

    def save(self, folder: Path) -> None:
        """Make this folder: the gates served, for sparse.gate, and what is learned on from. Raises OSError."""
        folder.mkdir()
        served = self.learner.served
        config, dtype = self._engine.model_config, served.query_weight.dtype
        try:
            write_gates(folder, served, model_config=config, base_model=self._base_model, dtype=dtype)
        except (SafetensorError, RuntimeError) as error:  # what safetensors and torch make of a disk that refuses
            raise OSError(errno.EIO, str(error), str(folder)) from error
        state = {name: tensor.detach().cpu() for name, tensor in self.learner.state_dict().items()}
        write_tensors(folder / TRAINING, state)

    def load(self, folder: Path) -> None:
        """Take up what save wrote, bit for bit. Raises PreflightError for gates of another shape."""
        served = read_gates(folder, self._engine.model_config)
        self.learner.load_state_dict(load_file(folder / TRAINING), served)
        self._engine.gates_changed()

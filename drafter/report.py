"""What a learner tells of itself, to the run and to the learners of other workers."""

from dataclasses import dataclass

import torch

from drafter.publish import Outcome


@dataclass(frozen=True, slots=True)
class LearnStats:
    """What one turn of learning did. step_s: what one more step would take, 0 while none was taken."""

    num_steps: int
    seconds: float
    step_s: float


Standing = tuple[int, str]  # version and checksum of the head served


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """How the drafter stands. Means over the steps since the report before; NaN where there were none.

    accept_length, served_accept_length: of the trained copy and of the head served, replayed on held-out features.
    off: why it learns no more, "" while it does.
    """

    num_steps: int
    loss: float
    train_accept_length: float
    accept_length: float
    served_accept_length: float
    version: int
    checksum: str
    outcome: Outcome
    buffer_tokens: int
    seconds: float
    off: str

    @property
    def standing(self) -> Standing:
        """What is served."""
        return self.version, self.checksum


@dataclass(frozen=True, slots=True)
class Replica:
    """What another worker needs to draft and to learn on as this one does, on the host.

    version: 0 where no head is served. served, last_good: {} where there is none. weights: of the trained copy.
    """

    version: int
    served: dict[str, torch.Tensor]
    last_good: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

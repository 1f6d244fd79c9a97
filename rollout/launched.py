"""A cycle that the device is at, as the host knows it until it reads the results."""

from dataclasses import dataclass

import numpy as np
import torch

from drafter.types import Strategy
from rollout.sequence import Sequence


@dataclass(slots=True)
class Launched:
    """A cycle under way: whose rows it works on, and where its results will be.

    results: [B, 3 + 3 Q] int32, pinned, valid after done; dense_logprobs: likewise, [B, Q] float32, of rectified cycles
    alone. begun: the end of the cycle before, so that the host's time counts where the device waits for it. capture_s:
    of that time, what capturing its graphs took.
    is_watched: its target ran outside of its graph, so that its time tells nothing of others'.
    """

    sequences: list[Sequence]
    texts: np.ndarray  # that they write
    strategy: Strategy
    num_rows: int
    context: float
    results: torch.Tensor
    dense_logprobs: torch.Tensor | None
    version: int
    begun: torch.cuda.Event | float
    done: torch.cuda.Event | float
    capture_s: float
    is_watched: bool

    def wait(self) -> float:
        """Block until the results are there; the seconds the cycle took."""
        if isinstance(self.done, float):
            assert isinstance(self.begun, float)
            return self.done - self.begun
        self.done.synchronize()
        assert not isinstance(self.begun, float)
        return float(self.begun.elapsed_time(self.done)) / 1e3

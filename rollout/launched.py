"""A cycle that is under way on the device, and what the host reads of it when it is over."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from configs.errors import DivergedError
from drafter.types import FeatureReader, Strategy
from kernels.cycle import RUNNING
from rollout.runner import NOT_FINITE
from rollout.sequence import Sequence
from rollout.strategy import CycleReport

COUNT, FINISH, ACCEPTED, TOKENS = 0, 1, 2, 3  # columns of CycleResult.host
Stamp = torch.cuda.Event | float  # a moment on a device


@dataclass(frozen=True, slots=True)
class Read:
    """What a cycle of Q tokens a row left, by row: tokens committed, drafted ones accepted, and why it is over.

    finish [B] and proposed [B, Q - 1]: arrays over the results' memory. tokens, logprobs, dense_logprobs: Q a row, of
    which those past counts mean nothing; dense_logprobs of rectified cycles alone.
    """

    counts: list[int]
    accepted: list[int]
    finish: np.ndarray
    proposed: np.ndarray
    tokens: list[list[int]]
    logprobs: list[list[float]]
    dense_logprobs: list[list[float]] | None


@dataclass(slots=True)
class Launched:
    """A cycle under way: whose rows it works on, and where its results will be.

    results: [B, 3 + 3 Q] int32, pinned, valid after done; dense_logprobs: likewise, [B, Q] float32, of rectified cycles
    alone. begun: the end of the cycle before, so that the host's time counts where the device waits for it. capture_s:
    of that time, what capturing its graphs took. is_watched: its target ran outside of its graph, so that its time
    tells nothing of others'.
    """

    sequences: list[Sequence]
    texts: np.ndarray  # that they write
    strategy: Strategy
    num_rows: int
    context: float
    results: torch.Tensor
    dense_logprobs: torch.Tensor | None
    version: int
    begun: Stamp
    done: Stamp
    capture_s: float
    is_watched: bool

    def wait(self) -> float:
        """Block until the results are there; the seconds the cycle took."""
        return seconds_between(self.begun, self.done)

    def read(self) -> Read:
        """The results, once they are there. Raises DivergedError where the policy's log-probs are not finite."""
        width = 1 + self.strategy.num_verify
        table = self.results[: len(self.sequences)].numpy()
        logprobs = table[:, TOKENS + width : TOKENS + 2 * width].view(np.float32)
        if not np.isfinite(logprobs).all():  # zeros follow the committed ones
            raise DivergedError(NOT_FINITE)
        return Read(
            counts=table[:, COUNT].tolist(),
            accepted=table[:, ACCEPTED].tolist(),
            finish=table[:, FINISH],
            proposed=table[:, TOKENS + 2 * width : TOKENS + 3 * width - 1],
            tokens=table[:, TOKENS : TOKENS + width].tolist(),
            logprobs=logprobs.tolist(),
            dense_logprobs=None if self.dense_logprobs is None else self.dense_logprobs.tolist(),
        )

    def tell(self, reader: FeatureReader, read: Read) -> None:
        """Tell the reader of each row that committed anything, once its sequence has it."""
        rows = np.asarray(read.counts).nonzero()[0]
        lengths = np.array([len(sequence.tokens) for sequence in self.sequences], dtype=np.int64)
        reader.committed(self.texts[rows], lengths[rows], version=self.version, finished=read.finish[rows] != RUNNING)

    def report(self, read: Read, seconds: float) -> CycleReport:
        """What it cost and brought, for the chooser."""
        strategy = self.strategy
        proposed_by_depth: list[int] = []
        accepted_by_depth: list[int] = []
        if strategy.num_verify:
            proposed_by_depth = read.proposed.sum(axis=0)[: strategy.depth].tolist()
            by_depth = np.bincount(np.asarray(read.accepted), minlength=strategy.depth + 1)
            # a row that accepted n passed levels 1 to n
            accepted_by_depth = by_depth[::-1].cumsum()[::-1][1 : strategy.depth + 1].tolist()
        return CycleReport(
            strategy=strategy,
            batch=len(self.sequences),
            bucket=self.num_rows,
            context=self.context,
            seconds=seconds,
            committed=sum(read.counts),
            proposed_by_depth=proposed_by_depth,
            accepted_by_depth=accepted_by_depth,
            rows_with_draft=int((read.proposed[:, :1] > 0).sum()) if strategy.num_verify else 0,
            capture_s=self.capture_s,
        )


def stamp(device: torch.device) -> Stamp:
    """Now, in the order of what is launched there."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begun: Stamp, done: Stamp) -> float:
    """Of two moments on one device; blocks until the second has come."""
    if isinstance(done, float):
        assert isinstance(begun, float)
        return done - begun
    done.synchronize()
    assert not isinstance(begun, float)
    return float(begun.elapsed_time(done)) / 1e3

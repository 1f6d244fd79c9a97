"""The training-time test: the head goes on from its own outputs in training, as it will have to when it drafts.

A chain begins at every position t at once. Its step 0 reads what the policy computed at t; step j, at position t + j,
reads the token there and the output of step j - 1, and attends to the step-0 keys up to t and to its own chain's.
Source: EAGLE-3 (arXiv 2503.01840), sec. 3; so the head drafts in drafter.eagle_serving.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from drafter.eagle import EagleHead
from drafter.features import FeatureBatch
from drafter.local_attention import KeyValue, LocalAttention


@dataclass(frozen=True)
class Chains:
    """The chains of a batch: what each of their steps reads and should predict.

    A position whose next_ids is negative is padding: it is read by no chain and predicts nothing.
    """

    batch: FeatureBatch

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Positions of each window, [N] int64."""
        return self.batch.cu_seqlens.diff().long()

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where the window of each position begins, [T] int64."""
        return self._of_window(self.batch.cu_seqlens[:-1].long())

    @cached_property
    def ends(self) -> torch.Tensor:
        """Where the window of each position ends, [T] int64."""
        return self._of_window(self.batch.cu_seqlens[1:].long())

    def read(self, depth: int) -> torch.Tensor:
        """The tokens that step depth reads, [T] int64: x_{t + depth + 1}, anything where the chain is over."""
        return self.batch.next_ids[self._at(depth)].clamp(min=0)

    def predicted(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whose successor step depth predicts, [T] int64, and whether that is known, [T] bool."""
        known = self.index + depth + 1 < self.ends
        for place in range(depth + 2):
            known = known & (self.batch.next_ids[self._at(place)] >= 0)
        return self._at(depth + 1), known

    @cached_property
    def index(self) -> torch.Tensor:
        """All positions, [T] int64."""
        return torch.arange(len(self.batch.next_ids), device=self.batch.next_ids.device)

    def _at(self, places: int) -> torch.Tensor:
        """The position so many places on, or the last one."""
        return (self.index + places).clamp(max=len(self.index) - 1)

    def _of_window(self, values: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(values, self.lengths, output_size=len(self.index))


@dataclass(frozen=True, slots=True)
class Step:
    """One step of all chains: outputs [T, H]; the positions whose successors they predict, [T] int64; whether those are
    known, [T] bool. depth -1: not a chain's, but what follows a token that was drafted and rejected at the position."""

    depth: int
    outputs: torch.Tensor
    index: torch.Tensor
    known: torch.Tensor


def unroll(
    head: EagleHead, chains: Chains, embedding: torch.Tensor, *, depth: int, longest: int, rejected: bool
) -> Iterator[Step]:
    """All chains' steps, with gradients: depth of them, and one over the tokens that were rejected.

    longest: positions of the longest window. embedding [V, H] is the policy's and receives no gradient.
    """
    batch, kind = chains.batch, embedding.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.fc.weight.dtype
    assert head.config.window > depth
    attend = LocalAttention(chains.starts, longest, head.config.window)

    def embedded(token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, embedding.detach()).to(dtype)

    states = fused = head.fuse(batch.aux.to(dtype))
    own: list[KeyValue] = []
    shared: KeyValue | None = None
    for step in range(depth):
        query, key, value = head.project(embedded(chains.read(step)), states, batch.positions + step)
        if shared is None:
            shared = key, value
        else:
            own.append((key, value))
        states = head.finish(states, attend(query, shared, own, ahead=step, lag=0))
        yield Step(step, states, *chains.predicted(step))
    if rejected:
        assert shared is not None
        query, key, value = head.project(embedded(batch.alt_ids.clamp(min=0)), fused, batch.positions)
        outputs = head.finish(fused, attend(query, shared, [(key, value)], ahead=0, lag=1))
        yield Step(-1, outputs, chains.index, batch.alt_ids >= 0)

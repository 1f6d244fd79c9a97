"""What each of several processes keeps of a policy's parameters, where they hold it together."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Piece:
    """What a process keeps of a parameter that several share: of this shape when whole, cut along dim, or not (None).

    start: the index in dim at which the piece begins. parameter: None where another process has all of it.
    """

    shape: torch.Size
    dtype: torch.dtype
    dim: int | None
    start: int
    parameter: torch.Tensor | None

    def keep(self, whole: torch.Tensor) -> None:
        """Copy the piece out of the whole."""
        if self.parameter is not None:
            narrow = whole if self.dim is None else whole.narrow(self.dim, self.start, self.parameter.shape[self.dim])
            self.parameter.copy_(narrow)


def whole_pieces(parameters: Mapping[str, nn.Parameter]) -> dict[str, Piece]:
    """Parameters that this process has all of."""
    return {name: Piece(each.shape, each.dtype, None, 0, each) for name, each in parameters.items()}

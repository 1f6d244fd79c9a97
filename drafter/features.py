"""What verification leaves behind: hidden states of committed tokens, kept in a bounded buffer to learn from."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Windows of consecutive positions, end to end: T positions, N windows, H the policy's hidden size.

    token_ids, next_ids [T] int64: the token at each position and the one after it, which was sampled from the hidden
    state there; a negative successor marks padding. positions [T] int64: true ones, consecutive in a window.
    aux [T, 3H]: the residual streams entering the aux layers, side by side; hidden [T, H]: after the final norm; both
    finite, padding's too. cu_seqlens [N + 1] int32: where each window's positions begin, and T. versions [N] int64: the
    policy version each was computed under. temperature: the one tokens were sampled at; 0 was greedy.
    alt_ids [T] int64: a drafted token that was rejected as the successor of the token at this position, -1 where there
    is none; alt_hidden [T, H]: the final hidden state there.
    """

    token_ids: torch.Tensor
    next_ids: torch.Tensor
    positions: torch.Tensor
    aux: torch.Tensor
    hidden: torch.Tensor
    cu_seqlens: torch.Tensor
    versions: torch.Tensor
    alt_ids: torch.Tensor
    alt_hidden: torch.Tensor
    temperature: float


def on_device(batch: FeatureBatch, device: torch.device) -> FeatureBatch:
    """The batch on a device, in tensors that a backward pass may keep."""
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=True)
            # an engine computes features in inference mode, whose tensors autograd does not keep
            moved[field.name] = value.clone() if value.is_inference() else value
    return replace(batch, **moved)

"""Projections that read the same input lie side by side in memory, so that one matrix product serves them.

The modules keep their usual parameters, which become views: training, state dicts and checkpoints see no difference.
"""

from collections.abc import Sequence

import torch
from torch import nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.no_grad()
def lay_side_by_side(model: nn.Module) -> None:
    """Move every group of projections into one storage, weights and biases each; the parameters stay the same objects.

    What already lies side by side is left alone. At most one group is in memory twice.
    """
    for parameters in _groups(model):
        if side_by_side(parameters) is not None:
            continue
        rows = [len(parameter) for parameter in parameters]
        together = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, together.split(rows), strict=True):
            parameter.data = view


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensors as one, over the same memory, where each begins at the end of the one before; None elsewhere.

    They have equal shapes but for the first dimension.
    """
    first = parts[0].detach()
    end = first.data_ptr()
    for part in parts:
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_memory and part.is_contiguous() and part.data_ptr() == end):
            return None
        end += part.numel() * part.element_size()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where a model's parameters are."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def grouped_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, those of a group one after the other.

    What flattens parameters in this order (DeepSpeed's ZeRO) leaves them side by side, where biases would come between
    the weights in the order of registration.
    """
    followers: dict[nn.Parameter, list[nn.Parameter]] = {group[0]: group for group in _groups(model)}
    ordered: dict[nn.Parameter, None] = {}
    for parameter in model.parameters():
        for member in followers.get(parameter, [parameter]):
            ordered.setdefault(member)
    return list(ordered)


def _groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The weights, and the biases, of each group of projections that one module holds."""
    groups = []
    for module in model.modules():
        for names in GROUPS:
            linears = [getattr(module, name, None) for name in names]
            if not all(type(linear) is nn.Linear for linear in linears):
                continue
            for kind in ("weight", "bias"):
                parameters = [getattr(linear, kind) for linear in linears]
                if all(parameter is not None for parameter in parameters):
                    groups.append(parameters)
    return groups

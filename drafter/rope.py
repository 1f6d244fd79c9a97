"""Rotary embeddings, done and undone: by their frequencies, at any positions."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import PreflightError


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding of 2 * len(frequencies) dimensions; scaling multiplies what it turns, as YaRN's does."""

    frequencies: tuple[float, ...]
    scaling: float

    @classmethod
    def of(cls, text_config: Any, dim: int) -> "Rope":
        """A policy's rotary embedding, by its transformers config, over so many dimensions of a head.

        Raises PreflightError where layers differ in it, or where it turns a part of a head alone.
        """
        parameters = getattr(text_config, "rope_parameters", None) or {}
        if not isinstance(parameters.get("rope_type"), str):
            raise PreflightError(f"{text_config.model_type} has no one rotary embedding for all layers; gates need it")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise PreflightError(f"{text_config.model_type!r} turns part of each head; gates need all of it turned")
        if parameters["rope_type"] == "default":
            exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
            return cls(tuple((parameters["rope_theta"] ** -exponents).tolist()), 1.0)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # seconds; a default embedding needs none

        sized = copy.deepcopy(text_config)
        sized.head_dim = dim
        frequencies, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](sized, torch.device("cpu"))
        return cls(tuple(frequencies.tolist()), float(scaling))


class Turns:
    """The cosines and sines of a rotary embedding at any positions; float32, wherever the positions are."""

    def __init__(self, rope: Rope) -> None:
        self._scaling = rope.scaling
        self._frequencies = torch.tensor(rope.frequencies)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [..., 1, D / 2], at positions [...]: one value for all heads."""
        if self._frequencies.device != positions.device:  # once: a graph may not copy from the host
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions[..., None, None].float() * self._frequencies
        return angles.cos() * self._scaling, angles.sin() * self._scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D / 2) of x [..., heads, D], as Llama lays them out. cos, sin [..., 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What rotate made x of, whatever scaling or rounding the cosines and sines carry: rotate's inverse."""
    first, second = x.chunk(2, dim=-1)
    size = cos.square() + sin.square()
    return torch.cat([(first * cos + second * sin) / size, (second * cos - first * sin) / size], dim=-1)

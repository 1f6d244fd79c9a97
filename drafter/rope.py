"""Rotary embeddings by their frequencies, as a policy's config gives them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import PreflightError
from kernels.gate import Rotation


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
    """A rotary embedding as kernels take it, wherever they run."""

    def __init__(self, rope: Rope) -> None:
        self._rotation = Rotation(torch.tensor(rope.frequencies), rope.scaling)

    def on(self, device: torch.device) -> Rotation:
        """Its frequencies in this device's memory."""
        if self._rotation.frequencies.device != device:  # once: a graph may not copy from the host
            self._rotation = Rotation(self._rotation.frequencies.to(device), self._rotation.scaling)
        return self._rotation

"""How weights get into vLLM: through its weight transfer, from tensors of this process.

An engine of our own, registered under its public factory, that is given the trainer's tensors instead of receiving
them. The same code serves CPU and GPU, the policy and the drafter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from configs.errors import PreflightError

TRANSFER = "paceline"

Weights = list[tuple[str, torch.Tensor]]


@dataclass
class HandOver(WeightTransferInitInfo):
    """Nothing to agree on: both sides are one process."""


@dataclass
class HandedOver(WeightTransferUpdateInfo):
    """Parameters under the names of the checkpoint, on the device they are wanted on or another."""

    weights: Weights


class HandOverEngine(WeightTransferEngine[HandOver, HandedOver]):
    """vLLM's receiving side: loads what it is given layer by layer into the storage its graphs know."""

    init_info_cls = HandOver
    update_info_cls = HandedOver

    def init_transfer_engine(self, init_info: HandOver) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Take a checkpoint's layout, as at the first load."""
        self._expected = {name for name, _ in self.model.named_parameters()}  # before tied ones are told apart
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HandedOver) -> None:
        """Load them. Raises PreflightError for a parameter of the policy that stayed as it was."""
        loaded = self.model.load_weights(iter(update_info.weights))
        if self.model is self._default_model and loaded is not None:
            missing = sorted(self._expected - set(loaded))
            if missing:
                raise PreflightError(f"vLLM found no weights for {missing[0]}; set rollout.backend=native")

    def finish_weight_update(self) -> None:
        """Bring the loaded layers into the form that vLLM computes with, in their old storage."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: LLM) -> None:
        """The sending side: hand all weights to the LLM whose update has been started, and finish it."""
        trainer_args.update_weights({"update_info": {"weights": list(iterator)}})
        trainer_args.finish_weight_update()


WeightTransferEngineFactory.register_engine(TRANSFER, HandOverEngine)


def hand_over(weights: Iterator[tuple[str, torch.Tensor]], llm: LLM) -> None:
    """Give the LLM these weights, whose update has been started, and have it forget what it cached under the old."""
    HandOverEngine.trainer_send_weights(weights, llm)
    llm.reset_prefix_cache()  # the policy's, and the head's own


def tensor_shapes(drafter: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in an exported drafter's folder."""
    with safe_open(drafter / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

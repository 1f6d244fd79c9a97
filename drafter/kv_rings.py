"""The head's own keys and values: a ring of blocks for each text that runs, and how much memory they take."""

import torch

from drafter.allocation import allocating
from drafter.eagle import EagleConfig
from kernels.cycle import MAX_NODES
from kernels.eagle import KvRings

BLOCK_SIZE = 16  # tokens in a block


def empty_rings(config: EagleConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> KvRings:
    """Rings of so many texts and of nobody. Raises ResourceError."""

    def zeros() -> torch.Tensor:
        return torch.zeros(num_slots + 1, dtype=torch.int32, device=device)

    shape = (2, (num_slots + 1) * blocks_each(config), BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    num_bytes = cache_bytes(config, num_slots=num_slots, itemsize=dtype.itemsize)
    with allocating("the drafter's KV cache", num_bytes, "lower drafter.window or rollout.max_running"):
        return KvRings(
            storage=torch.zeros(shape, dtype=dtype, device=device),
            origins=zeros(),
            digested=zeros(),
            begun=zeros(),
            window=config.window,
        )


def blocks_each(config: EagleConfig) -> int:
    """Blocks of a text's ring: the window, or what is caught up with, from its block's beginning, and the nodes
    stepped below."""
    return 2 - (-(max(config.window, 1 + MAX_NODES) + MAX_NODES) // BLOCK_SIZE)


def cache_bytes(config: EagleConfig, *, num_slots: int, itemsize: int) -> int:
    """What the head's keys and values of so many texts, and of nobody, take on the device."""
    positions = (num_slots + 1) * blocks_each(config) * BLOCK_SIZE
    return 2 * positions * config.num_kv_heads * config.head_dim * itemsize

"""How much memory there is, and how much of it a KV cache may take that nobody gave a size."""

import os
from pathlib import Path

import torch

CUDA_FRACTION = 0.5  # of free GPU memory; training needs the rest
CPU_FRACTION = 0.25  # of all memory
CONTROL_GROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def cache_budget(device: str, *, reserved: int = 0) -> int:
    """Bytes that a derived KV cache may take of a device, "cpu" or "cuda".

    reserved: bytes of GPU memory that are free now and will be taken before the cache is made.
    """
    if torch.device(device).type == "cuda":
        return int(max(available_bytes(device) - reserved, 0) * CUDA_FRACTION)
    return int(memory_limit() * CPU_FRACTION)


def available_bytes(device: str) -> int:
    """Memory a process may still take: of the GPU, or of the machine within its control group."""
    if torch.device(device).type == "cuda":
        # what torch keeps for its own next tensors, as after a warm start, counts as taken for the driver alone
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    return available if limit is None or used is None else min(available, limit - used)


def memory_limit() -> int:
    """All memory of the machine, or of the process's control group where that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _control_group("memory.max")
    return physical if limit is None else min(physical, limit)


def _control_group(name: str) -> int | None:
    """A number of bytes of the process's control group, None where there is none."""
    file = CONTROL_GROUP / name
    if not file.is_file():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit

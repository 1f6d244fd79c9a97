"""Whether every two devices can add up what they have: an all-reduce each pair, with a deadline that names it."""

import itertools
import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from launch.doctor_checks import Finding

ELEMENTS = 1 << 22  # float32: 16 MiB
ROUNDS = 3
DEADLINE_S = 60.0
START_S = 120.0  # of processes that import torch, on a busy machine: before the deadline counts
REMEDY = "check the network between them (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the interface), and firewalls"


def all_reduce(rank: int, meet: tuple[str, int], device: str, deadline_s: float) -> float:
    """Join one other rank, add up, check the sum; seconds of the fastest round.

    device: "cpu" (gloo) or "cuda:N" (NCCL). Raises RuntimeError or a torch.distributed error when it does not work.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    patience = timedelta(seconds=deadline_s)
    store = TCPStore(*meet, world_size=2, is_master=rank == 0, timeout=patience)
    backend = "gloo" if device == "cpu" else "nccl"
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=patience)
    try:
        times = []
        for _ in range(ROUNDS):
            values = torch.full((ELEMENTS,), float(rank + 1), device=device)
            began = time.perf_counter()
            dist.all_reduce(values)
            total = float(values[-1])  # waits for the device
            times.append(time.perf_counter() - began)
            if total != 3.0:
                raise RuntimeError(f"1 + 2 came out as {total}")
        return min(times)
    finally:
        dist.destroy_process_group()


def rounds(members: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds whose pairs share nobody: each round can run at once."""
    circle: list[str | None] = [*members, *([None] if len(members) % 2 else [])]
    plan = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        plan.append([(one, other) for one, other in facing if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return plan


def local_pairs(gpus: int) -> list[Finding]:
    """Every two GPUs of this machine, or two processes where it has none or one."""
    devices = [f"cuda:{index}" for index in range(gpus)] if gpus > 1 else ["cpu", "cpu"]
    return [_local_pair(one, other) for one, other in itertools.combinations(devices, 2)]


def judged(name: str, seconds: float, backend: str) -> Finding:
    """A pair that works, and how fast."""
    rate = ELEMENTS * 4 / seconds / 1e9
    return Finding("all-reduce", "pass", f"{name}: {rate:.1f} GB/s by {backend}")


def _local_pair(one: str, other: str) -> Finding:
    """One pair, in two processes of its own."""
    name = "two processes" if one == "cpu" else f"{one} and {other}"
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        meet = ("127.0.0.1", probe.getsockname()[1])
    processes = [
        context.Process(target=_answer, args=(rank, meet, device, answers), daemon=True)
        for rank, device in enumerate((one, other))
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + START_S + DEADLINE_S
    try:
        times = []
        for _ in processes:
            answer = answers.get(timeout=max(deadline - time.monotonic(), 0.01))
            if isinstance(answer, str):
                return Finding("all-reduce", "fail", f"{name}: {answer}", REMEDY)
            times.append(answer)
    except queue.Empty:
        return Finding("all-reduce", "fail", f"{name}: no answer within {START_S + DEADLINE_S:.0f} s", REMEDY)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return judged(name, max(times), "gloo" if one == "cpu" else "nccl")


def _answer(rank: int, meet: tuple[str, int], device: str, answers: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both are here
    try:
        answers.put(all_reduce(rank, meet, device, DEADLINE_S))
    except Exception as error:  # whatever it is, the report carries it
        answers.put(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

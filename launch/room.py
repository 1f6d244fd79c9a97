"""Whether a machine has room for a run's workers, each of which takes a CPU and, where it computes on one, a GPU."""

import os
from collections.abc import Mapping
from pathlib import Path

from configs.errors import ResourceError
from configs.schema import Config

CONTROL_GROUP = Path("/sys/fs/cgroup")


def require_room(config: Config, *, device: str) -> None:
    """Raise ResourceError where this machine is to hold all workers of a run and has too little for them.

    Of a cluster at RAY_ADDRESS nothing is said: nodes may still join it. Ray, once started, may see fewer CPUs.
    """
    if config.compute.backend != "ray" or "RAY_ADDRESS" in os.environ:
        return
    has = {"CPU": float(num_cpus())}
    if device == "cuda":
        import torch  # seconds to import

        has["GPU"] = float(torch.cuda.device_count())
    if short := shortage(has, bundle(device), num_workers(config)):
        raise too_little(asked_sizes(config), short)


def bundle(device: str) -> dict[str, float]:
    """What one worker takes, as Ray names it."""
    return {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})


def num_workers(config: Config) -> int:
    """Processes of a run beside its driver."""
    compute = config.compute
    return compute.workers + (compute.rollout_workers if compute.placement == "separate" else 0)


def asked_sizes(config: Config) -> str:
    """The options that ask for them."""
    compute = config.compute
    both = f"compute.workers={compute.workers} and compute.rollout_workers={compute.rollout_workers}"
    return both if compute.placement == "separate" else f"compute.workers={compute.workers}"


def too_little(asked: str, short: str) -> ResourceError:
    """What is said where a machine lacks what these options ask for."""
    return ResourceError(f"{asked} need {short} on this machine; ask for fewer")


def shortage(has: Mapping[str, float], each: Mapping[str, float], count: int) -> str:
    """Of what there is too little for so many workers, in words; "" where there is enough of everything."""
    lacking = {kind: count * size for kind, size in each.items() if has.get(kind, 0.0) < count * size}
    return ", ".join(f"{wanted:g} {kind}s and there are {has.get(kind, 0.0):g}" for kind, wanted in lacking.items())


def num_cpus() -> int:
    """CPUs that Ray will count here: the machine's, or as many as its control group's quota is worth."""
    every = os.cpu_count() or 1
    if "RAY_USE_MULTIPROCESSING_CPU_COUNT" in os.environ:  # which has Ray count them all
        return every
    newer, older = CONTROL_GROUP / "cpu.max", CONTROL_GROUP / "cpu"  # cgroups v2 and v1
    files = [newer] if newer.is_file() else [older / "cpu.cfs_quota_us", older / "cpu.cfs_period_us"]
    numbers = [number for file in files if file.is_file() for number in file.read_text().split()]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):  # "max" and -1 are no quota
        return every
    quota, period = map(int, numbers)
    return min(every, max(1, quota // period))

"""What a machine did beside the work while a clock ran: so that a stall names its culprit."""

import gc
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch

from drafter.types import Strategy
from rollout.graphs import GraphPool

SLOW_S = 1e-3  # a garbage collection that is worth naming


class Watch(AbstractContextManager["Watch"]):
    """Hears of Triton kernels that are compiled or read from the cache on disk, graphs captured and garbage collected.

    pools: whose captures are told. The hooks are Triton's own (3.4 and later); those set before are still called.
    """

    def __init__(self, pools: Mapping[str, GraphPool]) -> None:
        self._pools = dict(pools)
        self._kernels: list[tuple[str, float]] = []
        self._begun: dict[Any, float] = {}
        self._collections: list[float] = []
        self._collecting = 0.0
        self._before: tuple[Any, Any] = (None, None)
        self._captures: dict[str, int] = {}
        self._allocations: dict[str, int] = {}

    def __enter__(self) -> "Watch":
        from triton import knobs

        self._before = (knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook)
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = self._compiling, self._compiled
        gc.callbacks.append(self._collected)
        self.since()
        return self

    def __exit__(self, *exception: object) -> None:
        from triton import knobs

        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = self._before
        gc.callbacks.remove(self._collected)

    def since(self) -> dict[str, Any]:
        """What happened since the last call; {} where nothing did. JSON-able.

        kernels and graphs: names and seconds. collections: seconds of each. allocations: of memory by the driver, by
        kind.
        """
        graphs = []
        for name, pool in self._pools.items():
            count = pool.num_captures - self._captures.get(name, 0)
            self._captures[name] = pool.num_captures
            graphs += [[f"{name}: {_name(key)}", seconds] for key, seconds in list(pool.captured)[-count:] if count]
        allocations = driver_allocations()
        more = {kind: count - self._allocations.get(kind, 0) for kind, count in allocations.items()}
        self._allocations = allocations
        found = {
            "kernels": [list(kernel) for kernel in self._kernels],
            "graphs": graphs,
            "collections": self._collections,
            "allocations": {kind: count for kind, count in more.items() if count},
        }
        self._kernels, self._collections = [], []
        return {what: events for what, events in found.items() if events}

    def _compiling(self, *args: Any, **about: Any) -> Any:
        self._begun[about["repr"]] = perf_counter()
        return self._before[0](*args, **about) if self._before[0] else None

    def _compiled(self, *args: Any, **about: Any) -> Any:
        seconds = perf_counter() - self._begun.pop(about["repr"], perf_counter())
        self._kernels.append((about["fn"].name, seconds))
        return self._before[1](*args, **about) if self._before[1] else None

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = perf_counter()
        elif (seconds := perf_counter() - self._collecting) > SLOW_S:
            self._collections.append(seconds)


def driver_allocations() -> dict[str, int]:
    """How often torch has asked the driver for device and for pinned memory so far: either may wait for the device."""
    if not torch.cuda.is_available():
        return {}
    return {
        "device": torch.cuda.memory_stats().get("segment.all.allocated", 0),
        "host": torch.cuda.host_memory_stats().get("num_host_alloc", 0),
    }


def is_busy(happened: Mapping[str, Any]) -> bool:
    """Whether something was made that lasts: kernels or graphs."""
    return "kernels" in happened or "graphs" in happened


def _name(key: Hashable) -> str:
    """A graph's key (rollout/resident.py) in words."""
    match key:
        case ("draft", Strategy() as strategy, rows, *_):
            return f"draft {strategy.source} d{strategy.depth} k{strategy.top_k} v{strategy.num_verify}, {rows} rows"
        case ("target", rows, num_nodes, *_):
            return f"target of {num_nodes} nodes, {rows} rows"
    return str(key)

"""The CUDA-graph pool: what a cycle launches, captured on first use and replayed under one memory budget."""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from configs.faults import hit

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
LARGE_STEP = 128  # between buckets past the last
REMEMBERED = 256  # captures, for whoever asks where time went


def bucket(batch: int) -> int:
    """Rows of the smallest graph that holds a batch."""
    return next((size for size in BUCKETS if size >= batch), -(-batch // LARGE_STEP) * LARGE_STEP)


@dataclass(slots=True)
class Captured:
    """A graph, and the device memory that capturing it took."""

    graph: torch.cuda.CUDAGraph
    num_bytes: int


class GraphPool:
    """Runs launch sequences by name, as CUDA graphs where the device has them.

    A launch sequence reads and writes tensors that outlive it, does the same for the same key, and leaves nothing of
    use in memory it allocates: so all graphs share one memory pool, and any of them may be dropped at any time.
    Its first run is eager, which compiles its kernels; it is captured right after. Graphs replayed longest ago go when
    the pool holds more than max_bytes; 0 runs everything eagerly, as does a device without graphs and a capture that
    failed, which is said once.
    """

    def __init__(self, device: torch.device, *, max_bytes: int) -> None:
        self._captures = device.type == "cuda" and max_bytes > 0
        self._device = device
        self._max_bytes = max_bytes
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._warned = False
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None
        self._stream = torch.cuda.Stream(device) if self._captures else None
        self.num_captures = 0
        self.captured: deque[tuple[Hashable, float]] = deque(maxlen=REMEMBERED)  # the latest, and their seconds

    @property
    def num_bytes(self) -> int:
        """Device memory that the graphs held now took when they were captured, shared memory counted once."""
        return sum(captured.num_bytes for captured in self._graphs.values())

    def run(self, key: Hashable, launch: Callable[[], None]) -> float:
        """Do what launch does, by replaying its graph where there is one.

        Returns the seconds it took for being the first time; 0 where it ran as it will from now on.
        """
        captured = self._graphs.get(key)
        if captured is not None:
            self._graphs.move_to_end(key)
            captured.graph.replay()
            return 0.0
        begun = time.perf_counter()
        launch()
        if not self._captures or key in self._refused:
            return 0.0
        self._capture(key, launch)
        seconds = time.perf_counter() - begun
        if key in self._graphs:
            self.captured.append((key, seconds))
        return seconds

    def clear(self) -> None:
        """Drop all graphs: the memory they address is about to change."""
        self._graphs.clear()
        self._refused.clear()
        if self._captures:
            # torch frees a pool with its last graph, and refuses its handle afterwards
            self._memory = torch.cuda.graph_pool_handle()

    def _capture(self, key: Hashable, launch: Callable[[], None]) -> None:
        assert self._stream is not None
        # torch.cuda.graph() would also collect garbage and empty the allocator's cache, tens of milliseconds a graph
        torch.cuda.synchronize(self._device)
        free_before = torch.cuda.mem_get_info(self._device)[0]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                # thread_local: other threads (a trainer, a logger) may allocate meanwhile
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    hit("graph.capture")
                    launch()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._refused.add(key)
            if not self._warned:
                self._warned = True
                reason = str(error).strip().splitlines()[0]
                log.warning("a CUDA graph could not be captured (%s); such cycles run eagerly, and slower", reason)
            if not self._graphs:  # the pool may have gone with the only graph that used it
                self._memory = torch.cuda.graph_pool_handle()
            return
        torch.cuda.synchronize(self._device)
        self._graphs[key] = Captured(graph, max(0, free_before - torch.cuda.mem_get_info(self._device)[0]))
        self.num_captures += 1
        self._evict()

    def _evict(self) -> None:
        """Drop the graphs replayed longest ago until the budget holds; the newest always stays."""
        while self.num_bytes > self._max_bytes and len(self._graphs) > 1:
            self._graphs.popitem(last=False)

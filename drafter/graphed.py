"""A training step as two CUDA graphs: what the host would launch in a thousand calls, replayed in two.

One measures, which leaves gradients, and one updates the weights; between them the host reads the figures and decides.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from drafter.features import FeatureBatch

PER_TOKEN = ("token_ids", "next_ids", "positions", "aux", "hidden", "alt_ids", "alt_hidden")
PADDING = {"next_ids": -1, "alt_ids": -1}  # 0 elsewhere
WARM_UPS = 3  # as torch asks for: kernels are compiled and loaded, and gradients allocated, outside the capture

log = logging.getLogger(__name__)


class FixedBatch:
    """num_tokens positions at addresses that a graph can keep. What a batch does not fill is windows of one position,
    which teach nothing, and of none."""

    def __init__(self, like: FeatureBatch, *, num_tokens: int, device: torch.device) -> None:
        """like: a batch of the dtypes, widths and temperature of those to come."""

        def zeros(tensor: torch.Tensor, rows: int) -> torch.Tensor:
            return torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype, device=device)

        per_token: dict[str, Any] = {name: zeros(getattr(like, name), num_tokens) for name in PER_TOKEN}
        bounds, versions = zeros(like.cu_seqlens, num_tokens + 1), zeros(like.versions, num_tokens)
        self.batch = replace(like, **per_token, cu_seqlens=bounds, versions=versions)

    def is_like(self, batch: FeatureBatch) -> bool:
        """Whether the graph of this batch does for another one."""
        return self.batch.temperature == batch.temperature and self.batch.hidden.dtype == batch.hidden.dtype

    def fill(self, batch: FeatureBatch) -> None:
        """Copy a batch's positions here. It has num_tokens at most, and no window without any."""
        taken, num_bounds = len(batch.next_ids), len(batch.cu_seqlens)
        for name in PER_TOKEN:
            own = getattr(self.batch, name)
            own[:taken].copy_(getattr(batch, name), non_blocking=True)
            own[taken:].fill_(PADDING.get(name, 0))
        bounds, num_tokens = self.batch.cu_seqlens, len(self.batch.next_ids)
        assert num_bounds <= taken + 1 <= len(bounds)
        bounds[:num_bounds].copy_(batch.cu_seqlens, non_blocking=True)
        left = torch.arange(taken + 1, taken + 1 + len(bounds) - num_bounds, device=bounds.device)
        bounds[num_bounds:] = left.clamp(max=num_tokens)


class GraphedStep:
    """The step of batches that fit num_tokens positions in windows of at most longest each.

    measure: gradients, and figures of the batch to return. update: changes the weights, given those figures and whether
    it is being captured. places: addresses of what both read and others own; graphs are made anew where one has
    changed. A capture that fails is said once, and no batch is taken from then on.
    """

    def __init__(
        self,
        *,
        measure: Callable[[FeatureBatch], torch.Tensor],
        update: Callable[[torch.Tensor, bool], None],
        places: Callable[[], tuple[int, ...]],
        num_tokens: int,
        longest: int,
        device: torch.device,
    ) -> None:
        self._measure = measure
        self._update = update
        self._places = places
        self._num_tokens = num_tokens
        self._longest = longest
        self._device = device
        self._fixed: FixedBatch | None = None
        self._captured_places: tuple[int, ...] = ()
        self._figures: torch.Tensor | None = None  # in the measuring graph's memory, written by each replay
        self._measuring: Replayable | None = None
        self._updating: Replayable | None = None
        self._refused = False

    def takes(self, batch: FeatureBatch) -> bool:
        """Whether it does this batch's step. The first time it captures the measuring, which takes a second or so."""
        if self._refused or not self._fits(batch):
            return False
        if self._fixed is None or not self._fixed.is_like(batch) or self._captured_places != self._places():
            self._prepare(batch)
        return not self._refused

    def measure(self, batch: FeatureBatch) -> torch.Tensor:
        """The figures of a batch that it takes, overwritten by the next."""
        assert self._fixed is not None and self._measuring is not None
        self._fixed.fill(batch)
        self._measuring.replay()
        assert self._figures is not None
        return self._figures

    def update(self) -> None:
        """Update the weights by what was measured last."""
        figures = self._figures
        assert figures is not None
        if self._updating is not None:
            self._updating.replay()
            return
        # the first one is an update like any other, for it cannot be done twice to warm up
        self._update(figures, False)
        try:
            self._updating = captured(lambda: self._update(figures, True), self._device)
        except RuntimeError as error:
            self._refuse(error)

    def _fits(self, batch: FeatureBatch) -> bool:
        num_tokens = len(batch.next_ids)
        if num_tokens > self._num_tokens or len(batch.cu_seqlens) > num_tokens + 1:
            return False
        return int(batch.cu_seqlens.diff().max()) <= self._longest

    def _prepare(self, batch: FeatureBatch) -> None:
        self._drop()
        fixed = self._fixed = FixedBatch(batch, num_tokens=self._num_tokens, device=self._device)
        fixed.fill(batch)

        def launch() -> None:
            self._figures = self._measure(fixed.batch)

        try:
            self._measuring = captured(launch, self._device, warm_ups=WARM_UPS)
        except RuntimeError as error:
            self._refuse(error)
        self._captured_places = self._places()

    def _refuse(self, error: RuntimeError) -> None:
        self._refused = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("a drafter's training step could not be captured (%s); it runs eagerly, and slower", reason)
        self._drop()

    def _drop(self) -> None:
        self._measuring = self._updating = self._figures = self._fixed = None


class Replayable(Protocol):
    """What a capture returns."""

    def replay(self) -> None: ...


def captured(launch: Callable[[], None], device: torch.device, *, warm_ups: int = 0) -> Replayable:
    """A CUDA graph of what launch does, which has then been done only by the runs that warm up.

    launch reads and writes tensors that outlive it, and waits for nothing. Raises RuntimeError.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            launch()
    stream.synchronize()  # and not the device, on which another thread may be capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # thread_local: other threads (rollouts, a checkpoint's writer) may allocate meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        except BaseException:
            with suppress(RuntimeError):  # it says only that the capture was broken before
                graph.capture_end()
            raise
        graph.capture_end()
    return graph

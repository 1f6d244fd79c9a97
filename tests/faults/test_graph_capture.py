"""Out of memory while a CUDA graph is captured, on a machine without any: the pool's way out is the same."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from configs import faults
from rollout.graphs import GraphPool


class Graph:
    """A CUDA graph that records nothing."""

    def capture_begin(self, **_: object) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> GraphPool:
    """A pool that believes it has a device with graphs."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 31))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return GraphPool(SimpleNamespace(type="cuda"), max_bytes=1 << 20)  # type: ignore[arg-type]


def test_what_cannot_be_captured_runs_eagerly_and_is_said_once(
    pool: GraphPool, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[str] = []
    faults.arm("graph.capture:1:oom,graph.capture:2:oom")
    try:
        with caplog.at_level(logging.WARNING):
            for key in ("first", "first", "second", "second", "third", "third"):
                pool.run(key, lambda key=key: runs.append(key))
    finally:
        faults.arm("")
    assert len(caplog.records) == 1 and "run eagerly" in caplog.text
    # the third is captured: launched eagerly and under capture, then replayed
    assert runs == ["first", "first", "second", "second", "third", "third"]
    assert pool.num_captures == 1

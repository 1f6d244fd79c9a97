"""The graph pool where there are no graphs, and how batches are padded to those there are."""

import pytest
import torch

from rollout.graphs import BUCKETS, GraphPool, bucket


def test_a_bucket_holds_its_batch_and_there_are_few() -> None:
    sizes = [bucket(batch) for batch in range(1, 2049)]
    assert all(size >= batch for batch, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert sizes[: BUCKETS[-1]] == [size for size in sizes if size in BUCKETS]
    assert len(set(sizes)) < len(BUCKETS) + 13
    # padding costs at most half of a batch, a quarter from 16 rows on
    assert all(size < 1.5 * batch or batch < 3 for batch, size in enumerate(sizes, start=1))


def test_a_device_without_graphs_runs_each_launch() -> None:
    pool = GraphPool(torch.device("cpu"), max_bytes=1 << 30)
    runs: list[str] = []
    assert pool.run("a", lambda: runs.append("a")) == 0.0
    assert pool.run("a", lambda: runs.append("again")) == 0.0
    assert runs == ["a", "again"]
    assert pool.num_bytes == 0 and not pool.captured


def test_a_capture_that_failed_took_time_and_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = GraphPool(torch.device("cpu"), max_bytes=1 << 30)
    monkeypatch.setattr(pool, "_captures", True)
    monkeypatch.setattr(pool, "_capture", lambda key, launch: pool._refused.add(key))
    assert pool.run("a", lambda: None) > 0.0
    assert pool.num_captures == len(pool.captured) == 0
    assert pool.run("a", lambda: None) == 0.0

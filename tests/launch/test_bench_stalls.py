"""What is told of the kernels, graphs and collections that came while a clock ran, and nothing when none did."""

import gc
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from drafter.types import Strategy
from launch import bench_stalls
from launch.bench_gain import calls_each, in_alternation, quartiles
from launch.bench_stalls import Watch, is_busy
from rollout.graphs import GraphPool

SUFFIX = Strategy(source="suffix", depth=8, top_k=2, num_verify=15)


@pytest.fixture
def pool() -> GraphPool:
    return GraphPool(torch.device("cpu"), max_bytes=0)


def compile_one(name: str) -> None:
    """What Triton does about a kernel that is not in memory."""
    about: dict[str, Any] = {"repr": f"{name}[num_warps=4]", "fn": SimpleNamespace(name=name)}
    if knobs.runtime.jit_cache_hook is None or not knobs.runtime.jit_cache_hook(**about):
        assert knobs.runtime.jit_post_compile_hook is not None
        knobs.runtime.jit_post_compile_hook(**about)


def test_kernels_and_graphs_are_named_once(pool: GraphPool) -> None:
    with Watch({"chosen": pool}) as watch:
        assert not watch.since()
        compile_one("_insert_kernel")
        pool.captured.append((("draft", SUFFIX, 48), 0.012))
        pool.captured.append((("target", 48, 15, (1.0, 0, 1.0, 0.0), (2,)), 0.013))
        pool.num_captures += 2
        happened = watch.since()
        assert [name for name, _ in happened["kernels"]] == ["_insert_kernel"]
        assert happened["graphs"] == [
            ["chosen: draft suffix d8 k2 v15, 48 rows", 0.012],
            ["chosen: target of 15 nodes, 48 rows", 0.013],
        ]
        assert is_busy(happened) and json.dumps(happened)
        assert not watch.since() and not is_busy({})


def test_hooks_that_were_set_are_called_and_put_back(monkeypatch: pytest.MonkeyPatch, pool: GraphPool) -> None:
    heard: list[str] = []
    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(knobs.runtime, name, lambda name=name, **about: heard.append(name))
    before, callbacks = knobs.runtime.jit_cache_hook, list(gc.callbacks)
    with Watch({"off": pool}):
        compile_one("_sample_kernel")
    assert heard == ["jit_cache_hook", "jit_post_compile_hook"]
    assert knobs.runtime.jit_cache_hook is before and gc.callbacks == callbacks


def test_a_long_collection_is_told(monkeypatch: pytest.MonkeyPatch, pool: GraphPool) -> None:
    gc.disable()  # one that Python finds due would be told of, too
    try:
        with Watch({"off": pool}) as watch:
            monkeypatch.setattr(bench_stalls, "SLOW_S", 0.0)
            gc.collect()
            assert len(watch.since()["collections"]) == 1
    finally:
        gc.enable()


def test_sides_take_turns_in_order_and_in_reverse() -> None:
    assert in_alternation(["a", "b"], 3) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_every_side_is_timed_over_several_calls() -> None:
    assert [calls_each(batch) for batch in (1, 3, 8, 256)] == [8, 3, 2, 2]


def test_quartiles_stand_beside_the_median() -> None:
    found = quartiles([1.0, 5.0, 2.0, 4.0, 3.0])
    assert (found["q1"], found["median"], found["q3"]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0])["q3"] == 7.0

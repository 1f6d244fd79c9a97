"""Cycles over long random contexts: they do what drafting does, and the cost model counts the bytes they read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.schema import SparseConfig
from launch import bench_sparse_cycle
from launch.bench import app
from launch.bench_report import step_weight_bytes
from launch.geometry import random_policy
from launch.long_rows import BLOCK_SIZE, LongRows, accept_length, rows_tokens
from rollout.selectors import make_sparse

EVERYTHING = 1 << 15
TOKEN_BYTES = 2 * 2 * 2 * 64 * 4  # keys and values of two layers' two heads, float32


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_policy("tiny", device="cpu", dtype="float32", seed=0)


def make_job(**changes: Any) -> bench_sparse_cycle.Job:
    how: dict[str, Any] = {"ratios": (1,), "depths": (4,), "rows": 2, "accept_rates": (0.9,), "rounds": 1, "seed": 0}
    sparse = SparseConfig(mode="draft", budget_tokens=256)
    return bench_sparse_cycle.Job(**({"sparse": sparse} | how | changes))


def long_rows(model: PreTrainedModel, tokens: int = 200, **config: Any) -> LongRows:
    sparse = make_sparse(SparseConfig(mode="draft", **config), model)
    return LongRows(model, sparse, num_rows=3, tokens=tokens, max_depth=5, seed=1)


@pytest.mark.parametrize("selector", ["quest", "mean", "streaming", "verified"])
def test_drafts_that_read_everything_are_all_accepted_cycle_after_cycle(model: PreTrainedModel, selector: str) -> None:
    rows = long_rows(model, selector=selector, budget_tokens=EVERYTHING)
    for depth in (5, 3):
        rows.draft_ms(depth, 1)
        rows.verify_ms(depth, 1)
        assert rows.accepted() == [depth] * 3


def test_drafts_that_read_next_to_nothing_are_not_all_accepted(model: PreTrainedModel) -> None:
    rows = long_rows(model, selector="streaming", budget_tokens=32, sinks=0, window=16)
    rows.draft_ms(5, 1)
    rows.verify_ms(5, 1)
    assert sum(rows.accepted()) < 15


def test_drafts_that_read_a_copy_in_eight_bits_are_drafted_with_it(model: PreTrainedModel) -> None:
    rows = long_rows(model, budget_tokens=EVERYTHING, weights="int8")
    rows.draft_ms(5, 1)
    rows.verify_ms(5, 1)
    assert 0 < sum(rows.accepted()) <= 15
    sparse = make_sparse(SparseConfig(mode="draft", weights="int8", budget_tokens=256), model)
    parts = bench_sparse_cycle.predicted(model, sparse, make_job(), 1024, 1, 1000.0)
    assert sparse.lowbit is not None and sparse.lowbit.num_bytes < step_weight_bytes(model) / 3  # of float32
    read = 2 * 1024 * TOKEN_BYTES * (256 / 1024 + 1 / 16)
    assert parts["draft_ms"] == pytest.approx((sparse.lowbit.num_bytes + read) / 1e9)


def test_rows_stay_as_long_as_they_are_and_their_cache_as_it_was(model: PreTrainedModel) -> None:
    rows = long_rows(model, tokens=150, budget_tokens=64)
    table = rows._residency.rows.block_tables[:, :2].long()  # blocks that 150 tokens fill
    before = rows.cache.storage[:, :, table].clone()
    rows.plain_ms(2)
    rows.draft_ms(4, 1)
    rows.verify_ms(4, 1)
    torch.testing.assert_close(rows.cache.storage[:, :, table], before, atol=0, rtol=0)
    rows.plain_ms(1)
    assert rows._residency.texts.lengths.tolist() == [152] * 3 + [1]  # a step further; the last text is nobody's


def test_tokens_of_rows_come_to_the_bytes_in_whole_blocks() -> None:
    assert rows_tokens(1000 * 2 * TOKEN_BYTES, TOKEN_BYTES, 2) == 1024  # the nearest to 1000 tokens each
    assert rows_tokens(1.0, TOKEN_BYTES, 2) == BLOCK_SIZE


def test_accept_length_counts_the_tokens_expected_of_a_cycle() -> None:
    assert accept_length(0.0, 8) == 1 and accept_length(1.0, 8) == 9
    assert accept_length(0.5, 2) == pytest.approx(1.75)


def test_the_cost_model_counts_bytes(model: PreTrainedModel) -> None:
    job = make_job(sparse=SparseConfig(mode="draft", budget_tokens=128, dense_layers=1))
    sparse = make_sparse(job.sparse, model)
    parts = bench_sparse_cycle.predicted(model, sparse, job, 1024, 4, 1000.0)
    weights, kv_bytes = step_weight_bytes(model), 2 * 1024 * TOKEN_BYTES
    assert parts["plain_ms"] == parts["verify_ms"] == pytest.approx((weights + kv_bytes) / 1e9)
    # half of the layers are dense; the others read an eighth, and two vectors for sixteen pairs of them
    read = kv_bytes / 2 + kv_bytes / 2 * (128 / 1024 + 1 / 16)
    assert parts["draft_ms"] == pytest.approx(4 * (weights + read) / 1e9)


def test_the_command_writes_parts_and_speed_ups(tmp_path: Path) -> None:
    out = tmp_path / "cycle.json"
    options = ["--geometry", "tiny", "--layers", "1", "--ratios", "2,4", "--rows", "2", "--depths", "2,3"]
    options += ["--budget", "256", "--rounds", "1", "--device", "cpu", "--json", str(out)]
    done = CliRunner().invoke(app, ["sparse-cycle", *options])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["shape"]["num_hidden_layers"] == 1
    assert [(cell["ratio"], cell["depth"]) for cell in result["cells"]] == [(2, 2), (2, 3), (4, 2), (4, 3)]
    for cell in result["cells"]:
        assert cell["kv_bytes"] == pytest.approx(cell["ratio"] * cell["weight_bytes"], rel=0.2)
        cycle = cell["draft_ms"]["median"] + cell["verify_ms"]["median"]
        for each in cell["speedups"]:
            assert each["measured"] == pytest.approx(each["accept_length"] * cell["plain_ms"]["median"] / cycle)
            assert each["predicted"] is None  # of a CPU's memory nothing is known


def test_rows_longer_than_the_model_reads_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"--ratios 90 over 2 rows takes \d+ tokens of each, and the model has room"):
        bench_sparse_cycle.run("tiny", model, make_job(ratios=(90,)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layers", "99"], "--layers 99: tiny has 2; give 2 or fewer, or 0 for all"),
        (["--budget", "100"], "--budget 100: quest reads 256 tokens in any case"),
        (["--budget", "4000"], r"--budget 4000 is all of \d+ tokens, .* give less, or fewer --rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_timed(options: list[str], says: str) -> None:
    usual = [
        "--geometry",
        "tiny",
        "--layers",
        "1",
        "--ratios",
        "2",
        "--rows",
        "2",
        "--budget",
        "256",
        "--device",
        "cpu",
    ]
    with pytest.raises(ConfigError, match=says):
        app(["sparse-cycle", *usual, *options], standalone_mode=False)

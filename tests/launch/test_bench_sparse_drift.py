"""Drift of lossy sparse decoding: what a budget for everything leaves, what rectification bounds, what is told."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.schema import SparseConfig
from launch import bench_sparse_drift
from launch.agreement import divergence
from launch.bench import app
from launch.bench_sparse_drift import Job, Mode, Walk, binned, by_place
from launch.geometry import Subject

TOKENS, START = 90, 20


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.load("tiny", None, device="cpu", dtype="float32", seed=0)


def walk(subject: Subject, budget: int) -> Walk:
    sparse = SparseConfig(mode="rectified", select_block=4, budget_tokens=budget, window=8, every=8)
    random = torch.Generator().manual_seed(0)
    return Walk(subject, torch.randint(512, (2, TOKENS), generator=random), START, sparse)


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    # logits are log-probs up to a constant
    assert divergence(p.log() + 3, q.log()).tolist() == pytest.approx([expected])
    assert divergence(p.log(), p.log()).tolist() == pytest.approx([0.0], abs=1e-6)


def test_nothing_drifts_where_everything_is_read(subject: Subject) -> None:
    everything = walk(subject, 4096)
    for mode in (Mode("dense", 1), Mode("rectified", 8), Mode("plain", 0)):
        drift = everything.drift(mode)
        assert drift.shape == (TOKENS - START,)
        assert float(drift.abs().max()) < 1e-5


def test_a_mode_drifts_the_same_whatever_was_walked_before_and_dense_decoding_never(subject: Subject) -> None:
    little = walk(subject, 16)
    first = {mode: little.drift(mode) for mode in (Mode("plain", 0), Mode("rectified", 8), Mode("dense", 1))}
    assert float(first[Mode("dense", 1)].abs().max()) < 1e-5
    assert float(first[Mode("plain", 0)].max()) > 1e-4
    torch.testing.assert_close(little.drift(Mode("plain", 0)), first[Mode("plain", 0)], rtol=1e-3, atol=1e-7)
    rectified = first[Mode("rectified", 8)]
    assert float(rectified[7::8].abs().max()) < 1e-5, "the last of a window is drawn densely from a dense cache"
    assert float(rectified.max()) > 1e-4
    # up to the first rectification both modes have done the same
    torch.testing.assert_close(rectified[:7], first[Mode("plain", 0)][:7])


def test_figures_are_means_of_positions_and_of_places_in_a_window() -> None:
    assert binned([1.0, 3.0, 5.0], 10, 2) == [
        {"position": 10, "tokens": 2, "mean": 2.0},
        {"position": 12, "tokens": 1, "mean": 5.0},
    ]
    assert binned([1.0, 3.0, 5.0, 7.0, 9.0], 10, 2, step=4) == [
        {"position": 10, "tokens": 1, "mean": 1.0},
        {"position": 14, "tokens": 1, "mean": 9.0},
    ]
    assert by_place([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [3.0, 3.0]


def test_the_command_writes_every_modes_drift_and_where_it_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "drift.json"
    options = ["--geometry", "tiny", "--device", "cpu", "--batch", "1", "--tokens", "100", "--bin-tokens", "20"]
    keys = ["sparse.select_block=4", "sparse.budget_tokens=64", "sparse.window=8", "sparse.every=8"]
    done = CliRunner().invoke(app, ["sparse-drift", *options, *keys, "--json", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["sparse"]["budget_tokens"] == 64 and {"command", "commit", "gpu"} <= result.keys()
    assert [line["position"] for line in result["kl"]["plain"]] == [64, 84]
    assert {name: sum(line["tokens"] for line in lines) for name, lines in result["kl"].items()} == {
        "dense": 36,
        "rectified": 36,
        "plain": 36,
    }
    assert len(result["kl_by_place"]) == 8
    assert [(line["position"], line["tokens"]) for line in result["kl_just_rectified"]] == [(64, 3), (84, 2)]
    counted = sum(line["tokens"] * line["mean"] for line in result["kl_just_rectified"])
    assert counted == pytest.approx(5 * result["kl_by_place"][0])


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("sparse.mode=plain", "sparse.mode=plain: rectified and plain are both measured; leave it out"),
        ("rollout.temperature=0.5", "rollout.temperature=0.5: only sparse.* changes what is measured"),
        ("sparse.depth=4", "sparse.depth=4: is of drafts, which are not measured; leave it out"),
        ("sparse.budget_tokens=8192", "sparse.budget_tokens=8192 is all of 4096 tokens"),
        ("sparse.dense_layers=9", "sparse.dense_layers=9: the policy has 2 layers; set fewer"),
        ("sparse.every=65", "sparse.every=65: at most 64 tokens are forwarded again at once"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(key: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Subject, "load")
    with pytest.raises(ConfigError) as refused:
        app(["sparse-drift", "--geometry", "tiny", "--tokens", "4096", "--device", "cpu", key], standalone_mode=False)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["sparse.dense_layers=2"], "every layer of the policy attends to everything, and nothing drifts; leave fewer"),
        (["sparse.layers.0-1.selector=dense"], "every layer of the policy attends to everything, and nothing drifts"),
        (["sparse.layers.0-1.budget_tokens=9000"], "sparse.layers.0-1.budget_tokens=9000 is all of 4096 tokens"),
    ],
)
def test_layers_that_all_read_everything_are_refused(
    keys: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Subject, "load")
    with pytest.raises(ConfigError, match=says):
        app(["sparse-drift", "--geometry", "tiny", "--tokens", "4096", "--device", "cpu", *keys], standalone_mode=False)


def test_texts_longer_than_the_context_are_refused(subject: Subject) -> None:
    with pytest.raises(ConfigError, match="--tokens 5000 exceeds the model's context of 4096; give fewer"):
        bench_sparse_drift.require_fit(Job(1, 5000, 10, SparseConfig(mode="rectified"), 0), subject.model.config)

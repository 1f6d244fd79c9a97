"""Rollouts that were not sampled from the policy's own distribution, on their way through training."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from configs.schema import Config, RunConfig
from rl.batch import pack, split
from rl.metrics import Stopwatch, rollout_record, sample_rows, step_record
from rl.rundir import RunDir
from rl.trainer import DeepSpeedTrainer
from rl.types import Group
from rollout.types import Rollout, SampledUnder

MakeGroups = Callable[..., list[Group]]
MakeTrainer = Callable[..., DeepSpeedTrainer]


def marked(groups: list[Group], under: SampledUnder) -> list[Group]:
    """The same groups as if they had been sampled so; each token's dense log-prob 0.5 above that of its sampling."""

    def mark(rollout: Rollout) -> Rollout:
        dense = [logprob + 0.5 for logprob in rollout.logprobs] if under == "rectified" else []
        spec = replace(rollout.spec, drafted=[(0, 1)] if under == "rectified" else [])
        return replace(rollout, sampled_under=under, dense_logprobs=dense, spec=spec)

    return [replace(group, rollouts=[mark(rollout) for rollout in group.rollouts]) for group in groups]


def test_a_batch_knows_which_log_probs_are_dense(make_groups: MakeGroups) -> None:
    groups = make_groups()
    dense, rectified, plain = (pack(marked(groups, under)) for under in ("dense", "rectified", "sparse"))
    mask = dense.loss_mask
    assert torch.equal(dense.dense_logprobs[mask], dense.old_logprobs[mask])
    torch.testing.assert_close(rectified.dense_logprobs[mask], dense.old_logprobs[mask] + 0.5)
    assert plain.dense_logprobs.isnan().all()
    for batch in (dense, rectified, plain):
        assert torch.equal(batch.old_logprobs, dense.old_logprobs), "what it was sampled with is never replaced"
        parts = split(batch, 2)
        assert sum(int(part.dense_logprobs.isnan().sum()) for part in parts) == int(batch.dense_logprobs.isnan().sum())


def test_training_weighs_by_what_was_sampled_with_and_compares_with_what_is_dense(
    make_groups: MakeGroups, make_trainer: MakeTrainer
) -> None:
    batches = {under: pack(marked(make_groups(), under)) for under in ("dense", "rectified", "sparse")}
    trainer = make_trainer(importance_cap=1.5)
    with torch.no_grad():
        (each,) = trainer._rounds(batches["dense"])
        logprobs, _ = trainer.policy(each, trainer.temperature)
    mask = batches["dense"].loss_mask
    ratio = (logprobs - batches["dense"].old_logprobs[mask]).double()
    weights = ratio.exp()
    stats = {under: make_trainer(importance_cap=1.5).step(batch) for under, batch in batches.items()}
    for each_stats in stats.values():
        assert each_stats.importance_mean == pytest.approx(float(weights.clamp(max=1.5).mean()), rel=1e-4)
        assert each_stats.loss == pytest.approx(stats["dense"].loss, rel=1e-6)
        assert each_stats.log_ratio_mean == pytest.approx(float(ratio.mean()), rel=1e-4)
        assert each_stats.log_ratio_max == pytest.approx(float(ratio.max()), rel=1e-4)
        share = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
        assert each_stats.effective_share == pytest.approx(share, rel=1e-3)
    difference = (logprobs.exp() - batches["rectified"].dense_logprobs[mask].exp()).abs()
    assert stats["rectified"].prob_diff_mean == pytest.approx(float(difference.mean()), rel=1e-4)
    assert stats["sparse"].prob_diff_mean is None and stats["sparse"].logprob_diff_p99 is None


def test_a_steps_record_shows_how_much_of_it_is_lossy(make_groups: MakeGroups, make_trainer: MakeTrainer) -> None:
    groups = make_groups()
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    shares = {under: rollout_record(marked(groups, under), seconds=1.0)["lossy_share"] for under in ("dense", "sparse")}
    assert shares == {"dense": 0.0, "sparse": 1.0}
    rectified = marked(groups, "rectified")
    assert rollout_record(rectified, seconds=1.0)["lossy_share"] == pytest.approx(9 / tokens)
    stats = make_trainer().step(pack(marked(groups, "sparse")))
    record = step_record(1, Config(), rectified, stats, Stopwatch())
    assert {"log_ratio_mean", "log_ratio_max", "effective_share", "lossy_share"} <= record.keys()
    assert "prob_diff_mean" not in record, "there was nothing to compare"


@pytest.mark.parametrize("under", ["dense", "rectified", "sparse"])
def test_samples_show_what_each_rollout_was_sampled_under(
    under: SampledUnder, make_groups: MakeGroups, tmp_path: Path
) -> None:
    groups = marked(make_groups(), under)
    with RunDir.create(Config(run=RunConfig(dir=str(tmp_path / "run"))), "") as run:
        run.write_samples(1, sample_rows(groups))
        rows = pq.read_table(run.path / "samples" / "step_1.parquet").to_pylist()
    assert {row["sampled_under"] for row in rows} == {under}
    for row, rollout in zip(rows, (rollout for group in groups for rollout in group.rollouts), strict=True):
        assert row["logprobs"] == pytest.approx(rollout.logprobs)
        assert row["dense_logprobs"] == pytest.approx(rollout.dense_logprobs)
        assert len(row["dense_logprobs"]) in (0, row["num_tokens"])
        assert all(map(math.isfinite, row["dense_logprobs"]))

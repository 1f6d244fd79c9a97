"""Placements that cannot work are refused, with their remedy."""

import pytest

from configs.errors import ConfigError
from configs.load import parse

RAY = "compute.backend=ray"
TEAM = [RAY, "compute.placement=separate", "compute.rollout_workers=2", "rollout.tensor_parallel=2"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["compute.placement=separate"], "compute.placement='separate': compute.backend=inline is one process"),
        ([RAY, "compute.rollout_workers=2"], "compute.rollout_workers=2: colocated workers all sample"),
        ([RAY, "compute.placement=separate", "compute.rollout_workers=0"], "compute.rollout_workers=0: must be at"),
        ([RAY, "compute.placement=separate", "compute.bucket_mb=0"], "compute.bucket_mb=0: must be at least 1"),
        (["train.zero_stage=3", "train.kl_coef=0.1"], "train.kl_coef=0.1: train.zero_stage=3 keeps no reference"),
        (["train.zero_stage=3", "rollout.backend=vllm", "spec.source=off"], "train.zero_stage=3: rollout.backend=vllm"),
        (
            [RAY, "compute.placement=separate", "train.offload=rollout"],
            "train.offload='rollout': compute.place",
        ),
        (
            ["rollout.backend=vllm", "spec.source=off", "train.offload=rollout"],
            "train.offload='rollout': rollout",
        ),
        (
            [RAY, "compute.placement=separate", "rollout.tensor_parallel=0"],
            "rollout.tensor_parallel=0: must be at least 1",
        ),
        ([RAY, "rollout.tensor_parallel=2"], "rollout.tensor_parallel=2: colocated workers sample from what they"),
        (
            [RAY, "compute.placement=separate", "compute.rollout_workers=3", "rollout.tensor_parallel=2"],
            "rollout.tensor_parallel=2: does not divide compute.rollout_workers=3",
        ),
        ([*TEAM, "spec.source=eagle"], "spec.source='eagle': a trained drafter reads the head"),
        ([*TEAM, "sparse.mode=plain"], "sparse.mode='plain': blocks are chosen from all heads"),
    ],
)
def test_what_cannot_work_together_is_said_in_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("data: {name: chain_sum}", overrides)
    assert said in str(caught.value)


def test_placements_that_work_are_taken() -> None:
    config = parse("data: {name: chain_sum}", [RAY, "compute.placement=separate", "compute.rollout_workers=3"])
    assert (config.compute.workers, config.compute.rollout_workers) == (1, 3)
    assert parse("data: {name: chain_sum}", TEAM).rollout.tensor_parallel == 2

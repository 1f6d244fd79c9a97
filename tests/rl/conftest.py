"""Small ragged groups of rollouts, and trainers of the tiny policy, for the tests of the learning half."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import TrainConfig
from rl.advantage import group_advantages
from rl.batch import pack
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch, Group
from rollout.model import load_policy
from rollout.types import Prompt, Rollout, SpecStats

VOCAB = 259  # of the tiny model


@pytest.fixture
def make_groups() -> Callable[..., list[Group]]:
    """Groups of random tokens with ragged lengths; the same for the same seed."""

    def make(num_prompts: int = 3, group_size: int = 3, seed: int = 0) -> list[Group]:
        random = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, count: int) -> list[int]:
            return torch.randint(low, high, (count,), generator=random).tolist()

        groups = []
        for index in range(num_prompts):
            prompt = Prompt(id=f"p{index}", token_ids=integers(0, VOCAB, *integers(1, 9, 1)), answer="")
            rollouts = []
            for sample in range(group_size):
                token_ids = integers(0, VOCAB, *integers(1, 17, 1))
                rollouts.append(
                    Rollout(
                        prompt_id=prompt.id,
                        sample=sample,
                        token_ids=token_ids,
                        logprobs=(-6 * torch.rand(len(token_ids), generator=random)).tolist(),
                        version_spans=[(0, len(token_ids))],
                        finish="stop",
                        spec=SpecStats(forwards=1, proposed=0, accepted=0),
                    )
                )
            rewards = torch.rand(group_size, generator=random).tolist()
            groups.append(Group(prompt, rollouts, rewards, group_advantages(rewards, "std")))
        return groups

    return make


@pytest.fixture
def batch(make_groups: Callable[..., list[Group]]) -> Batch:
    """Nine ragged sequences."""
    return pack(make_groups())


@pytest.fixture
def make_trainer(tiny_model_dir: Path) -> Callable[..., DeepSpeedTrainer]:
    """A trainer of a freshly loaded tiny policy; options are TrainConfig's. No clipping unless asked for."""

    def make(*, dtype: str = "float32", temperature: float = 0.7, **options: Any) -> DeepSpeedTrainer:
        config = TrainConfig(**{"lr": 1e-3, "max_grad_norm": 0.0} | options)
        policy = load_policy(tiny_model_dir, device="cpu", dtype=dtype)
        gc.freeze()  # DeepSpeed's bfloat16 optimiser collects garbage four times, a second each over all of torch
        return DeepSpeedTrainer(policy, config, total_steps=8, temperature=temperature, device="cpu")

    return make

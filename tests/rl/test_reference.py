"""Training with log-probs of the reference that others computed: the same steps, without computing them again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rl.batch import pack
from rl.packed import Round
from rl.reference import by_rollout, completed, responses
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch, Group
from rollout.types import Prompt, Rollout

MakeTrainer = Callable[..., DeepSpeedTrainer]
MakeGroups = Callable[..., list[Group]]


def pairs_of(groups: list[Group]) -> list[tuple[Prompt, Rollout]]:
    return [(group.prompt, rollout) for group in groups for rollout in group.rollouts]


def scores_of(trainer: DeepSpeedTrainer, groups: list[Group]) -> dict[tuple[str, int], list[float]]:
    """As a worker's score: of pairs in another order and other company than training has them in."""
    pairs = pairs_of(groups)[::-1]
    return by_rollout(pairs, trainer.score(responses(pairs)))


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_with_scores_is_the_step_without(
    make_trainer: MakeTrainer, make_groups: MakeGroups, updates: int
) -> None:
    options: dict[str, Any] = {"kl_coef": 0.5, "micro_tokens": 48, "updates_per_step": updates, "lr": 1e-3}
    computes, is_told = make_trainer(**options), make_trainer(**options)
    forwards: list[int] = []
    for step in range(3):
        groups = make_groups(3, 3, seed=step)
        expected = computes.step(pack(groups))
        batch = pack(groups, scores_of(is_told, groups))  # before the first step the reference is the policy
        referred, is_told._referred = is_told._referred, lambda each: forwards.append(1)  # type: ignore
        stats = is_told.step(batch)
        is_told._referred = referred  # type: ignore[method-assign]
        assert stats.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-7)
        assert stats.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-6)
    assert stats.kl > 0 and not forwards, "nothing was computed again"
    for name, param in computes.params.items():
        torch.testing.assert_close(is_told.params[name], param, rtol=1e-4, atol=1e-6)


def test_of_what_nobody_scored_alone_whole_sequences_are_computed(make_groups: MakeGroups) -> None:
    groups = make_groups(2, 3, seed=1)
    pairs = pairs_of(groups)
    known = {(prompt.id, rollout.sample): [-2.0] * len(rollout.token_ids) for prompt, rollout in pairs[::2]}
    batch = pack(groups, known)
    (targets,) = batch.loss_mask.nonzero(as_tuple=True)
    asked: list[Batch] = []

    def forward(each: Round) -> torch.Tensor:
        asked.append(each.batch)
        return -each.batch.token_ids[each.targets].float()

    result = completed(Round(batch, targets, 1.0), forward)
    (part,) = asked
    assert part.token_ids.tolist() == [token for p, r in pairs[1::2] for token in (*p.token_ids, *r.token_ids)]
    expected = []
    for index, (_, rollout) in enumerate(pairs):
        expected += [-float(token) for token in rollout.token_ids] if index % 2 else [-2.0] * len(rollout.token_ids)
    assert result.tolist() == expected
    nothing = completed(Round(pack(groups), targets, 1.0), forward)
    assert torch.equal(nothing, -batch.token_ids[targets].float())


@pytest.mark.parametrize(
    "options", [{"kl_coef": 0.0}, {"zero_stage": 3}, {"sequence_parallel": 2}, {"offload": "rollout"}]
)
def test_what_ranks_compute_together_or_lend_no_rank_is_asked_for_alone(options: dict[str, Any]) -> None:
    from configs.schema import TrainConfig

    assert DeepSpeedTrainer.scores_alone(TrainConfig(kl_coef=0.1))
    assert not DeepSpeedTrainer.scores_alone(TrainConfig(**({"kl_coef": 0.1} | options)))

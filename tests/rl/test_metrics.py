"""The distributions and samples that a step leaves."""

from collections.abc import Callable
from dataclasses import replace

from configs.schema import Config, RewardConfig, RolloutConfig
from rl.metrics import distributions, drafted, histogram, sample_rows
from rl.types import Group
from rollout.types import Rollout, SpecStats


def test_a_histogram_counts_everything_once() -> None:
    assert histogram([0.0, 0.49, 0.5, 1.0, 7.0, -3.0], [0.0, 0.5, 1.0]) == {"edges": [0.0, 0.5, 1.0], "counts": [3, 3]}
    assert histogram([], [0.0, 1.0]) == {"edges": [0.0, 1.0], "counts": [0]}


def test_edges_depend_on_the_config_alone(make_groups: Callable[..., list[Group]]) -> None:
    config = Config(
        rollout=RolloutConfig(max_new_tokens=1000), reward=RewardConfig(functions={"a:b": 2.0, "c:d": -0.5})
    )
    first, second = (distributions(make_groups(seed=seed), config) for seed in (0, 1))
    for name in ("reward_hist", "response_len_hist"):
        assert first[name]["edges"] == second[name]["edges"]
        assert sum(first[name]["counts"]) == 9
    assert (first["reward_hist"]["edges"][0], first["reward_hist"]["edges"][-1]) == (-0.5, 2.0)
    assert first["response_len_hist"]["edges"][-1] == 1000
    few = distributions(make_groups(), replace(config, rollout=RolloutConfig(max_new_tokens=3)))
    assert few["response_len_hist"]["edges"] == [0, 1, 2, 3]


def test_a_rewards_own_sign_bounds_its_histogram(make_groups: Callable[..., list[Group]]) -> None:
    config = Config(reward=RewardConfig(functions={"c:d": -1.0}))
    edges = distributions(make_groups(), config)["reward_hist"]["edges"]
    assert edges == sorted(edges) and (edges[0], edges[-1]) == (-1.0, 0.0)


def test_samples_hold_tokens_and_which_were_drafted(make_groups: Callable[..., list[Group]]) -> None:
    spec = SpecStats(forwards=3, proposed=6, accepted=3, drafted=[(0, 1), (3, 2)])
    rollout = Rollout("p0", 0, [5, 6, 7, 8, 9], [0.0] * 5, [(0, 5)], "stop", spec)
    assert drafted(rollout).tolist() == [True, False, False, True, True]
    (row,) = sample_rows([Group(make_groups(1, 1)[0].prompt, [rollout], [1.0], [0.0])])
    assert row["token_ids"].tolist() == [5, 6, 7, 8, 9] and row["token_ids"].dtype == "int32"
    assert row["drafted"].dtype == bool

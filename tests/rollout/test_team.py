"""Whoever speaks to the first rank of a team speaks to all: they sample what one process does, whatever it is told."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.ranks import run_ranks
from rollout.transfer import ReceivedWeights

sys.path.append(str(Path(__file__).parent))  # of the processes started here, too
import in_ranks  # noqa: E402
import in_teams  # noqa: E402

pytestmark = pytest.mark.slow
Found = list[dict[str, dict[str, Any]]]
AssertSame = Callable[[in_ranks.Results, in_ranks.Results], None]


@pytest.fixture(scope="module")
def found() -> Found:
    """What two ranks found, by rank and kind of model; starting them takes longer than what they do."""
    return run_ranks(2, "cpu", in_teams.of_each_kind)


@pytest.mark.parametrize("kind", in_teams.OPTIONS)
def test_a_team_samples_what_one_process_does_also_of_what_was_moved_and_after_a_call_was_left(
    kind: str, found: Found, assert_same: AssertSame
) -> None:
    model = in_ranks.tiny_model("llama", in_teams.OPTIONS[kind])
    expected = in_ranks.roll_out(in_ranks.engine_alone(model, "resident"))
    told = found[0][kind]
    for how in ("plain", "moved", "after leaving"):
        assert_same(told[how], expected)
    assert told["num_moved"] > 0


@pytest.mark.parametrize("kind", in_teams.OPTIONS)
def test_a_team_samples_from_new_weights_cut_from_whole_ones(kind: str, found: Found, assert_same: AssertSame) -> None:
    whole = in_ranks.tiny_model("llama", in_teams.OPTIONS[kind], seed=1)
    first, second = (told[kind] for told in found)
    assert_same(first["updated"], in_ranks.roll_out(in_ranks.engine_alone(whole, "resident")))
    assert "is to serve version 1 of the policy and holds 0" in first["stale"]
    assert first["version"] == second["version"] == 1
    assert first["layout"] == second["layout"] == ReceivedWeights(whole).layout


def test_ranks_agree_how_large_their_caches_are(found: Found) -> None:
    for kind in in_teams.OPTIONS:
        assert found[0][kind]["blocks"] == found[1][kind]["blocks"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_team_of_two_gpus_samples_what_one_does(assert_same: AssertSame) -> None:
    told, _ = run_ranks(2, "cuda", in_teams.on_gpus)
    for how in ("plain", "moved", "after leaving"):
        assert_same(told[how], told["alone"])
    assert_same(told["updated"], told["alone, updated"])

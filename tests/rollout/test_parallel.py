"""A policy that two processes share samples what one process does, and both end together."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

from configs.errors import PreflightError
from rollout.collectives import ONE_SHOT_BYTES
from rollout.decoder import some_logits
from rollout.ranks import RankFailedError, run_ranks

sys.path.append(str(Path(__file__).parent))  # of the processes started here, too
import in_ranks  # noqa: E402

pytestmark = pytest.mark.slow
Found = list[dict[str, Any]]
AssertSame = Callable[[in_ranks.Results, in_ranks.Results], None]


@pytest.fixture(scope="module")
def found() -> Found:
    """What two ranks found, by rank; starting them takes longer than what they do."""
    return run_ranks(2, "cpu", in_ranks.of_each_family)


@pytest.mark.parametrize("family", in_ranks.FAMILIES)
def test_two_ranks_compute_what_one_process_does(family: str, found: Found) -> None:
    model = in_ranks.tiny_model(family, in_ranks.FAMILIES[family])
    expected = in_ranks.hidden_and_logits(model)
    for told in found:
        for ours, theirs in zip(told[family]["tensors"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(told[family]["module"]), some_logits(model), atol=1e-4, rtol=1e-4)
    assert found[0][family]["tensors"][1] == found[1][family]["tensors"][1], "logits have other bits"


@pytest.mark.parametrize("cycles", ["resident", "hosted"])
@pytest.mark.parametrize("family", in_ranks.FAMILIES)
def test_two_ranks_sample_the_tokens_of_one_process(
    family: str, cycles: Any, found: Found, assert_same: AssertSame
) -> None:
    model = in_ranks.tiny_model(family, in_ranks.FAMILIES[family])
    expected = in_ranks.roll_out(in_ranks.engine_alone(model, cycles))
    assert len({tuple(rollout.token_ids) for rollout in expected.values()}) == len(expected)
    for told in found:
        assert_same(told[family][cycles], expected)


def test_drafts_and_a_chooser_that_measures_change_nothing_over_two_ranks(
    found: Found, assert_same: AssertSame
) -> None:
    expected = in_ranks.roll_out(in_ranks.engine_alone(in_ranks.tiny_model("qwen3", {}), "resident"))
    for told in found:
        assert_same(told["drafted"], expected)
    assert sum(rollout.spec.proposed for rollout in found[0]["drafted"].values()) > 0
    assert found[0]["reports"] > 0
    assert found[1]["reports"] == 0


def test_a_rank_keeps_half_of_every_projection_and_the_embedding_whole(found: Found) -> None:
    for told in found:
        share = told["llama tied"]
        assert share["shapes"] == [(48, 32), (32, 48), (48, 48)]
        assert share["embedding"] == 96
        assert all(told[family]["kv_heads"] == 1 for family in in_ranks.FAMILIES)
        assert all(told[family]["joined"] == 1 for family in in_ranks.FAMILIES), "projections lie apart"


@pytest.mark.parametrize("name", in_ranks.REFUSED)
def test_what_cannot_be_shared_is_refused_by_name_and_left_whole(name: str, found: Found) -> None:
    for told in found:
        assert in_ranks.REFUSED[name][1] in told[name]


def test_an_unknown_plan_and_different_weights_are_refused(found: Found) -> None:
    for told in found:
        assert "o_proj is cut 'rowwise', and its plan says 'all_reduce'" in told["unplanned"]
        assert "the ranks hold different weights" in told["different"]


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("user", PreflightError, "rank 1 has no weights"),
        ("bug", RankFailedError, "rank 1 failed: KeyError: 'nowhere'"),
        ("killed", RankFailedError, "rank 1 failed: killed by SIGKILL"),
    ],
)
def test_ranks_end_together_when_one_fails(how: str, kind: type[Exception], words: str) -> None:
    begun = monotonic()
    with pytest.raises(kind, match=words):
        run_ranks(2, "cpu", in_ranks.fail, how)
    assert monotonic() - begun < 900, "a rank was waited for"
    assert not multiprocessing.active_children()


def test_ranks_end_with_the_process_that_started_them() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, in_ranks.__file__], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
        parent.kill()
        # ends when nobody holds the pipe any more; the ranks would for an hour
        assert parent.stdout.read() == ""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("one_shot_bytes", [0, ONE_SHOT_BYTES], ids=["nccl", "one-shot"])
def test_two_gpus_sample_the_tokens_of_one_from_captured_graphs(one_shot_bytes: int, assert_same: AssertSame) -> None:
    for told in run_ranks(2, "cuda", in_ranks.on_gpus, one_shot_bytes):
        assert told["graphs"] > 0
        for name in ("shared", "again", "drafted"):
            assert_same(told[name], told["alone"])
        if one_shot_bytes == 0:
            assert told["transport"] == "nccl"


def test_too_few_gpus_are_refused_before_anything_starts() -> None:
    world = torch.cuda.device_count() + 1
    with pytest.raises(PreflightError, match=f"{world} GPUs are asked for"):
        run_ranks(world, "cuda", in_ranks.fail, "user")

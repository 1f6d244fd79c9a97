"""`paceline bench tensor-parallel` on a tiny geometry: two processes over gloo against one."""

import json
from math import isfinite
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import bench
from launch.bench_rollout import random_prompts
from launch.bench_tensor_parallel import _first_difference, _logprob_differences, _parted
from launch.exits import outcome
from launch.geometry import random_policy
from rollout.types import Rollout, SpecStats


@pytest.mark.slow
def test_two_processes_roll_out_and_are_timed_against_one(tmp_path: Path) -> None:
    out = tmp_path / "results" / "out.json"
    small = ["--batches", "1,2", "--prompt-len", "8", "--new-tokens", "8", "--rounds", "1", "--exact-layers", "1"]
    given = ["tensor-parallel", "--geometry", "tiny", "--world", "2", "--device", "cpu", *small, "--json", str(out)]
    result = CliRunner().invoke(bench.app, given, catch_exceptions=False)
    assert result.exit_code == 0
    assert "times as fast" in result.stdout
    found = json.loads(out.read_text())
    for name in ("command", "commit", "packages", "gpu", "seed", "transport"):
        assert name in found, name
    for agreement in (found["exact"], found["agreement"]):  # float32 both
        for told in agreement.values():
            assert told["rollouts_equal"] == told["rollouts"]
            assert told["logprob_max"] < 1e-4
    assert [cell["batch"] for cell in found["cells"]] == [1, 2]
    # a step is the difference of two lengths' times, of which a busy machine makes any number
    assert all(isfinite(cell[side]["step_ms"]["median"]) for cell in found["cells"] for side in ("one", "shared"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--geometry", "tinier", "--device", "cpu"], 2, "--geometry tinier: unknown"),
        (["--geometry", "tiny", "--device", "cpu", "--world", "1"], 2, "--world"),
        (["--geometry", "tiny", "--device", "cpu", "--batches", "1,1"], 2, "different positive numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(bench.app, ["tensor-parallel", *arguments], standalone_mode=False)
    assert result.exception is not None
    found = outcome(result.exception)
    assert found[0] == code
    assert words in found[1]


def test_rollouts_are_compared_up_to_where_they_part() -> None:
    model = random_policy("tiny", device="cpu", dtype="float32", seed=0)
    prompt = random_prompts(1, 5, 512, seed=0)[0]

    def rollout(token_ids: list[int], logprobs: list[float]) -> dict[tuple[str, int], Rollout]:
        spec = SpecStats(forwards=3, proposed=0, accepted=0)
        return {(prompt.id, 0): Rollout(prompt.id, 0, token_ids, logprobs, [(0, 3)], "length", spec)}

    one, other = rollout([7, 8, 9], [-1.0, -2.0, -3.0]), rollout([7, 4, 9], [-1.5, -9.0, -9.0])
    assert _first_difference(*one.values(), *other.values()) == 1
    assert _first_difference(*one.values(), *one.values()) == 3
    assert _logprob_differences(one, other) == {"logprob_mean": 0.5, "logprob_max": 0.5}
    (parted,) = _parted(model, [prompt], one, other)
    assert (parted.index, parted.tie) == (1, False)  # neither is what this model would take
    assert parted.gap > 0

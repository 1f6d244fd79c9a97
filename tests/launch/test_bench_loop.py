"""`paceline bench loop`: the same job for both sides, honest sums, and one line for what is missing."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import ConfigError, PreflightError
from configs.schema import Config, DataConfig, RolloutConfig, TrainConfig
from launch import bench, bench_loop, bench_trl
from launch.bench_loop import Arm
from rollout.types import Prompt

# Stands in for the python of TRL's environment: imports anything, and takes a second a step, half of it in generate.
PEER = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    sys.exit(0)
job = json.load(sys.stdin)
settings = job["trl"]
rollouts = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
assert len(job["messages"]) == job["steps"] * rollouts // settings["num_generations"]
step = dict(seconds=1.0, seconds_rollout=0.5, seconds_train=0.5, tokens=4 * rollouts, num_rollouts=rollouts)
print(json.dumps(dict(versions=dict(trl="0"), settings=settings, steps=[step] * job["steps"])))
"""


@pytest.fixture
def config() -> Config:
    return Config(
        data=DataConfig(system="Be brief.", template="Q: {question}"),
        rollout=RolloutConfig(prompts_per_step=2, group_size=4, max_new_tokens=30),
        train=TrainConfig(steps=2, lr=3e-6, clip_high=0.25, micro_tokens=4096),
    )


@pytest.fixture
def prompts() -> list[Prompt]:
    return [Prompt(str(n), list(range(10 + n)), "", {"question": f"what is {n}?"}) for n in range(4)]


def step(seconds: float, tokens: int) -> bench_loop.Step:
    return {
        "seconds": seconds,
        "seconds_rollout": seconds / 2,
        "seconds_train": seconds / 2,
        "tokens": tokens,
        "num_rollouts": 2,
    }


def test_the_peer_is_given_the_same_job(config: Config, prompts: list[Prompt]) -> None:
    job = bench_loop.peer_job(config, Path("model"), (2,), prompts, threads=2, micro=0)
    assert job["messages"][1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: what is 1?"},
    ]
    assert job["prompt_ids"] == [prompt.token_ids for prompt in prompts]
    assert (job["steps"], job["threads"], job["stop_token_ids"]) == (2, 2, [2])
    trl = job["trl"]
    assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == 8
    assert (trl["num_generations"], trl["max_completion_length"]) == (4, 30)
    assert (trl["learning_rate"], trl["epsilon"], trl["epsilon_high"]) == (3e-6, 0.2, 0.25)
    assert json.loads(json.dumps(job)) == job


def test_the_peers_passes_hold_no_more_tokens_than_ours(config: Config, prompts: list[Prompt]) -> None:
    longest = 13 + 30
    for micro_tokens, expected in ((8 * longest, 8), (8 * longest - 1, 4), (2 * longest, 2), (longest, 1)):
        limited = replace(config, train=replace(config.train, micro_tokens=micro_tokens))
        job = bench_loop.peer_job(limited, Path("model"), (2,), prompts, threads=1, micro=0)
        assert job["trl"]["per_device_train_batch_size"] == expected
    with pytest.raises(ConfigError, match="--peer-micro=3"):
        bench_loop.peer_job(config, Path("model"), (2,), prompts, threads=1, micro=3)


def test_what_the_sides_do_differently_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"train\.kl_coef=0\.1"):
        bench_loop._require_comparable(replace(config, train=replace(config.train, kl_coef=0.1)))


def test_the_report_compares_steps_and_tokens(config: Config) -> None:
    peer = Arm("trl", steps=[step(8.0, 40), step(10.0, 40), step(30.0, 40)])
    ours = Arm("paceline off", steps=[step(5.0, 60) | {"accept_length": 1.5}] * 2)
    result = bench_loop.report([peer, ours], config, threads=2, rounds=1)
    assert result["arms"][0]["seconds"] == {"median": 10.0, "min": 8.0, "max": 30.0}
    assert result["arms"][0]["accept_length"] is None
    assert result["arms"][1]["accept_length"] == 1.5
    assert result["arms"][1]["response_len_mean"] == 30.0
    # 120 tokens in 48 s against 120 in 10 s
    assert result["speedup"] == {"paceline off": {"step": 2.0, "tokens_per_s": pytest.approx(4.8)}}
    assert json.loads(json.dumps(result))["arms"][1]["steps"][0]["seconds"] == 5.0
    assert bench_loop.table(result).row_count == 2


def test_a_peer_that_is_missing_is_a_preflight_error(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="does not run"):
        bench_loop._require_peer(tmp_path / "python", "trl")
    with pytest.raises(PreflightError, match="pip install"):
        bench_loop._require_peer(Path(sys.executable), "no_such_peer")


def test_a_side_that_fails_is_reported_with_its_last_word() -> None:
    with pytest.raises(PreflightError, match="ended with 1: out of luck"):
        bench_loop._run([sys.executable, "-c", "raise SystemExit('out of luck')"], threads=1)


def test_the_peers_script_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(bench_trl.__file__).read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {"configs", "kernels", "drafter", "rollout", "rl", "launch"}
    assert not {module.partition(".")[0] for module in modules} & ours


def test_the_shared_reward_counts_digits() -> None:
    assert bench_trl.digit_share("a1b2") == 0.5
    assert bench_trl.digit_share("") == 0.0


@pytest.mark.slow
def test_the_loop_is_timed_against_a_peer_from_end_to_end(tiny_model_dir: Path, tmp_path: Path) -> None:
    peer, out = tmp_path / "python", tmp_path / "results" / "out.json"
    peer.write_text(PEER.format(python=sys.executable))
    peer.chmod(0o755)
    arguments = ["loop", "--peer-python", str(peer), "--json", str(out), "--steps", "2"]
    arguments += ["--threads", "1", f"model={tiny_model_dir}", "rollout.max_new_tokens=8", "rollout.group_size=2"]
    result = CliRunner().invoke(bench.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(out.read_text())
    assert [arm["name"] for arm in written["arms"]] == ["trl", "paceline off", "paceline suffix"]
    for arm in written["arms"]:
        assert len(arm["steps"]) == 2  # the warm-up is left out
        assert arm["seconds"]["median"] > 0
        assert arm["versions"]
    assert written["arms"][1]["accept_length"] == 1.0
    # the same seed samples the same tokens: speculation changes the speed alone
    off, suffix = ([timed["tokens"] for timed in arm["steps"]] for arm in written["arms"][1:])
    assert off == suffix

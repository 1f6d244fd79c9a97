"""A whole run with vLLM as its engine, from the command line to the end of the process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drafter.eagle import EagleConfig, EagleHead
from drafter.export import write_drafter
from drafter.layouts import Origin
from rollout.model import load_config

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/run tests it in an environment of its own")
pytestmark = pytest.mark.slow

RECIPE = """
model: {model}
run: {{dir: {run}}}
compute: {{device: cpu, dtype: float32}}
data: {{name: chain_sum, size: 64}}
reward: {{functions: {{format: 1.0}}, format: '(?s).*[0-9].*'}}
rollout: {{backend: vllm, prompts_per_step: 4, group_size: 4, max_new_tokens: 12}}
spec: {{source: off}}
train: {{steps: 3, lr: 1.0e-3}}
eval: {{every: 3, num_prompts: 4}}
"""


def test_a_policy_trains_on_rollouts_of_its_present_weights(served_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(model=served_dir, run=run))
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(recipe)], capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    steps = [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert any(step["grad_norm"] > 0 for step in steps), "the policy never moved"
    # float32 on both sides: log-probs of other weights than the trainer's would be off by far more
    assert max(step["logprob_diff_p99"] for step in steps) < 1e-3


def test_a_drafter_learns_beside_vllm_and_is_published_to_it(served_dir: Path, tmp_path: Path) -> None:
    shape = EagleConfig.of(load_config(served_dir), draft_vocab=128, window=64)
    start = tmp_path / "drafter"
    start.mkdir()
    origin = Origin("tiny", ["LlamaForCausalLM"], "0" * 64, 0, 3)
    write_drafter(start, EagleHead(shape), layout="eagle3", dtype=torch.float32, origin=origin)
    run = tmp_path / "run"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(model=served_dir, run=run))
    options = [
        "spec.source=eagle", "spec.depth=3", f"drafter.init={start}", "drafter.budget=1.0", "drafter.batch_tokens=512",
        "drafter.lr=3e-3", "rollout.prompts_per_step=16", "rollout.max_new_tokens=32", "rollout.temperature=0.3",
        "train.steps=7", "train.lr=1e-5", "eval.every=0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(recipe), *options],
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert not any("drafter_off" in step for step in steps)
    assert steps[0]["drafter_buffer_tokens"] > 0 and sum(step["drafter_steps"] for step in steps) > 0
    assert steps[-1]["drafter_version"] > 1, "a better head was published"
    # what vLLM itself accepts: of a random head almost nothing
    assert steps[-1]["accept_length"] > steps[0]["accept_length"]

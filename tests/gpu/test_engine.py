"""The engine on a GPU: graphs, drafts and preemption change no token, and training's forward agrees."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import RolloutConfig
from drafter.ngram import NgramDrafter
from drafter.types import OFF, Strategy
from kernels.sample import noise_words
from rollout.engine import NativeEngine
from rollout.fused import FusedDecoder
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

pytestmark = pytest.mark.gpu

Key = tuple[str, int]
SAMPLING = Sampling(num_samples=3, max_new_tokens=40, stop_token_ids=(2,), seed=3, step=5)
PROMPTS = [
    Prompt(id=f"p{n}", token_ids=[(7 * n + 3 * i) % 256 + 3 for i in range(5 + 9 * n)], answer="") for n in range(4)
]
TREE = Strategy("suffix", depth=6, top_k=3, num_verify=15)
CHAIN = Strategy("suffix", depth=5, top_k=1, num_verify=5)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> PreTrainedModel:
    """The tiny model on the GPU, in float32: what differs there is a mistake, not rounding."""
    return load_policy(tiny_model_dir, device="cuda", dtype="float32")


def run(model: PreTrainedModel, strategy: Strategy = OFF, **options: int) -> tuple[NativeEngine, dict[Key, Rollout]]:
    drafter = None if strategy == OFF else NgramDrafter(min_match=1)
    rollout = RolloutConfig(**({"block_size": 16, "max_running": 8} | options))
    engine = NativeEngine(model, drafter=drafter, chooser=FixedChooser(strategy), rollout=rollout)

    async def everything() -> dict[Key, Rollout]:
        return {(r.prompt_id, r.sample): r async for r in engine.generate(PROMPTS, SAMPLING)}

    return engine, asyncio.run(everything())


def tokens(rollouts: dict[Key, Rollout]) -> dict[Key, list[int]]:
    return {key: rollout.token_ids for key, rollout in rollouts.items()}


def test_a_gpu_samples_what_a_cpu_does(policy: PreTrainedModel, tiny_model_dir: Path) -> None:
    engine, rollouts = run(policy)
    assert isinstance(engine._workspace.decoder, FusedDecoder)
    _, expected = run(load_policy(tiny_model_dir, device="cpu", dtype="float32"))
    assert tokens(rollouts) == tokens(expected)
    for key, rollout in rollouts.items():
        assert rollout.logprobs == pytest.approx(expected[key].logprobs, abs=1e-3)


@pytest.mark.parametrize("strategy", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("options", [{}, {"graph_mb": 0}, {"kv_tokens": 160}, {"max_running": 3}], ids=str)
def test_no_draft_graph_or_preemption_changes_a_token(
    policy: PreTrainedModel, strategy: Strategy, options: dict[str, int]
) -> None:
    _, expected = run(policy)
    engine, rollouts = run(policy, strategy, **options)
    assert tokens(rollouts) == tokens(expected)
    assert sum(rollout.spec.accepted for rollout in rollouts.values()) > 0
    if options.get("graph_mb") == 0:
        assert engine.graph_bytes == 0
    else:
        assert engine._workspace.graphs.num_captures > 0


def test_weights_changed_in_place_are_sampled_from_at_once(tiny_model_dir: Path) -> None:
    model = load_policy(tiny_model_dir, device="cuda", dtype="float32")
    engine, before = run(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.update(1)

    async def again() -> dict[Key, Rollout]:
        return {(r.prompt_id, r.sample): r async for r in engine.generate(PROMPTS, SAMPLING)}

    captures = engine._workspace.graphs.num_captures
    after = tokens(asyncio.run(again()))
    assert engine._workspace.graphs.num_captures == captures, "the graphs of the old weights serve the new ones"
    assert after == tokens(run(model)[1])
    assert after != tokens(before)


def test_noise_has_the_same_bits_on_every_device() -> None:
    keys, positions = torch.tensor([5, -7, 2**62]), torch.tensor([1, 4096, 3])
    here = noise_words(keys, positions, 50257)
    there = noise_words(keys.cuda(), positions.cuda(), 50257)
    assert torch.equal(here, there.cpu())

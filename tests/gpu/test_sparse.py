"""Drafting under sparse attention on a GPU: in graphs, through Triton, and still no other token."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import LayersConfig, RolloutConfig, SparseConfig
from drafter.gate import GateConfig, Gates
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.gate_selector import GateSelector
from rollout.model import load_policy
from rollout.selectors import choice_of, make_sparse
from rollout.sparse import Part, SparseAttention
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

pytestmark = pytest.mark.gpu

Key = tuple[str, int]
SAMPLING = Sampling(num_samples=3, max_new_tokens=40, stop_token_ids=(2,), seed=3, step=5, temperature=0.7)
PROMPTS = [
    Prompt(id=f"p{n}", token_ids=[(7 * n + 3 * i) % 256 + 3 for i in range(5 + 90 * n)], answer="") for n in range(4)
]
SPARSE = SparseConfig(mode="draft", select_block=16, budget_tokens=64, window=16, depth=5)
STRATEGY = Strategy("sparse", 5, 1, 5)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> PreTrainedModel:
    """The tiny model on the GPU, in float32: what differs there is a mistake, not rounding."""
    return load_policy(tiny_model_dir, device="cuda", dtype="float32")


def run(
    policy: PreTrainedModel, sparse: SparseAttention | None, **options: int
) -> tuple[NativeEngine, dict[Key, Rollout]]:
    engine = NativeEngine(
        policy,
        drafter=None if sparse is None else SelfDrafter(),
        chooser=FixedChooser(OFF if sparse is None else STRATEGY),
        rollout=RolloutConfig(**({"block_size": 32, "max_running": 8} | options)),
        sparse=sparse,
    )

    async def everything() -> dict[Key, Rollout]:
        return {(r.prompt_id, r.sample): r async for r in engine.generate(PROMPTS, SAMPLING)}

    return engine, asyncio.run(everything())


def attention(policy: PreTrainedModel, selector: str, budget: int) -> SparseAttention:
    config = SparseConfig(mode="draft", selector=selector, select_block=16, budget_tokens=budget, window=16)  # type: ignore[arg-type]
    if selector == "by layer":
        layers = {"0": LayersConfig("quest"), "1": LayersConfig("verified", 48)}
        return make_sparse(replace(config, selector="quest", layers=layers), policy)
    if selector in ("gate", "gate-fp8"):
        gates = Gates(GateConfig.of(policy.config, select_block=16), seed=1).to(policy.device)
        layers = range(gates.config.num_layers)
        dtype = torch.float8_e4m3fn if selector == "gate-fp8" else None
        by_gates = GateSelector(gates.requires_grad_(False), choice_of(config), layers=layers, dtype=dtype)
        return SparseAttention([Part(layers, by_gates)])
    return make_sparse(config, policy)


@pytest.mark.parametrize("selector", ["quest", "mean", "verified", "streaming", "gate", "gate-fp8", "by layer"])
@pytest.mark.parametrize("options", [{}, {"graph_mb": 0}, {"kv_tokens": 640}], ids=str)
def test_no_selector_graph_or_preemption_changes_a_token(
    policy: PreTrainedModel, selector: str, options: dict[str, int]
) -> None:
    _, expected = run(policy, None)
    engine, rollouts = run(policy, attention(policy, selector, 64), **options)
    assert {key: each.token_ids for key, each in rollouts.items()} == {
        key: each.token_ids for key, each in expected.items()
    }
    accepted = sum(rollout.spec.accepted for rollout in rollouts.values())
    assert 0 < accepted < sum(rollout.spec.proposed for rollout in rollouts.values())
    assert (engine.graph_bytes == 0) == (options.get("graph_mb") == 0)


def test_a_budget_for_everything_drafts_what_is_sampled(policy: PreTrainedModel) -> None:
    _, rollouts = run(policy, attention(policy, "quest", 4096))
    accepted = sum(rollout.spec.accepted for rollout in rollouts.values())
    assert accepted == sum(rollout.spec.proposed for rollout in rollouts.values()) > 0

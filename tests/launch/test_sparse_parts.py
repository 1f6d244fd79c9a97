"""A run's engine with sparse attention, as its config puts it together: who drafts, and what is sampled."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from configs.load import parse
from configs.schema import Config
from drafter.combined import CombinedDrafter
from drafter.selfdraft import SelfDrafter
from drafter.suffix import SuffixDrafter
from launch.parts import _make_engine
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.types import Prompt, Rollout, Sampling

BASE = "data: {name: chain_sum}\n"
SPARSE = [
    "sparse.mode=draft",
    "sparse.select_block=4",
    "sparse.budget_tokens=64",
    "sparse.window=4",
    "sparse.depth=4",
    "rollout.max_running=4",
]
PROMPTS = [Prompt(id=f"p{count}", token_ids=[3 + (7 * n) % 250 for n in range(count)], answer="") for count in (4, 90)]
SAMPLING = Sampling(num_samples=2, max_new_tokens=16, stop_token_ids=(2,), seed=1, step=0, temperature=0.7)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> PreTrainedModel:
    return load_policy(tiny_model_dir, device="cpu", dtype="float32")


def engine_of(tiny: PreTrainedModel, *overrides: str) -> tuple[Config, NativeEngine]:
    config = parse(BASE, ["rollout.block_size=16", *overrides])
    return config, _make_engine(config, tiny, None)[0]


def rollouts_of(engine: NativeEngine) -> dict[tuple[str, int], Rollout]:
    async def collect() -> list[Rollout]:
        return [rollout async for rollout in engine.generate(PROMPTS, SAMPLING)]

    return {(rollout.prompt_id, rollout.sample): rollout for rollout in asyncio.run(collect())}


@pytest.mark.parametrize(
    ("overrides", "sources"),
    [
        (["spec.source=off"], {"sparse"}),
        (["spec.source=suffix"], {"suffix", "sparse"}),
        (["spec.source=off", "sparse.inner=suffix"], {"sparse"}),
        (["spec.source=off", "sparse.layers={0: {selector: mean}, 1: {selector: verified}}"], {"sparse"}),
        (["spec.source=eagle", "sparse.inner=eagle", "drafter.draft_vocab=64"], {"sparse"}),
        (["spec.source=auto", "sparse.inner=suffix", "drafter.draft_vocab=64"], {"suffix", "sparse"}),
    ],
    ids=lambda given: str(sorted(given)),  # a set's own order differs from process to process
)
def test_samples_are_those_without_it(tiny: PreTrainedModel, overrides: list[str], sources: set[str]) -> None:
    expected = rollouts_of(engine_of(tiny, "spec.source=off")[1])
    rollouts = rollouts_of(engine_of(tiny, *SPARSE, *overrides)[1])
    assert {key: rollout.token_ids for key, rollout in rollouts.items()} == {
        key: rollout.token_ids for key, rollout in expected.items()
    }
    # a head that was never published proposes nothing
    drafted = {source for rollout in rollouts.values() for source in rollout.spec.by_source}
    assert "sparse" in drafted and drafted <= sources
    assert {rollout.sampled_under for rollout in rollouts.values()} == {"dense"}


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["spec.source=off"], type(None)),
        (["spec.source=suffix"], SuffixDrafter),
        ([*SPARSE, "spec.source=off"], SelfDrafter),
        ([*SPARSE, "spec.source=off", "sparse.inner=suffix"], CombinedDrafter),
    ],
    ids=str,
)
def test_nobody_drafts_who_is_not_asked_to(tiny: PreTrainedModel, overrides: list[str], kind: type[Any]) -> None:
    config, engine = engine_of(tiny, *overrides)
    assert type(engine._drafter) is kind
    assert (engine.sparse is None) == (config.sparse.mode == "off")

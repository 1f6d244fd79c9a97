"""A head and its rings beside a real engine: the same rollouts, and features that a plain forward computes too."""

import asyncio
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.schema import RolloutConfig
from drafter.buffer import FeatureWindow
from drafter.eagle import EagleConfig, EagleHead
from drafter.eagle_serving import EagleDrafter
from drafter.rings import FeatureRings
from drafter.types import OFF, Strategy
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLING = Sampling(num_samples=3, max_new_tokens=40, stop_token_ids=(2,), seed=3, step=5, temperature=0.8)
PROMPTS = [Prompt(id=f"p{n}", token_ids=list(range(7, 12 + 5 * n)), answer="", task={}) for n in range(4)]
CHAIN = Strategy(source="eagle", depth=4, top_k=1, num_verify=4)
TREE = Strategy(source="eagle", depth=3, top_k=3, num_verify=8)


class Shelf:
    """A sink that keeps everything."""

    temperature = SAMPLING.temperature

    def __init__(self) -> None:
        self.windows: list[FeatureWindow] = []

    def add(self, window: FeatureWindow) -> None:
        self.windows.append(window)


def rollouts_of(engine: NativeEngine) -> dict[tuple[str, int], Rollout]:
    async def collect() -> list[Rollout]:
        return [rollout async for rollout in engine.generate(PROMPTS, SAMPLING)]

    return {(rollout.prompt_id, rollout.sample): rollout for rollout in asyncio.run(collect())}


@pytest.mark.parametrize("strategies", [(CHAIN,), (TREE,), (OFF, CHAIN, TREE)], ids=["chain", "tree", "switching"])
@pytest.mark.parametrize("kv_tokens", [0, 128], ids=["ample", "evicting"])
def test_rollouts_are_the_same_and_features_are_those_of_a_plain_forward(
    tiny_model_dir: Path, strategies: tuple[Strategy, ...], kv_tokens: int
) -> None:
    options = RolloutConfig(max_running=5, block_size=8, kv_tokens=kv_tokens, graph_mb=256)
    policy = load_policy(tiny_model_dir, device=DEVICE.type, dtype="float32")
    expected = rollouts_of(NativeEngine(policy, drafter=None, chooser=FixedChooser(OFF), rollout=options))

    head = EagleHead(EagleConfig.of(policy.config, draft_vocab=40, window=16), seed=1)
    shelf = Shelf()
    rings = FeatureRings(
        aux_layers=head.config.aux_layers,
        hidden_size=head.config.hidden_size,
        window=12,
        max_nodes=8,
        dtype=torch.float32,
        device=DEVICE,
        sink=shelf,  # type: ignore[arg-type]
        max_windows=math.inf,
    )
    embedding = policy.get_input_embeddings().weight.detach()
    drafter = EagleDrafter(head.config, embedding=embedding, rings=rings, temperature=0.8, device=DEVICE)
    drafter.publish(head.state_dict(), version=1)
    chooser = FixedChooser(*strategies)
    rollouts = rollouts_of(NativeEngine(policy, drafter=drafter, chooser=chooser, rollout=options, reader=rings))
    assert {key: rollout.token_ids for key, rollout in rollouts.items()} == {
        key: rollout.token_ids for key, rollout in expected.items()
    }
    proposed = sum(rollout.spec.proposed for rollout in rollouts.values())
    assert proposed > 0

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).to(DEVICE)
    prompts = {prompt.id: prompt.token_ids for prompt in PROMPTS}
    states = {}
    for (prompt_id, sample), rollout in rollouts.items():
        tokens = torch.tensor([prompts[prompt_id] + rollout.token_ids], device=DEVICE)
        with torch.no_grad():
            hidden = plain(tokens, output_hidden_states=True).hidden_states
        aux = torch.cat([hidden[layer][0] for layer in head.config.aux_layers], dim=1)
        states[prompt_id, sample] = (tokens[0], aux, hidden[-1][0])
    seen = 0
    for window in shelf.windows:
        span = slice(window.first, window.first + window.num_tokens)
        # which sample it is of, its tokens say
        fitting = [
            (aux, hidden)
            for (prompt_id, _), (tokens, aux, hidden) in states.items()
            if prompt_id == window.prompt_id
            and torch.equal(tokens[span], window.token_ids.long())
            and torch.equal(tokens[1:][span], window.next_ids.long())
        ]
        assert fitting, window.first
        aux, hidden = min(fitting, key=lambda pair: float((pair[0][span] - window.aux).abs().max()))
        torch.testing.assert_close(window.aux, aux[span], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(window.hidden, hidden[span], atol=2e-4, rtol=1e-4)
        assert (window.alt_ids != window.next_ids).all()
        seen += window.num_tokens
    # a text's first known position is its pending token's, and what was forwarded anew after an eviction comes again
    total = sum(len(rollout.token_ids) for rollout in rollouts.values())
    assert seen == total if kv_tokens == 0 else seen <= total
    assert any((window.alt_ids >= 0).any() for window in shelf.windows)

"""A drafter that learns from an engine's rollouts and drafts for it: the parts together, on the tiny model."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from configs.schema import Config, DrafterConfig, RolloutConfig, SpecConfig
from drafter.buffer import FeatureBuffer
from drafter.evaluate import walk
from drafter.learner import Learner
from drafter.rings import FeatureRings
from drafter.types import Strategy
from kernels.sample import noise_key
from launch.drafting import make_drafting
from rl.features import Text, text_features
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

DEPTH = 3
SAMPLING = Sampling(num_samples=2, max_new_tokens=60, stop_token_ids=(2,), seed=3, step=0, temperature=0.7)
PROMPTS = [Prompt(id=f"p{index}", token_ids=[1, *range(20 + index, 40)], answer="") for index in range(24)]


class Run:
    """An engine with a learned drafter, as a run has them, without a loop."""

    def __init__(self, model: Path, source: Literal["eagle", "auto"] = "eagle", *, num_running: int = 64) -> None:
        strategy = Strategy(source="eagle", depth=DEPTH, top_k=1, num_verify=DEPTH)
        suffix = Strategy(source="suffix", depth=DEPTH, top_k=1, num_verify=DEPTH)
        options = DrafterConfig(
            draft_vocab=128, window=16, feature_window=16, unroll=DEPTH, batch_tokens=512, lr=3e-3, buffer_mb=64
        )
        rollout = RolloutConfig(max_running=num_running, temperature=SAMPLING.temperature)
        self.config = Config(rollout=rollout, spec=SpecConfig(source=source), drafter=options)
        self.policy = load_policy(model, device="cpu", dtype="float32")
        chooser = FixedChooser(strategy) if source == "eagle" else FixedChooser(strategy, suffix)
        drafting = make_drafting(self.config, self.policy, chooser)
        assert isinstance(drafting.learner, Learner) and isinstance(drafting.reader, FeatureRings)
        drafting.reader._max_windows = math.inf  # every token: runs this short would hand on a few windows alone
        self.learner = drafting.learner
        self.engine = NativeEngine(
            self.policy, drafter=drafting.drafter, chooser=chooser, rollout=rollout, reader=drafting.reader
        )

    @property
    def buffer(self) -> FeatureBuffer:
        return self.learner._buffer

    def rollouts(
        self, sampling: Sampling = SAMPLING, prompts: list[Prompt] = PROMPTS
    ) -> dict[tuple[str, int], Rollout]:
        async def collect() -> list[Rollout]:
            return [rollout async for rollout in self.engine.generate(PROMPTS, sampling)]

        return {(rollout.prompt_id, rollout.sample): rollout for rollout in asyncio.run(collect())}

    def teach(self, steps: int) -> None:
        token_ids = [token for rollout in self.rollouts().values() for token in rollout.token_ids]
        self.learner.begin(torch.bincount(torch.tensor(token_ids), minlength=self.policy.config.vocab_size))
        left = iter(range(steps))
        self.learner.learn(budget_s=300, until=lambda: next(left, None) is None)
        assert self.learner.settle(self.engine.version).outcome == "published"


@pytest.fixture(scope="module")
def taught(tiny_model_dir: Path) -> Run:
    """A run whose drafter has learned a little and is served."""
    run = Run(tiny_model_dir)
    run.teach(60)
    return run


def test_what_the_rings_kept_is_what_a_packed_forward_computes(taught: Run) -> None:
    """The features a drafter learns from in a run are those of its texts, at their true positions."""
    rollouts = taught.rollouts()
    prompts = {prompt.id: prompt for prompt in PROMPTS}
    kept = taught.buffer.batch(1 << 20)
    texts = [
        Text(prompts[name].token_ids + rollout.token_ids, len(prompts[name].token_ids))
        for (name, _), rollout in rollouts.items()
    ]
    aux_layers = taught.learner._trainer.head.config.aux_layers
    own = text_features(taught.policy, texts, aux_layers=aux_layers, temperature=0.7, with_prompt=False)
    places = {}
    for start, end, text in zip(own.cu_seqlens.tolist(), own.cu_seqlens.tolist()[1:], texts, strict=False):
        for index in range(start, end):
            position = int(own.positions[index])
            places[position, tuple(text.token_ids[: position + 2])] = index
    bounds = kept.cu_seqlens.tolist()
    checked = 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        position, token_ids = int(kept.positions[start]), kept.token_ids[start:end].tolist()
        found = [
            index
            for (place, said), index in places.items()
            if place == position and list(said[position:]) == [token_ids[0], int(kept.next_ids[start])]
        ]
        for index in found:
            if own.token_ids[index : index + end - start].tolist() == token_ids:
                torch.testing.assert_close(
                    kept.hidden[start:end], own.hidden[index : index + end - start], atol=1e-4, rtol=1e-4
                )
                torch.testing.assert_close(
                    kept.aux[start:end], own.aux[index : index + end - start], atol=1e-4, rtol=1e-4
                )
                checked += end - start
                break
    assert checked > len(own.hidden) // 2


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_live_acceptance_is_what_the_head_earns_on_the_finished_texts(taught: Run, temperature: float) -> None:
    """Cycle by cycle: serving, its rings and its cache against the training code over whole texts."""
    sampling = replace(SAMPLING, seed=9, temperature=temperature)
    rollouts = taught.rollouts(sampling)
    head = taught.learner._publisher._served
    prompts = {prompt.id: prompt for prompt in PROMPTS}
    expected, live = [], []
    for (name, sample), rollout in rollouts.items():
        prompt = prompts[name].token_ids
        text = Text(prompt + rollout.token_ids, len(prompt))
        features = text_features(
            taught.policy, [text], aux_layers=head.config.aux_layers, temperature=temperature, with_prompt=False
        )
        key = noise_key(seed=sampling.seed, step=sampling.step, prompt_id=name, sample=sample)
        cycles = walk(
            head,
            features,
            first=[0],
            embedding=taught.policy.get_input_embeddings().weight,
            depth=DEPTH,
            keys=torch.tensor([key]) if temperature else None,
        )
        expected.append(sum(cycles.accepted))
        live.append(rollout.spec.accepted)
        assert rollout.spec.by_source.get("eagle", (0, 0))[1] == rollout.spec.accepted
    assert sum(live) > (100 if temperature else 0)
    assert live == expected


def test_greedy_evaluations_leave_no_features(tiny_model_dir: Path) -> None:
    run = Run(tiny_model_dir)
    run.rollouts(replace(SAMPLING, temperature=0.0, step=-1))
    assert run.buffer.num_bytes == 0
    run.rollouts()
    kept = run.buffer.num_bytes
    assert kept > 0
    run.rollouts(replace(SAMPLING, temperature=0.0, step=-1))
    assert run.buffer.num_bytes == kept


@pytest.mark.parametrize("source", ["eagle", "auto"])
def test_a_learned_drafter_changes_no_token(tiny_model_dir: Path, source: Literal["eagle", "auto"]) -> None:
    run = Run(tiny_model_dir, source, num_running=5)
    before = run.rollouts()
    run.teach(30)
    after = run.rollouts()
    assert {key: rollout.token_ids for key, rollout in after.items()} == {
        key: rollout.token_ids for key, rollout in before.items()
    }
    assert sum(rollout.spec.accepted for rollout in after.values()) > 0
    greedy = replace(SAMPLING, temperature=0.0)
    plain = Run(tiny_model_dir, source, num_running=5).rollouts(greedy)
    assert {key: r.token_ids for key, r in run.rollouts(greedy).items()} == {
        key: r.token_ids for key, r in plain.items()
    }


def test_what_is_learned_from_and_drafted_with_is_no_storage_of_the_policy(taught: Run) -> None:
    policy = {parameter.untyped_storage().data_ptr() for parameter in taught.policy.parameters()}
    trained = {tensor.untyped_storage().data_ptr() for tensor in taught.learner._trainer.head.state_dict().values()}
    served = {tensor.untyped_storage().data_ptr() for tensor in taught.learner._publisher.served.values()}
    kept = taught.buffer.batch(1 << 20)
    features = {tensor.untyped_storage().data_ptr() for tensor in (kept.hidden, kept.aux)}
    assert not policy & (trained | served | features) and not trained & served

"""What a feature reader is given: the hidden states that a dense forward of the finished text has, none left out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import RolloutConfig
from drafter.buffer import FeatureWindow
from drafter.types import OFF, CycleFeatures, Rows, Strategy, Texts
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
MakeEngine = Callable[..., NativeEngine]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]
SAMPLING = Sampling(num_samples=2, max_new_tokens=20, stop_token_ids=(2,), seed=3, step=5)


@dataclass
class Recorder:
    """Keeps everything, and sees that it is told everything. by position: aux of each layer, and the hidden state."""

    aux_layers: tuple[int, ...] = (1, 0, 1)
    known: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)  # by text
    lengths: dict[int, int] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)
    finished: list[tuple[list[int], dict[int, torch.Tensor]]] = field(default_factory=list)
    num_rows: int = 0
    num_begun: int = 0
    texts: Texts | None = None

    def attach(self, texts: Texts, *, num_rows: int) -> None:
        assert (texts.groups == -1).all()
        assert not self.known
        self.texts, self.num_rows = texts, num_rows

    def begin(self, texts: Sequence[int], lengths: Sequence[int]) -> None:
        assert self.texts is not None
        for text, length in zip(texts, lengths, strict=True):
            assert text not in self.known
            assert int(self.texts.lengths[text]) == length
            self.known[text], self.lengths[text] = {}, length
        self.num_begun += len(texts)
        assert len(self.known) <= self.num_rows

    def observe(self, texts: Texts, rows: Rows, features: CycleFeatures) -> None:
        assert texts is self.texts
        assert len(features.aux) == 3
        each = features.path.shape[1]
        assert features.hidden.shape[0] == features.num_rows * each
        assert (features.drafts is None) == (each == 1)
        for row in range(features.num_rows):
            text, count = int(rows.text[row]), int(features.counts[row])
            for place in range(count):
                column = int(features.path[row, place])
                assert 0 <= column <= int(features.num_valid[row])
                position = int(texts.lengths[text]) - count - 1 + place
                assert position not in self.known[text]
                states = [*features.aux, features.hidden]
                self.known[text][position] = torch.stack([state[row * each + column] for state in states])

    def committed(self, texts: np.ndarray, lengths: np.ndarray, *, version: int, finished: np.ndarray) -> None:
        assert self.texts is not None
        for text, length, ends in zip(texts.tolist(), lengths.tolist(), finished.tolist(), strict=True):
            assert self.lengths[text] < length <= int(self.texts.lengths[text])
            assert all(position in self.known[text] for position in range(self.lengths[text] - 1, length - 1))
            self.lengths[text] = length
            self.versions.append(version)
            if ends:
                self.finished.append((self.texts.tokens[text, :length].tolist(), dict(self.known[text])))

    def release(self, texts: Sequence[int]) -> None:
        for text in texts:
            del self.known[text], self.lengths[text]


def dense(model: PreTrainedModel, token_ids: list[int], layers: Sequence[int]) -> torch.Tensor:
    """What the module computes for a text: [T, len(layers) + 1, H], the final hidden state last."""
    entered: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=index: entered.__setitem__(index, args[0][0]))
        for index, layer in enumerate(model.base_model.layers)
    ]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([token_ids], device=model.device), use_cache=False).last_hidden_state[0]
    model.set_attn_implementation(implementation)
    for hook in hooks:
        hook.remove()
    return torch.stack([*(entered[index] for index in layers), hidden], dim=1)


@pytest.fixture
def reading_engine(policy: PreTrainedModel) -> Callable[..., tuple[NativeEngine, Recorder]]:
    """An engine on the device, and what reads in it."""

    def make(drafter: Any, strategy: Strategy, **options: Any) -> tuple[NativeEngine, Recorder]:
        reader = Recorder()
        engine = NativeEngine(
            policy,
            drafter=drafter,
            chooser=FixedChooser(strategy),
            rollout=RolloutConfig(**({"block_size": 4, "max_running": 8} | options)),
            reader=reader,
        )
        return engine, reader

    return make


def assert_all_read(reader: Recorder, model: PreTrainedModel, rollouts: dict[Key, Rollout]) -> None:
    assert not reader.known, "a text is still written"
    assert len(reader.finished) == len(rollouts)
    for token_ids, known in reader.finished:
        expected = dense(model, token_ids, reader.aux_layers)
        assert max(known) == len(token_ids) - 2
        for position, states in known.items():
            torch.testing.assert_close(states, expected[position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["off", "chain", "tree"])
def test_a_reader_is_given_what_a_dense_forward_computes(
    shape: str,
    reading_engine: Callable[..., tuple[NativeEngine, Recorder]],
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    policy: PreTrainedModel,
    resident_scripted: type,
    request: pytest.FixtureRequest,
    assert_same: AssertSame,
) -> None:
    expected = collect(make_engine(), prompts, SAMPLING)
    truth = {key: rollout.token_ids for key, rollout in expected.items()}
    drafter = None if shape == "off" else resident_scripted(truth, 0.7, 259)
    engine, reader = reading_engine(drafter, OFF if shape == "off" else request.getfixturevalue(shape))
    for _ in range(2):
        rollouts = collect(engine, prompts, SAMPLING)
        assert_same(rollouts, expected)
        assert_all_read(reader, policy, rollouts)
        assert all(len(known) == len(tokens) - 1 - min(known) for tokens, known in reader.finished)
        reader.finished.clear()


@pytest.mark.parametrize("kv_tokens", [96, 112, 160])
def test_evicted_texts_are_read_on_from_where_they_go_on(
    kv_tokens: int,
    reading_engine: Callable[..., tuple[NativeEngine, Recorder]],
    collect: Collect,
    prompts: list[Prompt],
    policy: PreTrainedModel,
    tree: Strategy,
    resident_scripted: type,
) -> None:
    engine, reader = reading_engine(resident_scripted({}, 0.5, 259), tree, kv_tokens=kv_tokens)
    rollouts = collect(engine, prompts, SAMPLING)
    assert_all_read(reader, policy, rollouts)
    assert reader.num_begun > len(rollouts)


def test_a_reader_hears_versions_and_of_sequences_that_go_elsewhere(
    reading_engine: Callable[..., tuple[NativeEngine, Recorder]], prompts: list[Prompt], policy: PreTrainedModel
) -> None:
    engine, reader = reading_engine(None, OFF)
    other, second = reading_engine(None, OFF)
    sampling = replace(SAMPLING, stop_token_ids=())

    async def run() -> dict[Key, Rollout]:
        rollouts = engine.generate(prompts, sampling)
        pending = asyncio.ensure_future(anext(rollouts))
        for _ in range(8):
            await asyncio.sleep(0)
        engine.update(5)
        assert not reader.known
        for _ in range(4):
            await asyncio.sleep(0)
        moved = engine.surrender(3)
        found = [await pending, *[rollout async for rollout in rollouts]]
        found += [rollout async for rollout in other.generate([], sampling, partials=moved)]
        return {(r.prompt_id, r.sample): r for r in found}

    rollouts = asyncio.run(run())
    assert len(rollouts) == 8
    assert set(reader.versions) == {0, 5}
    assert set(second.versions) == {0}
    moved = len(second.finished)
    assert moved == 3
    assert_all_read(second, policy, {key: rollouts[key] for key in list(rollouts)[-moved:]})
    assert_all_read(reader, policy, {key: rollouts[key] for key in list(rollouts)[:-moved]})


@dataclass
class Windows:
    """What rings hand on."""

    found: list[FeatureWindow] = field(default_factory=list)
    temperature: float = SAMPLING.temperature

    def add(self, window: FeatureWindow) -> None:
        self.found.append(window)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_rings_hand_on_in_any_cycle_is_what_a_dense_forward_computes(
    device: str,
    tiny_model_dir: Path,
    make_engine: MakeEngine,
    collect: Collect,
    prompts: list[Prompt],
    learned_drafting: Callable[..., Any],
    chain: Strategy,
    tree: Strategy,
) -> None:
    """On a GPU through captured graphs, whose every shape is replayed."""
    model = load_policy(tiny_model_dir, device=device, dtype="float32")
    sink = Windows()
    drafter, rings = learned_drafting(model, sink)
    strategies = [OFF, chain, tree, replace(chain, source="eagle"), replace(tree, source="eagle")]
    engine = NativeEngine(
        model,
        drafter=drafter,
        chooser=FixedChooser(*strategies),
        rollout=RolloutConfig(block_size=16, max_running=6),
        reader=rings,
    )
    for step in range(3):
        sampling = replace(SAMPLING, step=step, max_new_tokens=40)
        rollouts = collect(engine, prompts, sampling)
        expected = collect(make_engine(), prompts, sampling)
        assert {key: r.token_ids for key, r in rollouts.items()} == {key: r.token_ids for key, r in expected.items()}
        texts = {
            prompt.id: [prompt.token_ids + r.token_ids for r in rollouts.values() if r.prompt_id == prompt.id]
            for prompt in prompts
        }
        for window in sink.found:
            token_ids = [*window.token_ids.tolist(), int(window.next_ids[-1])]
            end = window.first + len(token_ids)
            text = next(text for text in texts[window.prompt_id] if text[window.first : end] == token_ids)
            states = dense(model, text, rings.aux_layers)[window.first : end - 1].flatten(1)
            torch.testing.assert_close(torch.cat([window.aux, window.hidden], dim=1), states, atol=2e-3, rtol=2e-3)
        sampled = sum(len(rollout.token_ids) for rollout in rollouts.values())
        assert sum(len(window.token_ids) for window in sink.found) == sampled
        sink.found.clear()
    assert {report["share"] > 0 for report in engine._chooser.summary()["arms"]} == {True}

"""What a drafter learns from beside an engine that shows no hidden states."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from drafter.buffer import FeatureBuffer, is_heldout
from drafter.eagle import EagleConfig, EagleHead
from drafter.export import named_as
from drafter.layouts import exported_shapes
from launch.vllm_parts import Published, TextReader
from rl.features import Text, text_features
from rollout.model import load_policy
from rollout.types import Prompt, Rollout, Sampling, SpecStats

SAMPLING = Sampling(num_samples=1, max_new_tokens=32, stop_token_ids=(2,), seed=0, step=4, temperature=0.7)
LAYERS = (0, 1, 1)
NAMES = [name for name in map("p{}".format, range(40)) if not is_heldout(name)][:6]


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> PreTrainedModel:
    return load_policy(tiny_model_dir, device="cpu", dtype="float32").eval()


def finished() -> list[tuple[Prompt, Rollout]]:
    """Rollouts of 5, 10, 15... tokens after prompts of 4."""
    pairs = []
    for number, name in enumerate(NAMES):
        tokens = [(7 * number + 3 * place) % 90 + 5 for place in range(5 * (number + 1))]
        rollout = Rollout(name, 0, tokens, [0.0] * len(tokens), [(4, len(tokens))], "stop", SpecStats(1, 0, 0))
        pairs.append((Prompt(id=name, token_ids=[1, 20, 21, 22 + number], answer=""), rollout))
    return pairs


def reader(policy: PreTrainedModel, *, max_tokens: int = 1000) -> tuple[TextReader, FeatureBuffer]:
    buffer = FeatureBuffer(max_bytes=1 << 20, temperature=0.7)
    read = TextReader(policy, aux_layers=LAYERS, buffer=buffer, window=8, batch_tokens=40, max_tokens=max_tokens)
    return read, buffer


def test_windows_are_of_responses_at_their_true_places(policy: PreTrainedModel) -> None:
    read, buffer = reader(policy)
    read(finished(), SAMPLING)
    batch = buffer.batch(1000)
    assert len(batch.positions) == sum(len(rollout.token_ids) for _, rollout in finished())
    assert set(batch.versions.tolist()) == {4} and int(batch.cu_seqlens.diff().max()) == 8
    texts = [Text([*prompt.token_ids, *rollout.token_ids], 4) for prompt, rollout in finished()]
    for index, text in enumerate(texts):
        own = text_features(policy, [text], aux_layers=LAYERS, temperature=0.7, with_prompt=False)
        for row in range(len(own.positions)):
            here = (batch.positions == own.positions[row]) & (batch.next_ids == own.next_ids[row])
            near = (batch.hidden[here] - own.hidden[row]).abs().amax(dim=1)
            assert float(near.min()) < 1e-4, (index, row)
            found = here.nonzero().flatten()[near.argmin()]
            torch.testing.assert_close(batch.aux[found], own.aux[row], atol=1e-4, rtol=1e-4)


def test_greedy_evaluations_are_not_read_and_of_rollouts_no_more_than_asked(policy: PreTrainedModel) -> None:
    read, buffer = reader(policy, max_tokens=40)
    greedy = Sampling(num_samples=1, max_new_tokens=32, stop_token_ids=(2,), seed=0, step=-1, temperature=0.0)
    read(finished(), greedy)
    assert buffer.num_bytes == 0
    read(finished(), SAMPLING)
    assert 0 < buffer.num_tokens <= 40
    read([], SAMPLING)


def test_a_window_keeps_no_more_memory_than_it_counts(policy: PreTrainedModel) -> None:
    read, buffer = reader(policy)
    read(finished(), SAMPLING)
    for windows in buffer._train._windows.values():
        for window in windows:
            assert window.hidden.untyped_storage().nbytes() == window.hidden.nbytes


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@pytest.mark.parametrize("draft_vocab", [64, 100])
def test_a_head_is_published_under_the_names_of_the_folder_vllm_began_with(layout: str, draft_vocab: int) -> None:
    shape = EagleConfig(
        hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=100,
        draft_vocab=draft_vocab, window=32, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
        aux_layers=(0, 1, 2),
    )  # fmt: skip
    given: dict[str, list[int]] = {}

    class Engine:
        def publish(self, state: dict[str, torch.Tensor], version: int) -> None:
            given.update({name: list(tensor.shape) for name, tensor in state.items()})

    state = EagleHead(shape).state_dict()
    Published(Engine(), shape, layout).publish(state, 1)  # type: ignore[arg-type]
    assert given == exported_shapes(shape, layout=layout)  # type: ignore[arg-type]
    assert named_as(state, shape, layout="eagle3").items() <= state.items()

"""Features of finished texts are the hidden states transformers computes, position by position."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rl.features import Text, batches, text_features
from rollout.model import load_policy

AUX = (0, 1)
TEXTS = [Text(list(range(5, 16)), 4), Text([7, 8, 200, 3], 1), Text(list(range(40, 60)), 19)]


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> PreTrainedModel:
    return load_policy(tiny_model_dir, device="cpu", dtype="float32")


@pytest.mark.parametrize("with_prompt", [True, False])
def test_every_position_has_transformers_own_states(
    policy: PreTrainedModel, tiny_model_dir: Path, with_prompt: bool
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    batch = text_features(policy, TEXTS, aux_layers=AUX, temperature=0.7, with_prompt=with_prompt, version=9)
    assert batch.temperature == 0.7
    assert batch.versions.tolist() == [9, 9, 9]
    starts = batch.cu_seqlens.tolist()
    for text, start, end in zip(TEXTS, starts, starts[1:], strict=False):
        first = 0 if with_prompt else text.num_prompt - 1
        ids = torch.tensor(text.token_ids)
        assert batch.positions[start:end].tolist() == list(range(first, len(ids) - 1))
        assert torch.equal(batch.token_ids[start:end], ids[first:-1])
        assert torch.equal(batch.next_ids[start:end], ids[first + 1 :])
        with torch.no_grad():
            output = plain(ids[None], output_hidden_states=True)
        aux = torch.cat([output.hidden_states[layer][0] for layer in AUX], dim=1)  # [layer] enters that layer
        torch.testing.assert_close(batch.aux[start:end], aux[first:-1], rtol=1e-4, atol=1e-4)
        logits = plain.lm_head(batch.hidden[start:end])
        torch.testing.assert_close(logits, output.logits[0, first:-1], rtol=1e-4, atol=1e-4)
    assert (batch.alt_ids == -1).all()
    assert len(batch.alt_hidden) == len(batch.alt_ids) == starts[-1]


def test_hooks_leave_the_policy_as_it_was(policy: PreTrainedModel) -> None:
    text_features(policy, TEXTS, aux_layers=AUX, temperature=0, with_prompt=True)
    assert not any(module._forward_pre_hooks for module in policy.modules())


def test_texts_are_grouped_in_order_and_a_long_one_stands_alone() -> None:
    groups = list(batches(TEXTS, 15))
    assert [[len(text.token_ids) for text in group] for group in groups] == [[11, 4], [20]]
    assert [text for group in groups for text in group] == TEXTS
    assert list(batches([], 15)) == []

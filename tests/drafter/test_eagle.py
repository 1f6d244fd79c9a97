"""The head's step: names and shapes engines load, causality, and what each position reads and predicts."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from drafter.eagle import EagleConfig, EagleHead, aux_layers

CONFIG = EagleConfig(
    hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=40, draft_vocab=24,
    window=6, rms_norm_eps=1e-5, rope_theta=10_000.0, max_position_embeddings=64, aux_layers=(0, 1, 2),
)  # fmt: skip


def test_the_head_has_the_tensors_that_engines_load() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in EagleHead(CONFIG).state_dict().items()}
    assert shapes == {
        "fc.weight": (16, 48),
        "midlayer.input_layernorm.weight": (16,),
        "midlayer.hidden_norm.weight": (16,),
        "midlayer.post_attention_layernorm.weight": (16,),
        "midlayer.self_attn.q_proj.weight": (32, 32),
        "midlayer.self_attn.k_proj.weight": (16, 32),
        "midlayer.self_attn.v_proj.weight": (16, 32),
        "midlayer.self_attn.o_proj.weight": (16, 32),
        "midlayer.mlp.gate_proj.weight": (24, 16),
        "midlayer.mlp.up_proj.weight": (24, 16),
        "midlayer.mlp.down_proj.weight": (16, 24),
        "norm.weight": (16,),
        "lm_head.weight": (24, 16),
        "d2t": (24,),
        "t2d": (40,),
    }


def test_only_weights_are_trained_and_equal_seeds_give_equal_ones() -> None:
    first, same, other = (EagleHead(CONFIG, seed=seed) for seed in (1, 1, 2))
    assert {name for name, _ in first.named_parameters()} == set(first.state_dict()) - {"d2t", "t2d"}
    assert torch.equal(first.fc.weight, same.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_a_head_takes_the_geometry_of_its_policy() -> None:
    qwen = Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=36, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    config = EagleConfig.of(qwen, draft_vocab=5000, window=128)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 2, 32)
    assert config.rope_theta == 1e6
    assert config.draft_vocab == 1000  # no more than the policy has
    assert config.aux_layers == (2, 18, 33)
    llama = LlamaConfig(vocab_size=1000, hidden_size=64, num_attention_heads=4, num_hidden_layers=3)
    assert EagleConfig.of(llama, draft_vocab=10, window=8).aux_layers == (0, 1, 2)


@pytest.mark.parametrize("num_layers", range(3, 40))
def test_aux_layers_are_three_and_in_the_policy(num_layers: int) -> None:
    layers = aux_layers(num_layers)
    assert len(set(layers)) == 3
    assert all(0 <= layer < num_layers for layer in layers)


def test_a_vocabulary_brings_a_copy_of_the_policys_output_weights() -> None:
    head, weights = EagleHead(CONFIG), torch.randn(40, 16)
    ids = torch.arange(1, 40)[:24]
    known = torch.zeros(40, dtype=torch.bool)
    known[ids] = True
    head.set_vocabulary(ids - torch.arange(24), known, weights)
    assert torch.equal(head.target_ids(), ids)
    assert torch.equal(head.lm_head.weight, weights[ids])
    weights.zero_()
    assert head.lm_head.weight.abs().sum() > 0


def test_a_step_agrees_with_transformers_decoder_layer() -> None:
    """Llama's own layer, its projections widened, is the same function of the concatenated input."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    llama = LlamaConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    head = EagleHead(CONFIG)
    attention = LlamaAttention(llama, layer_idx=0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, head.midlayer.self_attn[name])
    embeds, states = torch.randn(2, 7, 16)
    positions = torch.arange(30, 37)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    layer = head.midlayer
    norms = layer.input_layernorm(embeds), layer.hidden_norm(states)
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    embedding = LlamaRotaryEmbedding(llama)(embeds[None], positions[None])
    attended, _ = attention(torch.cat(norms, dim=1)[None], embedding, mask)
    residual = states + attended[0]
    inputs = layer.post_attention_layernorm(residual)
    gate, up, down = (layer.mlp[name] for name in ("gate_proj", "up_proj", "down_proj"))
    expected = residual + down(torch.nn.functional.silu(gate(inputs)) * up(inputs))
    outputs, _ = head.step(embeds, states, positions, head.empty_past(), visible)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(head.logits(outputs), head.lm_head(head.norm(expected)))


def test_steps_over_a_cache_equal_one_step_over_all() -> None:
    head = EagleHead(CONFIG)
    embeds, states = torch.randn(2, 5, 16)
    positions = torch.arange(5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    whole, _ = head.step(embeds, states, positions, head.empty_past(), causal)
    past, outputs = head.empty_past(), []
    for p in range(5):
        at = slice(p, p + 1)
        output, past = head.step(embeds[at], states[at], positions[at], past, causal[at, : p + 1])
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole)

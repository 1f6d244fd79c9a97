"""Gates: what they compute, from cached keys as from plain ones, and which policies they are for."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from configs.errors import PreflightError
from drafter.gate import GateConfig, Gates
from drafter.rope import Turns
from kernels.gate import rotate, unrotate

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 3, 4, 2, 16, 64
CONFIG = Qwen3Config(
    hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = Qwen3Config(
    hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
)  # fmt: skip


def make(config: Qwen3Config = CONFIG, *, gate_dim: int | None = None) -> Gates:
    """Gates whose weights and norms are all random."""
    gates = Gates(GateConfig.of(config, gate_dim=gate_dim), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in gates.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5
    return gates.requires_grad_(False)


def turned(x: torch.Tensor, positions: torch.Tensor, config: Qwen3Config) -> torch.Tensor:
    """x [T, heads, D] after the rotary embedding of transformers' own Qwen3."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

    cos, sin = Qwen3RotaryEmbedding(config)(x, positions[None])
    return apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0]


def written_out(gates: Gates, layer: int, query: torch.Tensor, keys: torch.Tensor, position: int) -> torch.Tensor:
    """Scores of the blocks of plain keys [S, Hkv, D] for one plain query [Hq, D], one head and block at a time."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        frequencies = torch.tensor(gates.config.gate_rope.frequencies)
        pairs = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat([pairs.real, pairs.imag]) * gates.config.gate_rope.scaling

    groups = HEADS // KV_HEADS
    scores = torch.empty(KV_HEADS, len(keys) // BLOCK)
    for head in range(KV_HEADS):
        merged = sum(query[head * groups + g] @ gates.query_weight[layer, head, g] for g in range(groups))
        assert isinstance(merged, torch.Tensor)
        asked = at(norm(merged, gates.query_norm[layer]), position)
        for block in range(len(keys) // BLOCK):
            k = keys[block * BLOCK : (block + 1) * BLOCK, head]
            pooled = torch.cat([k.max(dim=0).values, k.min(dim=0).values, k.mean(dim=0)])
            described = at(norm(pooled @ gates.key_weight[layer, head], gates.key_norm[layer]), block * BLOCK)
            scores[head, block] = asked @ described / gates.config.gate_dim**0.5
    return scores


@pytest.mark.parametrize("gate_dim", [None, 8], ids=["as wide as heads", "narrower"])
@pytest.mark.parametrize("config", [CONFIG, YARN], ids=["default", "yarn"])
def test_scores_from_cached_keys_are_those_of_plain_ones_written_out(config: Qwen3Config, gate_dim: int | None) -> None:
    gates, layer = make(config, gate_dim=gate_dim), 1
    torch.manual_seed(0)
    query, keys = torch.randn(2, HEADS, DIM), torch.randn(3 * BLOCK, KV_HEADS, DIM)
    positions = torch.tensor([200, 201])
    cached = turned(keys, torch.arange(len(keys)), config).unflatten(0, (3, BLOCK))
    compressed = gates.compress(layer, cached, torch.arange(3) * BLOCK)
    found = gates.scores(layer, turned(query, positions, config), positions, compressed[None])
    wanted = torch.stack([written_out(gates, layer, query[i], keys, int(positions[i])) for i in range(2)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_sequences_are_scored_by_their_own_blocks() -> None:
    gates = make()
    torch.manual_seed(0)
    query, positions = torch.randn(6, HEADS, DIM), torch.tensor([300, 301, 302, 70, 71, 72])
    keys, starts = torch.randn(2, 4, BLOCK, KV_HEADS, DIM), (torch.arange(4) * BLOCK).expand(2, 4)
    compressed = gates.compress(2, keys, starts)
    together = gates.scores(2, query, positions, compressed)
    apart = [gates.scores(2, query[i : i + 3], positions[i : i + 3], compressed[i // 3][None]) for i in (0, 3)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_new_gates_as_wide_as_heads_prefer_the_block_whose_mean_key_points_their_way() -> None:
    gates = Gates(GateConfig.of(CONFIG)).requires_grad_(False)
    torch.manual_seed(0)
    direction, place = torch.randn(DIM), torch.tensor([4 * BLOCK])
    keys = torch.randn(4, BLOCK, KV_HEADS, DIM) * 0.1
    keys[2] += direction
    # all blocks where the query stands, so that distances say nothing
    cached = turned(keys.flatten(0, 1), place + torch.arange(BLOCK).repeat(4), CONFIG).unflatten(0, (4, BLOCK))
    compressed = gates.compress(0, cached, place.expand(4))
    scores = gates.scores(0, turned(direction.expand(1, HEADS, DIM), place, CONFIG), place, compressed[None])
    assert (scores.argmax(dim=2) == 2).all()


def test_unrotate_undoes_scaled_and_rounded_rotations() -> None:
    rotation = Turns(GateConfig.of(YARN).rope).on(torch.device("cpu"))
    assert GateConfig.of(YARN).rope.scaling > 1
    positions = torch.tensor([0, 5, 4000])
    cos, sin = (part.bfloat16().float() for part in rotation.at(positions))
    x = torch.randn(3, KV_HEADS, DIM)
    torch.testing.assert_close(unrotate(rotate(x, cos, sin), cos, sin), x, atol=1e-5, rtol=1e-5)


def test_equal_seeds_give_equal_gates() -> None:
    first, same, other = (Gates(GateConfig.of(CONFIG), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.key_weight, same.key_weight)
    assert not torch.equal(first.key_weight, other.key_weight)


def test_gates_take_the_geometry_of_their_policy() -> None:
    llama = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    config = GateConfig.of(llama, select_block=32)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.gate_dim, config.select_block) == (64, 32)
    assert Gates(config).query_weight.shape == (30, 3, 3, 64, 64)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "no one rotary embedding"),
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}),
            "part",
        ),
    ],
    ids=["none", "partial"],
)
def test_a_rotary_embedding_that_cannot_be_undone_is_refused(config: LlamaConfig, reason: str) -> None:
    with pytest.raises(PreflightError, match=reason):
        GateConfig.of(config)

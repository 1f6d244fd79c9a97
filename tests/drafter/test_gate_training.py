"""Gates learn where attention goes, and then find more of it than the bounds of keys do."""

import pytest
import torch
from transformers import Qwen3Config

from drafter.gate import GateConfig, Gates
from drafter.gate_quality import Quality, bound_scores, selection_quality
from drafter.gate_training import GateTrainer, LayerSample, candidates, gate_loss
from kernels.attention import PackedSequences
from kernels.pooled_attention import block_weights, pooled_attention

HEADS, KV_HEADS, DIM, BLOCK, SCALE = 4, 2, 32, 16, 0.25
CONFIG = GateConfig.of(
    Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    select_block=BLOCK,
)  # fmt: skip
TOPICS, LENGTH = 6, 512
TOLD, PAIRED = [8, 9, 10, 11, 24, 25, 26, 27], [12, 14, 28, 30]  # dimensions


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] after the policy's rotary embedding."""
    angles = positions[:, None, None] * torch.tensor(CONFIG.rope.frequencies)
    pairs = torch.complex(*x.chunk(2, dim=2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=2)


class Policy:
    """Attention as a policy might have it: a quarter of a block's keys tell its topic, and queries ask for a topic.

    Topics are directions in some of a head's slowly turning dimensions. Others stand in pairs, in which queries are
    equal and keys opposite: their products cancel, which a bound that takes each dimension at its best cannot know.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._topics = torch.zeros(2, KV_HEADS, TOPICS, DIM)
        self._topics[..., TOLD] = torch.randn(2, KV_HEADS, TOPICS, len(TOLD), generator=generator)

    def sample(self, layer: int, seed: int) -> LayerSample:
        """The later half of a sequence."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        topics = self._topics[layer]
        told, asked = (torch.randint(TOPICS, (count,), generator=generator) for count in (LENGTH // BLOCK, LENGTH))
        tells = torch.rand(LENGTH, 1, 1, generator=generator) < 0.25
        keys = randn(LENGTH, KV_HEADS, DIM) * 0.2 + topics[:, told.repeat_interleave(BLOCK)].transpose(0, 1) * tells
        query = topics[:, asked].transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, dim=1) * 1.5
        query = query + randn(LENGTH, HEADS, DIM) * 0.2
        loud = torch.rand(LENGTH // BLOCK, generator=generator).repeat_interleave(BLOCK)[:, None, None] * 4
        opposite = randn(LENGTH, KV_HEADS, len(PAIRED)) * loud
        keys[..., PAIRED] = opposite
        keys[..., [dim + 1 for dim in PAIRED]] = -opposite
        query[..., [*PAIRED, *(dim + 1 for dim in PAIRED)]] = 1.0
        positions = torch.arange(LENGTH)
        query, keys = turned(query, positions), turned(keys, positions)
        seqs = PackedSequences(torch.tensor([0, LENGTH], dtype=torch.int32), LENGTH)
        _, scores, lse = pooled_attention(query, keys, keys, seqs, scale=SCALE, select_block=BLOCK)
        later = slice(LENGTH // 2, None)
        weights = block_weights(scores[later], lse[later], num_kv_heads=KV_HEADS)
        return LayerSample(layer, query[later], positions[later], keys, weights)


def quality(gates: Gates, samples: list[LayerSample]) -> Quality:
    parts = [
        selection_quality(gates, each.layer, each.query, each.positions, each.keys, scale=SCALE, budget_blocks=4)
        for each in samples
    ]
    return Quality.mean([part for part in parts if part is not None])


def test_trained_gates_find_more_of_what_is_attended_to_than_the_bound_at_as_many_keys() -> None:
    policy = Policy(seed=0)
    gates = Gates(CONFIG)
    heldout = [policy.sample(layer, seed=1000 + text) for text in range(2) for layer in range(2)]
    before = quality(gates, heldout)
    trainer = GateTrainer(gates, lr=1e-2, num_steps=40)
    losses = [trainer.step([policy.sample(0, step), policy.sample(1, step)]).loss for step in range(40)]
    after = quality(gates, heldout)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert after.gate_recall > max(before.gate_recall, after.bound_recall) + 0.1
    assert after.gate_mass > max(before.gate_mass, after.bound_mass, after.fine_bound_mass, after.recent_mass)


def sample(length: int = 100, layer: int = 0) -> LayerSample:
    """All tokens of a sequence of random queries and keys, and weights that are those of no attention."""
    generator = torch.Generator().manual_seed(length)
    query, keys = (torch.randn(length, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    weights = torch.rand(length, KV_HEADS, -(-length // BLOCK), generator=generator)
    return LayerSample(layer, query, torch.arange(length), keys, weights)


def test_the_loss_is_the_divergence_over_complete_blocks_before_the_tokens_own() -> None:
    gates, given = Gates(CONFIG).requires_grad_(False), sample()
    blocks = given.keys[:96].unflatten(0, (6, BLOCK))
    scores = gates.scores(
        0, given.query, given.positions, gates.compress(0, blocks, torch.arange(6) * BLOCK)[None]
    ).double()
    total, count = 0.0, 0
    for token in range(2 * BLOCK, 100):  # before, there is one block to choose or none
        before = token // BLOCK
        for head in range(KV_HEADS):
            target = given.weights[token, head, :before].double()
            target /= target.sum()
            total += float((target * (target.log() - scores[token, head, :before].log_softmax(dim=0))).sum())
            count += 1
    loss, num_choices = gate_loss(gates, given)
    assert int(num_choices) == count
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_tokens_without_a_choice_teach_nothing() -> None:
    gates = Gates(CONFIG)
    loss, num_choices = gate_loss(gates, sample(2 * BLOCK))
    loss.backward()
    assert int(num_choices) == 0 and loss.item() == 0
    for parameter in gates.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_an_update_takes_the_mean_over_all_it_was_shown_and_touches_the_layers_shown_alone() -> None:
    together, apart = Gates(CONFIG), Gates(CONFIG)
    GateTrainer(together, lr=1e-2).step([sample(100), sample(70)])
    sums = [gate_loss(apart, each) for each in (sample(100), sample(70))]
    torch.stack([loss for loss, _ in sums]).sum().backward()
    count = sum(int(num_choices) for _, num_choices in sums)
    for name, parameter in apart.named_parameters():
        assert parameter.grad is not None
        parameter.grad /= count
        assert parameter.grad[0].any() and not parameter.grad[1].any(), name
    torch.nn.utils.clip_grad_norm_(apart.parameters(), 1.0)
    torch.optim.AdamW(apart.parameters(), lr=1e-2 / 20, weight_decay=0.0).step()
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(parameter, dict(apart.named_parameters())[name])


def test_what_is_not_finite_changes_nothing_and_is_told() -> None:
    gates = Gates(CONFIG)
    before = {name: tensor.clone() for name, tensor in gates.state_dict().items()}
    trainer = GateTrainer(gates, lr=1e-2)
    given = sample()
    given.query[50, 0, 0] = torch.nan
    assert not trainer.step([given]).applied
    assert all(torch.equal(gates.state_dict()[name], tensor) for name, tensor in before.items())
    assert trainer.step([sample()]).applied and trainer.steps == 1


@pytest.mark.parametrize(("num_steps", "last"), [(60, 0.01), (None, 1.0)], ids=["known", "endless"])
def test_the_learning_rate_warms_up_and_falls_where_the_end_is_known(num_steps: int | None, last: float) -> None:
    trainer = GateTrainer(Gates(CONFIG), lr=1e-2, num_steps=num_steps)
    rates = []
    for _ in range(60):
        trainer.step([sample(3 * BLOCK)])
        rates.append(trainer.learning_rate / 1e-2)
    assert rates[:20] == pytest.approx([step / 20 for step in range(1, 21)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(last)


def test_the_bound_exceeds_every_product_with_a_key_of_the_block() -> None:
    given = sample(96)
    blocks = given.keys.unflatten(0, (6, BLOCK))
    mean = given.query.unflatten(1, (KV_HEADS, -1)).mean(dim=2)
    products = torch.einsum("thd,nphd->thnp", mean, blocks).amax(dim=3)
    assert (bound_scores(given.query, blocks) >= products - 1e-5).all()


def test_what_is_read_is_the_picked_blocks_and_the_tokens_own() -> None:
    given = sample(100)
    found = selection_quality(Gates(CONFIG), 0, given.query, given.positions, given.keys, scale=SCALE, budget_blocks=2)
    assert found is not None
    mass, count = 0.0, 0
    for token in range(3 * BLOCK, 100):  # of fewer blocks all are read
        newest = range((token // BLOCK - 2) * BLOCK, token + 1)
        for head in range(HEADS):
            keys = given.keys[: token + 1, head // (HEADS // KV_HEADS)]
            mass += float((keys @ given.query[token, head] * SCALE).softmax(dim=0)[list(newest)].sum())
            count += 1
    assert found.recent_mass == pytest.approx(mass / count, rel=1e-4)


def test_where_all_blocks_are_read_there_is_no_quality() -> None:
    given = sample(100)
    arguments = (given.query, given.positions, given.keys)
    assert selection_quality(Gates(CONFIG), 0, *arguments, scale=SCALE, budget_blocks=6) is None


def test_a_token_may_choose_complete_blocks_before_its_own() -> None:
    allowed = candidates(torch.tensor([0, BLOCK - 1, BLOCK, 3 * BLOCK + 1]), 5, BLOCK)
    assert allowed.sum(dim=2).flatten().tolist() == [0, 0, 1, 3]
    assert allowed[3, 0].tolist() == [True, True, True, False, False]

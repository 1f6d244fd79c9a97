"""Gates that learn on from verifications: what they are shown, and when what they learned is served."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config

from drafter.gate import GateConfig, Gates
from drafter.gate_learner import HELDOUT, GateLearner, verified_samples
from drafter.gate_training import LayerSample
from kernels.attention import BlockMaxima, PackedSequences, paged_sequences
from kernels.pooled_attention import block_weights, pooled_attention

HEADS, KV_HEADS, DIM, BLOCK, SCALE = 4, 2, 16, 16, 0.25
CONFIG = GateConfig.of(
    Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM
    ),
    select_block=BLOCK,
)  # fmt: skip
LENGTH, CACHE_BLOCK = 128, 32


def attended(seed: int, layer: int, length: int = LENGTH) -> tuple[LayerSample, torch.Tensor, torch.Tensor]:
    """All tokens of a sequence under plain attention of random queries and keys; its scores and log-sum-exps."""
    generator = torch.Generator().manual_seed(seed)
    query, keys = (torch.randn(length, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    seqs = PackedSequences(torch.tensor([0, length], dtype=torch.int32), length)
    _, scores, lse = pooled_attention(query, keys, keys, seqs, scale=SCALE, select_block=BLOCK)
    weights = block_weights(scores, lse, num_kv_heads=KV_HEADS)
    return LayerSample(layer, query, torch.arange(length), keys, weights), scores, lse


def test_a_verification_gives_what_a_forward_of_the_whole_text_gives_its_last_tokens() -> None:
    contexts, new = [100, 20, 70], 3
    table = torch.randperm(12)[: 3 * 4].view(3, 4).to(torch.int32)
    cache = torch.full((12, CACHE_BLOCK, KV_HEADS, DIM), 7.0)
    whole = [attended(row, 1, context + new) for row, context in enumerate(contexts)]
    width = -(-(max(contexts) + new) // BLOCK)
    scores = torch.full((3 * new, HEADS, width), -torch.inf)
    for row, (given, found, _) in enumerate(whole):
        slots = torch.arange(len(given.keys))
        cache[table[row].long()[slots // CACHE_BLOCK], slots % CACHE_BLOCK] = given.keys
        scores[row * new : (row + 1) * new, :, : found.shape[2]] = found[-new:]
    maxima = BlockMaxima(scores, torch.cat([lse[-new:] for _, _, lse in whole]), BLOCK)
    seqs = paged_sequences(
        cu_seqlens_q=torch.tensor([0, 3, 6, 9], dtype=torch.int32),
        max_seqlen_q=new,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        max_context=max(contexts),
        block_tables=table,
        slots=torch.zeros(9, dtype=torch.int64),
        block_size=CACHE_BLOCK,
    )
    query, positions = (torch.cat([getattr(each[0], name)[-new:] for each in whole]) for name in ("query", "positions"))
    samples = dict(verified_samples(1, query, positions, cache, seqs, maxima))
    assert sorted(samples) == [0, 2]  # the second text has one complete block, and no choice
    for row, sample in samples.items():
        given, complete = whole[row][0], contexts[row] // BLOCK
        assert sample.layer == 1
        assert torch.equal(sample.query, given.query[-new:])
        assert sample.positions.tolist() == list(range(contexts[row], contexts[row] + new))
        assert torch.equal(sample.keys, given.keys[: complete * BLOCK])
        torch.testing.assert_close(sample.weights[:, :, :complete], given.weights[-new:, :, :complete])


def samples(texts: range) -> list[tuple[int, LayerSample]]:
    return [(text, attended(text, layer)[0]) for text in texts for layer in range(2)]


def test_what_was_learned_is_served_in_the_same_storage_once_held_out_texts_say_it_is_better() -> None:
    served = Gates(CONFIG).to(torch.bfloat16).requires_grad_(False)
    addresses = [parameter.data_ptr() for parameter in served.parameters()]
    before = {name: tensor.clone() for name, tensor in served.state_dict().items()}
    learner = GateLearner(served, lr=1e-2)
    stats = [learner.learn(samples(range(8))) for _ in range(12)]
    assert all(each.applied for each in stats) and stats[-1].loss < stats[0].loss
    assert all(torch.equal(served.state_dict()[name], tensor) for name, tensor in before.items())  # not yet
    judgement = learner.settle()
    assert judgement is not None and judgement.outcome == "published" and judgement.loss < judgement.served_loss
    assert [parameter.data_ptr() for parameter in served.parameters()] == addresses
    assert all(not torch.equal(served.state_dict()[name], tensor) for name, tensor in before.items())


def test_what_became_worse_is_not_served() -> None:
    served = Gates(CONFIG).requires_grad_(False)
    learner, shown = GateLearner(served, lr=0.05), samples(range(3))
    for _ in range(20):
        learner.learn(shown)
    learner.settle()
    before = {name: tensor.clone() for name, tensor in served.state_dict().items()}
    first = torch.zeros_like(shown[0][1].weights)
    first[:, :, 0] = 1  # as if all that counted were the first block
    for _ in range(20):
        learner.learn([(text, sample if text == 0 else replace(sample, weights=first)) for text, sample in shown])
    judgement = learner.settle()
    assert judgement is not None and judgement.outcome == "kept" and judgement.loss > judgement.served_loss
    assert all(torch.equal(served.state_dict()[name], tensor) for name, tensor in before.items())


def test_without_held_out_texts_nothing_is_judged() -> None:
    learner = GateLearner(Gates(CONFIG), lr=1e-2)
    learner.learn(samples(range(1, 3)))
    assert learner.settle() is None


@pytest.mark.parametrize("held", [0, HELDOUT, 3 * HELDOUT])
def test_held_out_texts_teach_nothing(held: int) -> None:
    learner = GateLearner(Gates(CONFIG), lr=1e-2)
    assert learner.learn(samples(range(held, held + 1))).num_tokens == 0

"""Gates that learn on from verifications: what they are shown, and when what they learned is served."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config

from drafter.buffer import is_heldout
from drafter.gate import GateConfig, Gates
from drafter.gate_learner import GateJudgement, GateLearner, GateStanding, found_blocks, pooled, verified_samples
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
PROMPTS = [f"p{number}" for number in range(40)]
TAUGHT = [prompt for prompt in PROMPTS if not is_heldout(prompt)][:4]
HELD = [prompt for prompt in PROMPTS if is_heldout(prompt)][:2]


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
    samples = dict(verified_samples(1, query, positions, cache, seqs, maxima, rows=range(3)))
    assert sorted(samples) == [0, 2]  # the second text has one complete block, and no choice
    for row, sample in samples.items():
        given, complete = whole[row][0], contexts[row] // BLOCK
        assert sample.layer == 1
        assert torch.equal(sample.query, given.query[-new:])
        assert sample.positions.tolist() == list(range(contexts[row], contexts[row] + new))
        assert torch.equal(sample.keys, given.keys[: complete * BLOCK])
        torch.testing.assert_close(sample.weights[:, :, :complete], given.weights[-new:, :, :complete])


def samples(prompts: Sequence[str]) -> list[tuple[str, LayerSample]]:
    numbered = enumerate(prompts)
    return [(prompt, attended(number, layer)[0]) for number, prompt in numbered for layer in range(2)]


def peaked(samples: list[tuple[str, LayerSample]], block: int) -> list[tuple[str, LayerSample]]:
    """As if all that counted were one block."""
    shown = []
    for prompt, sample in samples:
        weights = torch.full_like(sample.weights, 1e-3)
        weights[:, :, block] = 1
        shown.append((prompt, replace(sample, weights=weights)))
    return shown


def copied(gates: Gates) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gates.state_dict().items()}


def poor_gates() -> Gates:
    """Gates that pick badly: there is something to learn."""
    gates = Gates(CONFIG).requires_grad_(False)
    gates.key_weight += 0.3 * torch.randn(gates.key_weight.shape, generator=torch.Generator().manual_seed(0))
    return gates.to(torch.bfloat16)


def test_what_was_learned_is_served_in_the_same_storage_once_held_out_prompts_say_it_finds_more() -> None:
    served = poor_gates()
    addresses = [parameter.data_ptr() for parameter in served.parameters()]
    before = copied(served)
    learner = GateLearner(served, lr=1e-2, budget_blocks=2)
    shown = samples(TAUGHT + HELD)
    stats = [each for _ in range(30) for each in learner.learn(shown)]
    assert all(each.applied for each in stats) and stats[-1].loss < stats[0].loss
    assert all(torch.equal(served.state_dict()[name], tensor) for name, tensor in before.items())  # not yet
    judgement = learner.settle()
    assert judgement is not None and judgement.outcome == "published"
    assert judgement.trained.recall > judgement.served.recall and judgement.trained.loss < judgement.served.loss
    assert [parameter.data_ptr() for parameter in served.parameters()] == addresses
    assert all(not torch.equal(served.state_dict()[name], tensor) for name, tensor in before.items())
    assert learner.settle() is None, "it was judged by the held-out samples once"


def test_what_finds_less_is_not_served() -> None:
    served = Gates(CONFIG).requires_grad_(False)
    before = copied(served)
    learner = GateLearner(served, lr=0.05, budget_blocks=2)
    for _ in range(20):
        learner.learn(peaked(samples(TAUGHT[:2]), block=0))
    learner.learn(samples(HELD))
    judgement = learner.settle()
    assert judgement is not None and judgement.outcome == "kept"
    assert judgement.trained.recall < judgement.served.recall
    assert all(torch.equal(served.state_dict()[name], tensor) for name, tensor in before.items())


def test_without_enough_held_out_choices_nothing_is_judged_until_there_are() -> None:
    learner = GateLearner(Gates(CONFIG).requires_grad_(False), lr=1e-2, budget_blocks=2)
    learner.learn(samples(TAUGHT))
    assert learner.settle() is None
    few = [(prompt, replace(sample, query=sample.query[-10:], positions=sample.positions[-10:],
            weights=sample.weights[-10:])) for prompt, sample in samples(HELD[:1])]  # fmt: skip
    learner.learn(few)  # 10 tokens of 2 key heads in 2 layers
    assert learner.settle() is None
    learner.learn(few)
    assert learner.settle() is not None


def test_held_out_prompts_teach_nothing() -> None:
    learner = GateLearner(Gates(CONFIG), lr=1e-2, budget_blocks=2)
    before = learner.state_dict()["gates.query_weight"].clone()
    assert learner.learn(samples(HELD)) == []
    assert torch.equal(learner.state_dict()["gates.query_weight"], before)


@pytest.mark.parametrize("budget", [1, 3])
def test_found_blocks_are_those_that_an_exhaustive_count_finds(budget: int) -> None:
    gates = Gates(CONFIG, seed=3).requires_grad_(False)
    sample = attended(5, 1)[0]
    hits, choices = found_blocks(gates, sample, budget)
    keys, starts = sample.keys.unflatten(0, (-1, BLOCK)), torch.arange(LENGTH // BLOCK) * BLOCK
    scores = gates.scores(1, sample.query, sample.positions, gates.compress(1, keys, starts)[None])
    expected = [
        len(
            set(scores[token, head, :own].topk(budget).indices.tolist())
            & set(sample.weights[token, head, :own].topk(budget).indices.tolist())
        )
        for token in range(LENGTH)
        for head in range(KV_HEADS)
        if (own := token // BLOCK) > budget
    ]
    assert (hits, choices) == (sum(expected), len(expected))


def test_a_saved_learner_goes_on_bit_for_bit() -> None:
    served, shown = Gates(CONFIG).requires_grad_(False), samples(TAUGHT[:2])
    learner = GateLearner(served, lr=1e-2, budget_blocks=2)
    learner.learn(shown)
    saved = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    other = GateLearner(Gates(CONFIG, seed=9).requires_grad_(False), lr=1e-2, budget_blocks=2)
    other.load_state_dict(saved, served)
    assert all(torch.equal(tensor, served.state_dict()[name]) for name, tensor in other.served.state_dict().items())
    for each in (learner, other):
        each.learn(shown)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in learner.state_dict().items())


def trained(learner: GateLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state_dict().items() if name.startswith("gates.")}


def test_workers_go_on_from_the_mean_of_what_they_learned_and_serve_the_same() -> None:
    announced: list[int] = []
    workers = [
        GateLearner(
            poor_gates(),
            lr=1e-2,
            budget_blocks=2,
            announce=lambda number=number: announced.append(number),
        )
        for number in range(3)
    ]
    shown = samples(TAUGHT + HELD)  # two samples a prompt
    for worker, mine in zip(workers, (shown[:4] + shown[8:10], shown[4:8] + shown[10:], []), strict=True):
        for _ in range(30):
            worker.learn(mine)
    own = [trained(worker) for worker in workers]
    deltas = [worker.delta() for worker in workers]
    assert deltas[2] == {}, "it has learned nothing"
    for worker in workers:
        worker.apply(deltas[:2])
    assert workers[2].delta() == {}, "what was taken over is nothing learned"
    for name, tensor in trained(workers[0]).items():
        torch.testing.assert_close(tensor, (own[0][name] + own[1][name]) / 2)
        assert all(torch.equal(trained(worker)[name], tensor) for worker in workers[1:])
    judged = [worker.judge() for worker in workers]
    assert judged[2] is None, "it has held nothing out"
    judgement = pooled([each for each in judged if each is not None])
    before = {worker.checksum for worker in workers}
    standings = {worker.conclude(judgement) for worker in workers}
    assert len(standings) == len(before) == 1 and judgement.outcome == "published"
    ((version, digest),) = standings
    assert version == 1 and {digest} != before
    assert announced == [0, 1, 2]
    assert all(worker.delta() == {} and worker.judge() is None for worker in workers), "all of it is agreed and judged"


def test_judgements_weigh_by_their_choices_and_are_open_while_these_are_few() -> None:
    def judgement(recall: float, served: float, count: int) -> GateJudgement:
        return GateJudgement(GateStanding(recall, 1.0), GateStanding(served, 2.0), count)

    few = [judgement(0.9, 0.5, 40), judgement(0.3, 0.6, 20)]
    assert [each.outcome for each in (*few, pooled(few))] == ["open"] * 3
    many = pooled([judgement(0.9, 0.5, 30), judgement(0.3, 0.5, 90)])
    assert many.num_choices == 120 and many.outcome == "kept"
    assert many.trained.recall == pytest.approx(0.45) and many.trained.loss == pytest.approx(1.0)
    assert replace(many, trained=GateStanding(0.6, 1.0)).outcome == "published"
    assert replace(many, trained=GateStanding(0.6, float("nan"))).outcome == "kept"


def test_a_worker_becomes_another_or_gives_up_with_what_it_serves() -> None:
    one, other = (
        GateLearner(Gates(CONFIG, seed=seed).requires_grad_(False), lr=1e-2, budget_blocks=2) for seed in (1, 2)
    )
    one.learn(samples(TAUGHT))
    one.conclude(GateJudgement(GateStanding(0.6, 1.0), GateStanding(0.5, 1.0), 100))
    one.learn(samples(TAUGHT))
    assert one.checksum != other.checksum
    assert other.become(one.replica()) == (1, one.checksum)
    assert all(torch.equal(tensor, trained(other)[name]) for name, tensor in trained(one).items())
    assert all(torch.equal(one.served.state_dict()[name], each) for name, each in other.served.state_dict().items())
    assert other.give_up("they differ") == (1, one.checksum)
    assert other.learn(samples(TAUGHT + HELD)) == [] and other.judge() is None and other.off == "they differ"

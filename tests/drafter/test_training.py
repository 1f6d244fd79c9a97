"""Training the head: that it learns what it will be asked when it drafts, and nothing it could not know."""

import copy
import math
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import DrafterConfig
from drafter import local_attention
from drafter.eagle import EagleConfig, EagleHead
from drafter.features import FeatureBatch, on_device
from drafter.trainer import DrafterTrainer, choose_vocabulary, evaluate
from drafter.unroll import Chains, unroll

VOCAB, SIZE = 48, 16
SHAPE = EagleConfig(
    hidden_size=SIZE, intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB, draft_vocab=40,
    window=6, rms_norm_eps=1e-5, rope_theta=10_000.0, max_position_embeddings=256, aux_layers=(0, 1, 2),
)  # fmt: skip
CONFIG = DrafterConfig(unroll=3, lr=3e-3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows then reach over several blocks of attention."""
    monkeypatch.setattr(local_attention, "BLOCK", 4)


class Bigrams:
    """A policy whose next token depends on the last alone: learnable by a head that reads the right one."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(5)
        self.embedding, self.lm_head = torch.randn(2, VOCAB, SIZE, generator=draw)
        self.states = torch.randn(VOCAB, SIZE, generator=draw)
        self.mixing = torch.randn(SIZE, 3 * SIZE, generator=draw) / SIZE**0.5
        self.draw = draw

    def text(self, length: int) -> torch.Tensor:
        probs = (self.states @ self.lm_head.T).softmax(dim=1)
        tokens = torch.randint(VOCAB, (1,), generator=self.draw)
        for _ in range(length):
            tokens = torch.cat([tokens, torch.multinomial(probs[tokens[-1]], 1, generator=self.draw)])
        return tokens

    def batch(self, lengths: Sequence[int], *, rejections: bool = False) -> FeatureBatch:
        texts = [self.text(length) for length in lengths]
        tokens, following = (torch.cat([text[cut] for text in texts]) for cut in (slice(0, -1), slice(1, None)))
        hidden = self.states[tokens]
        others = torch.randint(VOCAB, tokens.shape, generator=self.draw)
        alt_ids = torch.where((others != following) & (others % 3 == 0) & torch.tensor(rejections), others, -1)
        return FeatureBatch(
            token_ids=tokens,
            next_ids=following,
            positions=torch.cat([torch.arange(length) + 7 * index for index, length in enumerate(lengths)]),
            aux=hidden @ self.mixing,
            hidden=hidden,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            versions=torch.zeros(len(lengths), dtype=torch.int64),
            alt_ids=alt_ids,
            alt_hidden=self.states[alt_ids.clamp(min=0)],
            temperature=1.0,
        )

    def trainer(self, config: DrafterConfig = CONFIG) -> DrafterTrainer:
        head = EagleHead(SHAPE, seed=1)
        d2t, t2d = choose_vocabulary(torch.arange(VOCAB), SHAPE.draft_vocab)
        head.set_vocabulary(d2t, t2d, self.lm_head)
        return DrafterTrainer(head, embedding=self.embedding, lm_head=self.lm_head, config=config)


def window(batch: FeatureBatch, index: int) -> FeatureBatch:
    """One window of a batch, alone."""
    cut = slice(int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1]))
    per_token = {name: getattr(batch, name)[cut] for name in PER_TOKEN}
    bounds = torch.tensor([0, cut.stop - cut.start], dtype=torch.int32)
    return replace(batch, **per_token, cu_seqlens=bounds, versions=batch.versions[index : index + 1])


PER_TOKEN = ("token_ids", "next_ids", "positions", "aux", "hidden", "alt_ids", "alt_hidden")


def padded(batch: FeatureBatch) -> FeatureBatch:
    """Every window filled up to the longest with positions that count for nothing."""
    lengths = batch.cu_seqlens.diff().tolist()
    fill = {"next_ids": -1, "alt_ids": -1}
    per_token = {
        name: torch.cat(
            [
                torch.cat([part, part.new_full((max(lengths) - len(part), *part.shape[1:]), fill.get(name, 3))])
                for part in getattr(batch, name).split(lengths)
            ]
        )
        for name in PER_TOKEN
    }
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32) * max(lengths)
    return replace(batch, **per_token, cu_seqlens=bounds)


def gradients(trainer: DrafterTrainer, batch: FeatureBatch) -> dict[str, torch.Tensor]:
    """Those of one step, before clipping; the trainer is not changed."""
    other = copy.deepcopy(trainer)
    stats = other.step(batch)
    scale = max(1.0, stats.grad_norm + 1e-6)  # the clipping's
    found = {name: parameter.grad * scale for name, parameter in other.head.named_parameters()}
    assert all(gradient.any() for gradient in found.values())
    return found


@pytest.mark.parametrize("lengths", [(9,), (3, 14, 1, 8), (2, 2, 2, 2)])
@torch.no_grad()
def test_a_chain_reads_what_it_will_read_when_it_drafts(lengths: tuple[int, ...]) -> None:
    """Alignment, causality and the sliding window at once: each chain again, step by step, by the head's own step.

    A chain at t is given the policy's features up to t, and after it only tokens and its own outputs.
    """
    policy = Bigrams()
    batch = policy.batch(lengths, rejections=True)
    head, depth = policy.trainer().head, 4
    found = list(unroll(head, Chains(batch), policy.embedding, depth=depth, longest=max(lengths), rejected=True))
    assert [step.depth for step in found] == [0, 1, 2, 3, -1]
    for index, begin in enumerate(batch.cu_seqlens[:-1].tolist()):
        one = window(batch, index)
        tokens = torch.cat([one.token_ids[:1], one.next_ids])  # position p of the window holds tokens[p]
        for t in range(len(one.next_ids)):
            known = one.positions[: t + 1]
            distance = known[:, None] - known
            outputs, past = head.step(
                policy.embedding[tokens[1 : t + 2]],
                head.fuse(one.aux[: t + 1]),
                known,
                head.empty_past(),
                (distance >= 0) & (distance < SHAPE.window),
            )
            state, keys = outputs[-1:], known
            torch.testing.assert_close(found[0].outputs[begin + t], state[0])
            for step in range(1, min(depth, len(one.next_ids) - t)):
                at = one.positions[t : t + 1] + step
                keys = torch.cat([keys, at])
                embeds = policy.embedding[tokens[t + step + 1]][None]
                state, past = head.step(embeds, state, at, past, (at - keys < SHAPE.window)[None])
                torch.testing.assert_close(found[step].outputs[begin + t], state[0])
            if one.alt_ids[t] >= 0:
                before = tuple(entries[:t] for entries in past)
                embeds, state = policy.embedding[one.alt_ids[t]][None], head.fuse(one.aux[t : t + 1])
                expected, _ = head.step(embeds, state, known[-1:], before, (known[-1] - known < SHAPE.window)[None])
                torch.testing.assert_close(found[-1].outputs[begin + t], expected[0])


def test_step_j_predicts_the_token_after_the_one_it_read() -> None:
    """The target is the distribution at the position whose token was read: t + j + 1, never one off."""
    policy = Bigrams()
    batch = policy.batch([5, 3])
    chains = Chains(batch)
    for depth in range(3):
        index, known = chains.predicted(depth)
        assert known.tolist() == [t + depth + 1 < end for t, end in zip(range(8), [5] * 5 + [8] * 3, strict=True)]
        assert torch.equal(chains.read(depth)[known], batch.token_ids[index[known]])


@torch.no_grad()
def test_nothing_that_comes_later_reaches_an_output() -> None:
    policy = Bigrams()
    head, batch, depth, t = policy.trainer().head, policy.batch([10, 6]), 3, 4

    def outputs(batch: FeatureBatch) -> list[torch.Tensor]:
        steps = unroll(head, Chains(batch), policy.embedding, depth=depth, longest=10, rejected=False)
        return [step.outputs for step in steps]

    before = outputs(batch)
    later = replace(batch, aux=batch.aux.clone(), next_ids=batch.next_ids.clone())
    later.aux[t + 1 :] += 1
    later.next_ids[t + depth :] = (later.next_ids[t + depth :] + 1) % VOCAB
    after = outputs(later)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[: t + 1], other[: t + 1])
        assert not torch.equal(one[t + 1], other[t + 1])


@pytest.mark.parametrize("rejections", [False, True])
def test_packed_gradients_equal_padded_ones(rejections: bool) -> None:
    policy = Bigrams()
    trainer, batch = policy.trainer(), policy.batch([3, 17, 1, 9, 6], rejections=rejections)
    packed, with_padding = gradients(trainer, batch), gradients(trainer, padded(batch))
    for name, gradient in packed.items():
        torch.testing.assert_close(
            gradient, with_padding[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_packed_gradients_are_the_mean_of_each_windows_own() -> None:
    policy = Bigrams()
    lengths = [4, 13, 9, 2]
    trainer, batch = policy.trainer(replace(CONFIG, unroll=1)), policy.batch(lengths)
    packed = gradients(trainer, batch)
    alone = [gradients(trainer, window(batch, index)) for index in range(len(lengths))]
    shares = [(length - 1) / sum(length - 1 for length in lengths) for length in lengths]
    for name, gradient in packed.items():
        mean = sum(share * each[name] for share, each in zip(shares, alone, strict=True))
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_no_chunk_of_rows_changes_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Bigrams()
    trainer, batch = policy.trainer(), policy.batch([8, 5], rejections=True)
    whole = gradients(trainer, batch)
    monkeypatch.setattr("drafter.losses.CHUNK_ELEMENTS", {"cpu": 3 * VOCAB})
    for name, gradient in gradients(trainer, batch).items():
        torch.testing.assert_close(
            gradient, whole[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("loss", ["lk", "kl", "ce", "tv"])
def test_training_raises_acceptance_at_every_depth(loss: str) -> None:
    policy = Bigrams()
    trainer = policy.trainer(replace(CONFIG, loss=loss))
    held_out = policy.batch([40] * 6)
    before = trainer.evaluate(held_out)
    stats = trainer.train(lambda: policy.batch([20] * 12, rejections=True), until=lambda: trainer.steps == 60)
    after = trainer.evaluate(held_out)
    assert len(stats) == 60
    assert all(each.applied for each in stats)
    assert after.loss < before.loss
    assert all(late > early + 0.05 for early, late in zip(before.acceptance, after.acceptance, strict=True))
    assert after.accept_length > before.accept_length + 0.2
    assert trainer.evaluate(held_out).acceptance == after.acceptance


def test_accept_length_is_the_mean_of_what_chains_get_through() -> None:
    policy = Bigrams()
    trainer, batch = policy.trainer(), policy.batch([12, 7])
    stats = trainer.evaluate(batch)
    assert 1.0 <= stats.accept_length <= 1 + CONFIG.unroll
    assert len(stats.acceptance) == CONFIG.unroll
    one = evaluate(
        trainer.head,
        batch,
        embedding=policy.embedding,
        lm_head=policy.lm_head,
        config=replace(CONFIG, unroll=1),
    )
    assert one.accept_length == pytest.approx(1 + one.acceptance[0])
    assert one.acceptance[0] == pytest.approx(stats.acceptance[0])
    assert stats.num_tokens == 19


@pytest.mark.parametrize("field", ["hidden", "aux"])
def test_an_update_that_is_not_finite_is_rejected_and_the_next_one_is_not(field: str) -> None:
    policy = Bigrams()
    trainer = policy.trainer()
    trainer.step(policy.batch([9, 5]))
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    bad = policy.batch([9, 5])
    getattr(bad, field)[6] = torch.nan
    assert not trainer.step(bad).applied
    after = trainer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert trainer.step(policy.batch([9, 5])).applied


def test_a_gradient_that_is_not_finite_is_rejected_though_its_loss_is_a_number() -> None:
    policy = Bigrams()
    trainer = policy.trainer()
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    hook = trainer.head.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
    stats = trainer.step(policy.batch([9, 5]))
    assert math.isfinite(stats.loss) and not stats.applied
    assert all(torch.equal(tensor, trainer.state_dict()[name]) for name, tensor in before.items())
    hook.remove()
    assert trainer.step(policy.batch([9, 5])).applied


def test_training_goes_on_until_it_is_told_to_stop() -> None:
    """It neither stops as soon as it starts nor takes another step after the word."""
    policy = Bigrams()
    trainer, answers = policy.trainer(), iter([False, False, False, True])
    assert len(trainer.train(lambda: policy.batch([8]), until=lambda: next(answers))) == 3
    assert trainer.train(lambda: policy.batch([8]), until=lambda: True) == []
    batches = iter([policy.batch([8]), None])
    assert len(trainer.train(lambda: next(batches), until=lambda: False)) == 1


def test_the_policy_is_read_and_neither_written_nor_shared() -> None:
    policy = Bigrams()
    trainer = policy.trainer()
    before = policy.embedding.clone(), policy.lm_head.clone()
    for tensor in (policy.embedding, policy.lm_head):
        tensor.requires_grad_()
    trainer.step(policy.batch([9, 5]))
    for tensor, old in zip((policy.embedding, policy.lm_head), before, strict=True):
        assert torch.equal(tensor, old)
        assert tensor.grad is None
    own = {tensor.untyped_storage().data_ptr() for tensor in trainer.state_dict().values()}
    assert not own & {policy.embedding.untyped_storage().data_ptr(), policy.lm_head.untyped_storage().data_ptr()}


def test_resumed_training_is_bit_equal() -> None:
    policy = Bigrams()
    batches = [policy.batch([9, 5]) for _ in range(4)]
    straight, first, second = (policy.trainer() for _ in range(3))
    for batch in batches:
        straight.step(batch)
    for batch in batches[:2]:
        first.step(batch)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for batch in batches[2:]:
        second.step(batch)
    assert second.steps == 4
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_the_most_frequent_tokens_are_chosen_in_order() -> None:
    d2t, t2d = choose_vocabulary(torch.tensor([5, 0, 9, 0, 5, 1]), 4)
    assert (torch.arange(4) + d2t).tolist() == [0, 2, 4, 5]
    assert t2d.tolist() == [True, False, True, False, True, True]
    assert (torch.arange(2) + choose_vocabulary(torch.zeros(5), 2)[0]).tolist() == [0, 1]  # equals: smaller ids
    assert len(choose_vocabulary(torch.ones(3), 10)[0]) == 3


def test_chains_longer_than_the_window_are_refused() -> None:
    with pytest.raises(ConfigError, match="unroll=6"):
        Bigrams().trainer(replace(CONFIG, unroll=6))


def test_windows_of_one_position_teach_nothing_and_break_nothing() -> None:
    policy = Bigrams()
    trainer = policy.trainer()
    stats = trainer.step(policy.batch([1, 1, 1]))
    assert stats.loss == 0.0
    assert stats.accept_length == 1.0


def test_features_made_in_inference_mode_can_be_learnt_from() -> None:
    policy = Bigrams()
    with torch.inference_mode():
        batch = policy.batch([9, 5], rejections=True)
    assert policy.trainer().step(batch).applied


def test_every_field_of_a_batch_follows_it_to_a_device() -> None:
    batch = on_device(Bigrams().batch([3]), torch.device("meta"))
    tensors = [getattr(batch, field.name) for field in fields(batch) if field.name != "temperature"]
    assert all(tensor.is_meta for tensor in tensors)

"""Losses over a reduced vocabulary, against their definitions written out in Python."""

import math
import random

import pytest
import torch

from drafter.losses import LK_DECAY, Loss, Targets, targets_of, token_losses

VOCAB, DRAFTED, HIDDEN = 9, [1, 2, 5, 8], 6


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def by_hand(loss: Loss, p: list[float], q: list[float], sampled: int) -> float:
    overlap, mass = sum(map(min, p, q)), sum(p)
    kl = mass * sum(a / mass * math.log(a / mass / b) for a, b in zip(p, q, strict=True))
    if loss == "kl":
        return kl
    if loss == "tv":
        return 1 - overlap
    if loss == "ce":
        return -math.log(q[sampled]) if sampled >= 0 else 0.0
    weight = math.exp(-LK_DECAY * overlap)
    return weight * kl + (1 - weight) * -math.log(overlap)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("loss", ["lk", "kl", "ce", "tv"])
def test_a_loss_is_its_definition(loss: Loss, temperature: float) -> None:
    torch.manual_seed(3)
    hidden, lm_head, logits = torch.randn(7, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(7, len(DRAFTED))
    next_ids = torch.tensor([1, 0, 5, 8, 3, 2, -1])
    targets = targets_of(hidden, next_ids, lm_head, torch.tensor(DRAFTED), temperature=temperature)
    values, accepted = token_losses(loss, logits, targets, temperature=temperature)
    for row in range(7):
        whole = softmax([value / (temperature or 1) for value in (lm_head @ hidden[row]).tolist()])
        p = [whole[token] for token in DRAFTED]
        q = softmax([value / (temperature or 1) for value in logits[row].tolist()])
        token = int(next_ids[row])
        sampled = DRAFTED.index(token) if token in DRAFTED else -1
        assert float(values[row]) == pytest.approx(by_hand(loss, p, q, sampled), rel=1e-4, abs=1e-6)
        if temperature:
            assert float(accepted[row]) == pytest.approx(sum(map(min, p, q)), rel=1e-5)
        else:
            best = max(range(VOCAB), key=lambda token: whole[token])
            assert float(accepted[row]) == (DRAFTED[int(logits[row].argmax())] == best)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_targets_in_bfloat16_are_the_softmax_of_its_logits(temperature: float) -> None:
    """Found by way of one token's probability, however unlikely that token is."""
    torch.manual_seed(4)
    hidden, lm_head = torch.randn(5, HIDDEN).bfloat16(), torch.randn(VOCAB, HIDDEN).bfloat16()
    lm_head[DRAFTED[0]] = -30 * hidden[2]
    targets = targets_of(hidden, torch.tensor([-1] * 5), lm_head, torch.tensor(DRAFTED), temperature=temperature)
    logits = (hidden @ lm_head.T).double()
    expected = (logits / (temperature or 1)).softmax(dim=1)[:, DRAFTED].float()
    torch.testing.assert_close(targets.probs, expected, rtol=1e-4, atol=1e-7)
    best = [DRAFTED.index(token) if token in DRAFTED else -1 for token in logits.argmax(dim=1).tolist()]
    assert targets.best.tolist() == ([-1] * 5 if temperature else best)


def test_mass_outside_the_vocabulary_is_never_accepted() -> None:
    """A draft that has learnt all it can is still accepted no oftener than the target stays inside its vocabulary."""
    targets = Targets(torch.tensor([[0.2, 0.1]]), best=torch.tensor([-1]), sampled=torch.tensor([-1]))
    logits = torch.tensor([[2.0, 1.0]]).log()
    leasts: dict[Loss, float] = {"tv": 0.7, "kl": 0.0, "ce": 0.0}
    for loss, least in leasts.items():
        values, accepted = token_losses(loss, logits, targets, temperature=1.0)
        assert float(accepted) == pytest.approx(0.3)
        assert float(values) == pytest.approx(least, abs=1e-6)
    assert float(token_losses("lk", logits, targets, temperature=0.0)[1]) == 0.0


@pytest.mark.parametrize("loss", ["lk", "kl", "ce", "tv"])
def test_gradients_are_finite_where_nothing_overlaps(loss: Loss) -> None:
    probs = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e-30, 0.0, 1e-38]])
    logits = torch.tensor([[0.0, 90.0, -90.0]] * 3, requires_grad=True)
    values, _ = token_losses(loss, logits, Targets(probs, *torch.tensor([[-1, 0, -1]] * 2)), temperature=1.0)
    values.sum().backward()
    assert values.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_lk_follows_kl_at_first_and_acceptance_later() -> None:
    """Far from the target its gradient is KL's; close to it, that of -log acceptance."""
    probs = torch.tensor([[0.7, 0.2, 0.1]])
    targets = Targets(probs, torch.tensor([0]), torch.tensor([0]))

    def gradient(loss: Loss, start: torch.Tensor) -> torch.Tensor:
        logits = start.clone().requires_grad_()
        token_losses(loss, logits, targets, temperature=1.0)[0].sum().backward()
        assert logits.grad is not None
        return logits.grad

    far = torch.tensor([[-9.0, 0.0, 9.0]])
    weight = math.exp(-LK_DECAY * 0.1)
    torch.testing.assert_close(gradient("lk", far)[0, 0], weight * gradient("kl", far)[0, 0], rtol=0.02, atol=0)
    near = probs.log() + torch.tensor([[0.01, 0.0, -0.01]])
    torch.testing.assert_close(gradient("lk", near), gradient("tv", near), rtol=0.1, atol=2e-3)


def test_acceptance_is_how_often_rejection_sampling_accepts() -> None:
    p, q = [0.5, 0.1, 0.2], [0.3, 0.6, 0.1]  # the target puts 0.2 on tokens the draft cannot propose
    targets = Targets(torch.tensor([p]), torch.tensor([0]), torch.tensor([0]))
    _, accepted = token_losses("kl", torch.tensor([q]).log(), targets, temperature=1.0)
    draw = random.Random(0)
    hits = 0
    for _ in range(20_000):
        token = draw.choices(range(3), q)[0]
        hits += draw.random() < p[token] / q[token]
    assert float(accepted) == pytest.approx(hits / 20_000, abs=0.015)

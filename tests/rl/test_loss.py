import math

import pytest
import torch

from rl.loss import clipped_policy_loss, effective_share, importance_weights, k3_divergence


def test_policy_loss_and_gradient_equal_a_naive_float64_loop() -> None:
    random = torch.Generator().manual_seed(1)
    new = torch.randn(200, generator=random).mul(0.5).requires_grad_()
    old, advantages = torch.zeros(200), torch.randn(200, generator=random)
    advantages[:20] = 0.0
    loss, clipped = clipped_policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    loss = loss.detach()
    for i in range(200):
        a, ratio = float(advantages[i].double()), math.exp(float(new[i].detach().double()))
        bounded = min(max(ratio, 0.8), 1.28)
        takes_bound = bounded * a < ratio * a
        assert float(loss[i]) == pytest.approx(-min(ratio * a, bounded * a), abs=1e-6)
        assert float(gradient[i]) == pytest.approx(0.0 if takes_bound else -ratio * a, abs=1e-6)
        assert bool(clipped[i]) == takes_bound


def test_unmoved_policy_gets_the_plain_policy_gradient_unclipped() -> None:
    new = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, clipped = clipped_policy_loss(new, new.detach(), advantages, clip_low=0.2, clip_high=0.28)
    loss.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)
    assert not clipped.any()


def test_importance_weights_are_truncated_constant_and_can_be_off() -> None:
    old = torch.tensor([0.0, -1.0, 0.0, 90.0], requires_grad=True)
    rollout = torch.tensor([0.0, 0.0, -3.0, -90.0])
    weights = importance_weights(old, rollout, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-1.0), 2.0, 2.0]))
    assert not weights.requires_grad
    assert importance_weights(old, rollout, 0.0).tolist() == [1.0] * 4


def test_k3_is_zero_at_the_reference_never_negative_and_pulls_towards_it() -> None:
    reference = torch.full((3,), -1.0)
    policy = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    divergence = k3_divergence(policy, reference)
    divergence.sum().backward()
    assert float(divergence.detach()[0]) == 0.0
    assert (divergence[1:] > 0).all()
    # d/dlogp = 1 - exp(reference - logp)
    torch.testing.assert_close(policy.grad, 1 - torch.exp(reference - policy.detach()))


def test_k3_is_unbiased_for_the_divergence() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * k3_divergence(policy.log(), reference.log())).sum(), exact)


def test_the_weight_of_a_token_is_p_over_q_up_to_the_cap() -> None:
    p, q = [0.5, 0.2, 0.9, 0.01], [0.25, 0.4, 0.1, 0.01]
    weights = importance_weights(torch.tensor(p).log(), torch.tensor(q).log(), 2.0)
    assert weights.tolist() == pytest.approx([min(2.0, a / b) for a, b in zip(p, q, strict=True)])


def test_the_effective_sample_size_is_that_of_the_weights() -> None:
    assert effective_share(torch.zeros(7)) == pytest.approx(1.0)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert effective_share(weights.log()) == pytest.approx(36 / (3 * 14))
    assert effective_share(torch.tensor([0.0, 500.0])) == pytest.approx(0.5)  # one counts, and nothing overflows

"""Selected log-probs and entropy against log_softmax in float64, values and gradients."""

import pytest
import torch

import kernels.logprob
from kernels.logprob import selected_logprobs


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def expected(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(logits.double() / temperature, dim=1)
    entropy = torch.special.entr(logp.exp()).sum(dim=1)
    return logp.gather(1, token_ids[:, None]).squeeze(1), entropy


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_equal_float64_log_softmax(
    num_tokens: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.logprob.CHUNK_ELEMENTS, "cpu", 8 * 37)  # chunks of 8 rows, the last one ragged
    generator = torch.Generator().manual_seed(num_tokens)
    logits = (torch.randn(num_tokens, 37, generator=generator) * 4).requires_grad_()
    token_ids = torch.randint(37, (num_tokens,), generator=generator)
    weights = torch.randn(2, num_tokens, generator=generator)
    logprobs, entropy = selected_logprobs(logits, token_ids, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()

    exact = logits.detach().double().requires_grad_()
    exact_logprobs, exact_entropy = expected(exact, token_ids, temperature)
    (weights[0] * exact_logprobs + weights[1] * exact_entropy).sum().backward()
    torch.testing.assert_close(logprobs, exact_logprobs.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, exact_entropy.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(logits), gradient(exact).float(), atol=2e-6, rtol=1e-5)


def test_each_output_carries_its_gradient_alone() -> None:
    logits = torch.randn(4, 9)
    token_ids = torch.tensor([0, 3, 8, 3])
    for index in range(2):
        ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        selected_logprobs(ours, token_ids, temperature=0.9)[index].sum().backward()
        expected(exact, token_ids, 0.9)[index].sum().backward()
        torch.testing.assert_close(gradient(ours), gradient(exact).float(), atol=1e-6, rtol=1e-5)


def test_bfloat16_logits_get_bfloat16_gradients_from_float32_arithmetic() -> None:
    logits = (torch.randn(6, 300) * 3).bfloat16().requires_grad_()
    token_ids = torch.randint(300, (6,))
    logprobs, _ = selected_logprobs(logits, token_ids, temperature=1.0)
    logprobs.sum().backward()
    exact = logits.detach().double().requires_grad_()
    exact_logprobs, _ = expected(exact, token_ids, 1.0)
    exact_logprobs.sum().backward()
    torch.testing.assert_close(logprobs, exact_logprobs.float(), atol=1e-5, rtol=1e-5)
    assert gradient(logits).dtype == torch.bfloat16
    torch.testing.assert_close(gradient(logits), gradient(exact).bfloat16(), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("weight", [1.0, 2.0, -2.0])
def test_masked_logits_have_zero_gradient(weight: float) -> None:
    logits = torch.tensor([[0.5, -torch.inf, 1.5, -torch.inf]], requires_grad=True)
    logprobs, entropy = selected_logprobs(logits, torch.tensor([2]), temperature=1.0)
    (logprobs + weight * entropy).sum().backward()
    reduced = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    exact_logprobs, exact_entropy = expected(reduced, torch.tensor([1]), 1.0)
    (exact_logprobs + weight * exact_entropy).sum().backward()
    assert gradient(logits)[0, [1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gradient(logits)[0, [0, 2]], gradient(reduced)[0].float())


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    wide = torch.randn(5, 20)
    logits, token_ids = wide[:, 3:14], torch.tensor([0, 10, 4, 4, 1])
    logprobs, _ = selected_logprobs(logits, token_ids, temperature=1.0)
    torch.testing.assert_close(logprobs, expected(logits, token_ids, 1.0)[0].float())


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        selected_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), temperature=0.0)

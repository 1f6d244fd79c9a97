"""The Triton log-probs, entropies and gradients against float64 autograd.

Without a CUDA device the kernels run under Triton's interpreter.
"""

from collections.abc import Iterator

import pytest
import torch

from kernels.logprob import selected_logprobs, selected_logprobs_reference
from kernels.logprob_triton import BLOCK, selected_logprobs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter's NaN


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def expected(
    logits: torch.Tensor, token_ids: torch.Tensor, weights: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and the gradient of their weighted sum, in float64, over the finite logits of each row."""
    exact = logits.detach().double().requires_grad_()
    finite = exact.masked_fill(exact == -torch.inf, -1e30)
    logp = torch.log_softmax(finite / temperature, dim=1)
    entropy = -(logp.exp() * logp).sum(dim=1)
    logprobs = logp.gather(1, token_ids[:, None]).squeeze(1)
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    assert exact.grad is not None
    return logprobs.detach(), entropy.detach(), exact.grad


def assert_equals_float64(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float) -> None:
    weights = torch.randn(2, logits.shape[0], device=DEVICE)
    ours = logits.detach().requires_grad_()
    logprobs, entropy = selected_logprobs_triton(ours, token_ids, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    exact_logprobs, exact_entropy, exact_grad = expected(logits, token_ids, weights, temperature)
    torch.testing.assert_close(logprobs, exact_logprobs.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, exact_entropy.float(), atol=1e-5, rtol=1e-5)
    assert ours.grad is not None and ours.grad.dtype == logits.dtype
    atol, rtol = (2e-6, 1e-5) if logits.dtype == torch.float32 else (1e-4, 1e-2)
    torch.testing.assert_close(ours.grad, exact_grad.to(logits.dtype), atol=atol, rtol=rtol)


def random_rows(rows: int, vocab: int, spread: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    return logits.to(DEVICE), torch.randint(vocab, (rows,), generator=generator).to(DEVICE)


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 1), (5, 37), (3, BLOCK), (2, 2 * BLOCK + 301)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_equal_float64_autograd(rows: int, vocab: int, temperature: float) -> None:
    assert_equals_float64(*random_rows(rows, vocab), temperature)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 200.0])
def test_flat_and_peaked_rows_keep_their_digits(spread: float) -> None:
    assert_equals_float64(*random_rows(3, 999, spread), 1.0)


def test_masked_logits_have_zero_gradient_wherever_they_lie() -> None:
    logits, token_ids = random_rows(4, 2 * BLOCK + 7)
    logits[0, :BLOCK] = -torch.inf  # the whole first block
    logits[1, BLOCK:] = -torch.inf  # all blocks but the first
    logits[2] = -torch.inf  # all but one token, of probability 1 and entropy 0
    logits[3, 1::2] = -torch.inf
    token_ids[:] = torch.tensor([BLOCK + 3, 5, BLOCK + 1, 6])
    logits[2, BLOCK + 1] = 2.5
    assert_equals_float64(logits, token_ids, 0.8)


def test_a_masked_token_has_probability_zero() -> None:
    logits = torch.tensor([[0.5, -torch.inf, 1.5]], device=DEVICE)
    logprobs, entropy = selected_logprobs_triton(logits, torch.tensor([1], device=DEVICE), temperature=1.0)
    assert logprobs.item() == -torch.inf
    assert entropy.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_shows_in_itself_alone(bad: float) -> None:
    logits, token_ids = random_rows(3, 50)
    logits[1, 9] = bad
    logprobs, entropy = selected_logprobs_triton(logits, token_ids, temperature=1.0)
    assert logprobs.isfinite().tolist() == entropy.isfinite().tolist() == [True, False, True]


def test_each_output_carries_its_gradient_alone() -> None:
    logits, token_ids = random_rows(4, 9)
    for index in range(2):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        selected_logprobs_triton(ours, token_ids, temperature=0.9)[index].sum().backward()
        selected_logprobs_reference(theirs, token_ids, temperature=0.9)[index].sum().backward()
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_rows_may_lie_anywhere() -> None:
    wide, token_ids = random_rows(6, 20)
    for logits in (wide[:, 3:14], wide[::2], wide.T, wide[:1].expand(3, -1)):
        chosen = token_ids[: logits.shape[0]] if logits.shape[0] <= 6 else token_ids.repeat(4)[:20] % 6
        assert_equals_float64(logits, chosen % logits.shape[1], 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(70, 151_936), (300, 49_152), (5, 50_257)])
def test_real_vocabularies_equal_float64_autograd(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, token_ids = random_rows(rows, vocab)
    assert_equals_float64(logits.to(dtype), token_ids, 0.9)


@pytest.mark.gpu
def test_more_than_two_billion_logits_are_addressed() -> None:
    logits = torch.zeros(43_700, 49_152, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 7] = 10
    logits.requires_grad_()
    token_ids = torch.full((logits.shape[0],), 7, device=DEVICE)
    logprobs, _ = selected_logprobs(logits, token_ids, temperature=1.0)
    logprobs[-1].backward()
    exact = torch.log_softmax(logits.detach()[-1].double(), dim=0)[7]
    torch.testing.assert_close(logprobs[-1].double(), exact, atol=1e-5, rtol=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[-1, 7].double(), 1 - exact.exp(), atol=1e-3, rtol=1e-2)
    assert not logits.grad[:-1].any()

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Selected log-probs and entropy as Triton kernels; kernels/logprob.py defines what they compute.

Forward: one read of the logits, a program a row, with a running maximum. Backward: one read of the logits and one write
of their gradient. Neither keeps anything of the logits' size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK = 4096
NUM_WARPS = 4


def selected_logprobs_triton(
    logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """selected_logprobs, in one launch, and one more for the gradient."""
    logprobs, entropy = _SelectedLogprobs.apply(logits, token_ids, temperature)
    return logprobs, entropy


class _SelectedLogprobs(torch.autograd.Function):
    """Keeps, beside its inputs, each row's largest logit and the logarithm of its sum of exponentials."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, vocab_size = logits.shape
        logits = _with_rows(logits)
        token_ids = token_ids.contiguous()
        logprobs, entropy, largest, log_total = torch.empty(
            4, num_rows, dtype=torch.float32, device=logits.device
        ).unbind()
        if num_rows > 0:
            _forward_kernel[(num_rows,)](
                logits,
                token_ids,
                logprobs,
                entropy,
                largest,
                log_total,
                logits.stride(0),
                vocab_size,
                1 / temperature,
                BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
                num_warps=NUM_WARPS,
            )
        ctx.save_for_backward(logits, token_ids, entropy, largest, log_total)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, token_ids, entropy, largest, log_total = ctx.saved_tensors
        num_rows, vocab_size = logits.shape
        grad = torch.empty(num_rows, vocab_size, dtype=logits.dtype, device=logits.device)
        if num_rows > 0:
            block = min(BLOCK, triton.next_power_of_2(vocab_size))
            _backward_kernel[(num_rows, triton.cdiv(vocab_size, block))](
                logits,
                token_ids,
                entropy,
                largest,
                log_total,
                grad_logprobs.contiguous(),
                grad_entropy.contiguous(),
                grad,
                logits.stride(0),
                vocab_size,
                1 / ctx.temperature,
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
        return grad, None, None


def _with_rows(logits: torch.Tensor) -> torch.Tensor:
    """The logits, each row of them contiguous."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def _forward_kernel(
    logits,
    token_ids,
    logprobs,
    entropies,
    maxima,
    log_totals,
    stride,
    vocab_size,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """With w = exp((x - largest) / t): entropy = log sum w - (sum w log w) / sum w."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = float("-inf")
    total = 0.0
    moment = 0.0
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(largest, tl.max(x))
        origin = tl.where(peak == float("-inf"), 0.0, peak)
        # what was summed so far counts from another origin now; before the first finite logit it is 0
        shift = tl.where(largest == float("-inf"), 0.0, (largest - origin) * inverse_temperature)
        decay = tl.exp(shift)
        log_weight = (x - origin) * inverse_temperature
        weight = tl.exp(log_weight)
        moment = decay * (moment + shift * total) + tl.sum(tl.where(weight > 0, weight * log_weight, 0.0))
        total = decay * total + tl.sum(weight)
        largest = peak
    log_total = tl.log(total)
    x = tl.load(logits + tl.load(token_ids + row)).to(tl.float32)
    tl.store(logprobs + row, (x - largest) * inverse_temperature - log_total)
    tl.store(entropies + row, log_total - moment / total)
    tl.store(maxima + row, largest)
    tl.store(log_totals + row, log_total)


@triton.jit
def _backward_kernel(
    logits,
    token_ids,
    entropies,
    maxima,
    log_totals,
    grad_logprobs,
    grad_entropies,
    grad,
    stride,
    vocab_size,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    x = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    grad_logprob = tl.load(grad_logprobs + row)
    logp = (x - tl.load(maxima + row)) * inverse_temperature - tl.load(log_totals + row)
    p = tl.exp(logp)
    by_entropy = tl.load(grad_entropies + row) * (logp + tl.load(entropies + row))
    # a masked logit has probability 0 and log-probability -inf, whose product must be 0
    change = tl.where(p == 0, 0.0, -p * (grad_logprob + by_entropy))
    change += tl.where(token == tl.load(token_ids + row), grad_logprob, 0.0)
    change = (change * inverse_temperature).to(grad.dtype.element_ty)
    tl.store(grad + row * vocab_size + token, change, mask=inside)

"""Log-probabilities of given tokens, and the entropy they were drawn with, from logits too large to keep in float32."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# float32 temporaries of one chunk of the reference, on either device: 16 MB and 256 MB each
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


def selected_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at token_ids, and the entropy of that distribution in nats.

    In Triton on CUDA, by the reference elsewhere. Both results carry gradients; softmaxes are recomputed in the
    backward pass, so nothing of the logits' size outlives it but their gradient, in their own dtype.
    Shapes: logits [T, V]; token_ids [T] int64. Returns logprobs [T] and entropy [T], float32.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} has no log-probabilities; use one above 0")
    if not logits.is_cuda:
        return selected_logprobs_reference(logits, token_ids, temperature=temperature)
    from kernels.logprob_triton import selected_logprobs_triton  # triton is slow to import, and no CPU process needs it

    return selected_logprobs_triton(logits, token_ids, temperature=temperature)


def selected_logprobs_reference(
    logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """selected_logprobs, in torch: the definition. A chunk of rows at a time is float32."""
    logprobs, entropy = _SelectedLogprobs.apply(logits, token_ids, temperature)
    return logprobs, entropy


def _row_chunks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows whose float32 copies stay within the device's budget."""
    rows = max(1, CHUNK_ELEMENTS[logits.device.type] // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


class _SelectedLogprobs(torch.autograd.Function):
    """With p = softmax(z / t) and H its entropy: d log p_y / dz = (1[y] - p) / t and dH / dz = -p (log p + H) / t."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(logprobs)
        for rows in _row_chunks(logits):
            logp = _log_softmax(logits[rows], temperature)
            logprobs[rows] = logp.gather(1, token_ids[rows, None]).squeeze(1)
            entropy[rows] = torch.special.entr(logp.exp_()).sum(dim=1)
        ctx.save_for_backward(logits, token_ids, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None]:
        logits, token_ids, entropy = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for rows in _row_chunks(logits):
            logp = _log_softmax(logits[rows], ctx.temperature)
            probs = logp.exp()
            row_grad = torch.zeros_like(probs)
            if grad_entropy is not None:
                # a masked logit has probability 0 and log-probability -inf, whose product must be 0
                logp.clamp_(min=torch.finfo(torch.float32).min)
                row_grad -= logp.add_(entropy[rows, None]).mul_(probs).mul_(grad_entropy[rows, None])
            if grad_logprobs is not None:
                row_grad -= probs.mul_(grad_logprobs[rows, None])
                row_grad.scatter_add_(1, token_ids[rows, None], grad_logprobs[rows, None])
            grad[rows] = row_grad.div_(ctx.temperature)
        return grad, None, None


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """A float32 tensor of its own, which the caller may overwrite."""
    return torch.log_softmax(logits.float() / temperature, dim=1)

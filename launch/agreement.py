"""Rollouts held against the training forward of the same policy: equal tokens, and how far log-probs drift."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kernels.attention import PackedSequences
from kernels.sample import gumbel_noise, noise_key
from launch.bench_report import WrongResultError
from launch.bench_rollout import PROBE_TOKENS, generate, random_prompts, sampling
from rollout.engine import NativeEngine
from rollout.model import forward_packed
from rollout.types import Prompt, Rollout, SampledUnder, Sampling

# What rounding may do, by dtype: mean drift of a log-prob, and the share of tokens whose draw stays the same. A wrong
# cache, mask or position moves both by orders of magnitude.
TOLERANCE = {torch.float32: (1e-3, 0.999), torch.bfloat16: (0.1, 0.85)}
PROMPT_LENGTHS = (1, 17, 64)
RESPONSE_TOKENS = 48
assert max(PROMPT_LENGTHS) + RESPONSE_TOKENS <= PROBE_TOKENS


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout of T tokens as the training forward sees it, each token given those before it.

    logprobs [T]: of the rollout's own tokens. best, second [T] int64: the tokens whose log-prob plus noise is largest
    and second largest, so best is what would be sampled; gap [T]: by how much best wins.
    """

    logprobs: torch.Tensor
    best: torch.Tensor
    second: torch.Tensor
    gap: torch.Tensor


@torch.no_grad()
def score(model: PreTrainedModel, prompt: Prompt, rollout: Rollout, sampling: Sampling) -> Scored:
    """Forward prompt and rollout as training does, and draw every token again with the noise the engine used."""
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0), "filters are not scored"
    device, start = model.device, len(prompt.token_ids)
    tokens = torch.tensor([*prompt.token_ids, *rollout.token_ids], device=device)
    index = torch.arange(len(tokens), device=device)
    seqs = PackedSequences(torch.tensor([0, len(tokens)], dtype=torch.int32, device=device), len(tokens))
    logits = forward_packed(model, tokens, index, seqs, index[start - 1 : -1])
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=1)
    key = noise_key(seed=sampling.seed, step=sampling.step, prompt_id=prompt.id, sample=rollout.sample)
    positions = index[start:]
    noise = gumbel_noise(torch.full_like(positions, key), positions, logprobs.shape[1])
    values, order = (logprobs + noise).topk(2, dim=1)
    return Scored(
        logprobs=logprobs.gather(1, tokens[start:, None])[:, 0],
        best=order[:, 0],
        second=order[:, 1],
        gap=values[:, 0] - values[:, 1],
    )


def drift(
    model: PreTrainedModel, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], sampling: Sampling
) -> dict[str, Any]:
    """How rollouts and the training forward differ: |log-prob| drift in nats, and the share of equal draws."""
    by_id = {prompt.id: prompt for prompt in prompts}
    drifts, agreed = [], []
    for rollout in rollouts:
        scored = score(model, by_id[rollout.prompt_id], rollout, sampling)
        drifts.append((torch.tensor(rollout.logprobs) - scored.logprobs.cpu()).abs())
        agreed.append(torch.tensor(rollout.token_ids) == scored.best.cpu())
    drifted, same = torch.cat(drifts).double(), torch.cat(agreed).double()
    return {
        "tokens": len(same),
        "mean": float(drifted.mean()),
        "p99": float(drifted.sort().values[int(0.99 * (len(drifted) - 1))]),
        "max": float(drifted.max()),
        "agreement": float(same.mean()),
    }


def verify(engine: NativeEngine, model: PreTrainedModel, *, seed: int, under: SampledUnder = "dense") -> dict[str, Any]:
    """Prove an engine before it is timed: its rollouts are what the training forward would sample, up to rounding.

    under: how it attends, by a budget that leaves nothing of such short sequences out.
    Returns the drift; raises WrongResultError where it is more than rounding explains.
    """
    vocab_size = model.config.get_text_config().vocab_size
    prompts = [random_prompts(1, length, vocab_size, seed=seed + length)[0] for length in PROMPT_LENGTHS]
    how = replace(sampling(RESPONSE_TOKENS, seed=seed, num_samples=2), under=under)
    found = drift(model, prompts, generate(engine, prompts, how).rollouts, how)
    mean, agreement = TOLERANCE[model.dtype]
    if not (found["mean"] <= mean and found["agreement"] >= agreement):  # written so that NaN fails
        raise WrongResultError(
            f"the engine's log-probs differ from the training forward's by {found['mean']:.2g} on average "
            f"({mean:g} allowed) and {found['agreement']:.1%} of its tokens are the same ({agreement:.1%} wanted)"
        )
    return found


def divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(dense || other) of two logits [R, V], in nats: [R] float32."""
    log_p, log_q = (logits.float().log_softmax(dim=1) for logits in (dense, other))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)

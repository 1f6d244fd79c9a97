"""What is minimised, token by token.

Every function takes the R response tokens of a batch, float32 and already selected by its loss mask, and gives one
value a token. Who calls them sums over the tokens and divides by the response tokens of the whole update, whatever
micro-batch or rank they lie on (token-level aggregation: DAPO, arXiv 2503.14476, sec. 3.3).

Three log-probs of a token meet here: `logprobs` of the policy being trained, with gradients; `old_logprobs` of the
policy before the step, by the same forward pass; `rollout_logprobs` as the engine reported them when it sampled, from
another distribution than the policy's where it attended to a part of the keys (Rollout.sampled_under).
"""

import torch

from rl.types import Batch, StepStats

# the rows of a record, [len(RECORD), R]: what is kept of every response token of a step
RECORD = ("loss", "entropy", "kl", "clipped", "importance", "log_ratio", "prob_diff", "logprob_diff")


def importance_weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(exp(old - rollout), cap), a constant: corrects for the engine sampling from other probabilities.

    Slightly other ones by rounding, or those of sparse attention: the old log-probs are dense in any case.

    Shapes: all [R]. cap 0 turns the correction off: ones.
    Source: truncated importance sampling (Ionides 2008), as for rollout engines in fengyao.notion.site/off-policy-rl.
    """
    if cap == 0:
        return torch.ones_like(old_logprobs)
    return torch.exp(old_logprobs - rollout_logprobs).clamp(max=cap).detach()


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) with ratio = exp(logprobs - old_logprobs).

    Shapes: all [R]. Returns the loss, and whether clipping took the token's gradient away (bool).
    Source: PPO (arXiv 1707.06347, eq. 7); the two bounds: clip-higher, DAPO (arXiv 2503.14476, sec. 3.1).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = torch.where(advantages > 0, ratio > 1 + clip_high, (advantages < 0) & (ratio < 1 - clip_low))
    return -torch.minimum(ratio * advantages, bounded * advantages), clipped


def k3_divergence(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) estimated at the sampled token: exp(d) - d - 1 with d = reference - policy.

    Shapes: both [R]. Never negative.
    Source: Schulman, joschu.net/blog/kl-approx.html, k3; GRPO (arXiv 2402.03300, eq. 4).
    """
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1


def step_stats(record: torch.Tensor, batch: Batch, grad_norm: float, lr: float, seconds: float) -> StepStats:
    """Means over the response tokens of a record [len(RECORD), R]; prob_diff and logprob_diff are NaN where unknown."""
    row = dict(zip(RECORD, record, strict=True))
    num_tokens = record.shape[1]
    known = ~row["prob_diff"].isnan()
    prob_diff, logprob_diff = row["prob_diff"][known], row["logprob_diff"][known]
    return StepStats(
        loss=float(row["loss"].mean()),
        grad_norm=grad_norm,
        lr=lr,
        entropy=float(row["entropy"].mean()),
        kl=float(row["kl"].mean()),
        clip_fraction=float(row["clipped"].mean()),
        importance_mean=float(row["importance"].mean()),
        log_ratio_mean=float(row["log_ratio"].mean()),
        log_ratio_max=float(row["log_ratio"].max()),
        effective_share=effective_share(row["log_ratio"]),
        prob_diff_mean=float(prob_diff.mean()) if known.any() else None,
        prob_diff_max=float(prob_diff.max()) if known.any() else None,
        logprob_diff_mean=float(logprob_diff.mean()) if known.any() else None,
        logprob_diff_p99=_percentile(logprob_diff, 0.99) if known.any() else None,
        num_tokens=num_tokens,
        num_sequences=len(batch.cu_seqlens) - 1,
        seconds=seconds,
    )


def effective_share(log_ratio: torch.Tensor) -> float:
    """The effective sample size of tokens weighed by p over q, not truncated, as a share of their number: 0 to 1.

    (sum w)^2 / (R sum w^2) with w = exp(log_ratio) (Kong 1992). log_ratio [R].
    """
    weights = torch.exp(log_ratio.double() - log_ratio.max())  # a common factor cancels
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def _percentile(values: torch.Tensor, share: float) -> float:
    return float(values.kthvalue(max(1, round(share * len(values)))).values)

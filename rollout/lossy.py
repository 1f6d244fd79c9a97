"""Sampling from the policy under sparse attention: what it takes beside what lossless drafting has (docs/sparse.md).

"sparse" (SeerAttention-R, arXiv 2506.08889): cycles forward pending tokens under the selector, after dense prompts.
"rectified" (ReSA, arXiv 2506.04108): a cycle drafts a window under the selector and verifies it densely, as drafting
does, but keeps all of it. So dense keys and values replace the sparse ones, the window's last token is drawn densely,
and of every token both log-probs are known: the one it was drawn with, and the policy's own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from drafter.types import OFF, Drafts, Strategy
from kernels.cycle import CycleInputs
from kernels.logprob import selected_logprobs
from rollout.types import SampledUnder

# Sampling.under by sparse.mode; the others' rollouts are dense, for drafts are verified densely
UNDER: dict[str, SampledUnder] = {"plain": "sparse", "rectified": "rectified"}


@dataclass(frozen=True, slots=True)
class Settled:
    """What B rows of Q tokens have after each. token_ids [B * Q] int64; logprobs, dense_logprobs [B * Q] float32.

    logprobs: what each was drawn with; dense_logprobs: the policy's own.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    dense_logprobs: torch.Tensor


def window(every: int) -> Strategy:
    """How a cycle drafts so many tokens: all but the last, which the dense forward draws. 1 is dense decoding."""
    return OFF if every == 1 else Strategy("sparse", depth=every - 1, top_k=1, num_verify=every - 1)


def let_stand(
    drafts: Drafts | None,
    draft_logprobs: torch.Tensor,
    inputs: CycleInputs,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    temperature: float,
) -> Settled:
    """Put drafted chains in the place of what the target drew, so that commit keeps them whole.

    After its last node a row has what the target drew there. Nothing synchronises on a GPU.
    Shapes: draft_logprobs [B, M] float32: what nodes were drawn with; logits [B * Q, V], token_ids and logprobs
    [B * Q]: the target's after each of Q = 1 + M tokens. The policy's own log-probs are at the temperature, of greedy
    decoding at 1, without filters.
    """
    if drafts is not None:
        column = torch.arange(1 + drafts.token_ids.shape[1], device=logits.device)
        stands = (column < inputs.num_valid[:, None]).flatten()
        token_ids = torch.where(stands, F.pad(drafts.token_ids, (0, 1)).flatten().long(), token_ids)
        logprobs = torch.where(stands, F.pad(draft_logprobs, (0, 1)).flatten(), logprobs)
    dense_logprobs, _ = selected_logprobs(logits, token_ids, temperature=temperature or 1.0)
    return Settled(token_ids, logprobs, dense_logprobs)

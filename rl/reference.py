"""The reference policy's log-probs: from workers that computed them while they were idle, and of the rest now."""

from collections.abc import Callable, Mapping, Sequence

import torch

from rl.batch import select, supervised_batch, to_device
from rl.packed import Round
from rl.types import Batch
from rollout.types import Prompt, Rollout

Key = tuple[str, int]  # prompt id, sample
References = Mapping[Key, Sequence[float]]


def completed(each: Round, forward: Callable[[Round], torch.Tensor]) -> torch.Tensor:
    """The reference's log-probs of a round's targets, [R] float32: what the batch knows, and what forward computes.

    forward: a round's, [R]. It is given the sequences of which something is missing, and not called without any.
    """
    batch = each.batch
    known = batch.reference_logprobs[each.targets]
    missing = known.isnan()
    if not missing.any():
        return known
    owners = torch.bucketize(each.targets, batch.cu_seqlens[1:], right=True)
    unknown = owners[missing].unique()
    part = to_device(select(batch, unknown.tolist()), known.device)
    (targets,) = part.loss_mask.nonzero(as_tuple=True)
    known = known.clone()
    known[torch.isin(owners, unknown)] = forward(Round(part, targets, each.weight))
    return known


def responses(pairs: Sequence[tuple[Prompt, Rollout]]) -> Batch:
    """Prompts and what was answered, to be scored."""
    return supervised_batch([prompt.token_ids for prompt, _ in pairs], [rollout.token_ids for _, rollout in pairs])


def by_rollout(pairs: Sequence[tuple[Prompt, Rollout]], logprobs: torch.Tensor) -> dict[Key, list[float]]:
    """The scores of these responses, [R] end to end, by rollout."""
    parts = logprobs.split([len(rollout.token_ids) for _, rollout in pairs])
    return {(rollout.prompt_id, rollout.sample): part.tolist() for (_, rollout), part in zip(pairs, parts, strict=True)}

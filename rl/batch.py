"""From groups of rollouts to packed tensors, and to the pieces one forward pass or one rank takes."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from rl.types import Batch, Group
from rollout.types import Rollout


def pack(groups: Sequence[Group], references: Mapping[tuple[str, int], Sequence[float]] | None = None) -> Batch:
    """Lay all rollouts end to end, group by group and in each by sample.

    references: the reference policy's log-probs of responses, by prompt id and sample, of those that are known.
    """
    known = references or {}
    return _join(
        [
            _sequence(
                group.prompt.token_ids,
                rollout.token_ids,
                rollout.logprobs,
                advantage,
                known.get((rollout.prompt_id, rollout.sample)),
                _dense_logprobs(rollout),
            )
            for group in groups
            for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        ]
    )


def supervised_batch(prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]]) -> Batch:
    """Prompts with their worked solutions, given as token ids; the solutions are what is learnt."""
    return _join(
        [
            _sequence(prompt, solution, [0.0] * len(solution), 0.0)
            for prompt, solution in zip(prompts, solutions, strict=True)
        ]
    )


def split(batch: Batch, n: int) -> list[Batch]:
    """n batches of nearly equal token counts, some empty when there are fewer sequences; order is kept in each.

    The longest sequence goes first, each to the lightest batch (Graham's LPT rule), ties to the earlier one.
    """
    lengths = _lengths(batch)
    loads, members = [0] * n, [[] for _ in range(n)]  # type: list[int], list[list[int]]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[index]
        members[lightest].append(index)
    return [select(batch, sorted(indices)) for indices in members]


def microbatches(batch: Batch, max_tokens: int) -> list[Batch]:
    """Consecutive whole sequences of together at most max_tokens tokens; one longer than that stands alone."""
    members: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(_lengths(batch)):
        if not members or tokens + length > max_tokens:
            members.append([])
            tokens = 0
        members[-1].append(index)
        tokens += length
    return [select(batch, indices) for indices in members]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return Batch(**{field.name: getattr(batch, field.name).to(device) for field in fields(Batch)})


def _dense_logprobs(rollout: Rollout) -> Sequence[float] | None:
    """What the engine's dense forward gave each token; None where it made none."""
    match rollout.sampled_under:
        case "dense":
            return rollout.logprobs
        case "rectified":
            return rollout.dense_logprobs
    return None


_Scores = Sequence[float] | None
_Sequence = tuple[Sequence[int], Sequence[int], Sequence[float], float, _Scores, _Scores]


def _sequence(
    prompt: Sequence[int],
    response: Sequence[int],
    logprobs: Sequence[float],
    advantage: float,
    reference: _Scores = None,
    dense: _Scores = None,
) -> _Sequence:
    """One prompt and response with what belongs to them."""
    assert prompt, "the first response token needs a token before it"
    assert len(response) == len(logprobs), f"{len(response)} response tokens, {len(logprobs)} log-probs"
    for scores in (reference, dense):
        assert scores is None or len(response) == len(scores), f"{len(response)} tokens are scored otherwise"
    return prompt, response, logprobs, advantage, reference, dense


def _join(sequences: Sequence[_Sequence]) -> Batch:
    """Pack sequences in the order given."""
    lengths = [len(prompt) + len(response) for prompt, response, *_ in sequences]
    batch = Batch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.cat([torch.zeros(0, dtype=torch.int64), *map(torch.arange, lengths)]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        old_logprobs=torch.zeros(sum(lengths)),
        advantages=torch.zeros(sum(lengths)),
        loss_mask=torch.zeros(sum(lengths), dtype=torch.bool),
        reference_logprobs=torch.full((sum(lengths),), torch.nan),
        dense_logprobs=torch.full((sum(lengths),), torch.nan),
    )
    for start, end, (prompt, response, logprobs, advantage, reference, dense) in zip(
        batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), sequences, strict=True
    ):
        answer = slice(start + len(prompt), end)
        batch.token_ids[start:end] = torch.tensor([*prompt, *response])
        batch.old_logprobs[answer] = torch.tensor(logprobs)
        batch.advantages[answer] = advantage
        batch.loss_mask[answer] = True
        if reference is not None:
            batch.reference_logprobs[answer] = torch.tensor(reference)
        if dense is not None:
            batch.dense_logprobs[answer] = torch.tensor(dense)
    return batch


def _lengths(batch: Batch) -> list[int]:
    """Tokens of each sequence."""
    return batch.cu_seqlens.diff().tolist()


def select(batch: Batch, indices: Sequence[int]) -> Batch:
    """The sequences at these indices, packed in that order."""
    starts, lengths = batch.cu_seqlens.tolist(), _lengths(batch)
    tokens = torch.cat(
        [torch.zeros(0, dtype=torch.int64)] + [torch.arange(starts[i], starts[i] + lengths[i]) for i in indices]
    )
    return Batch(
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        cu_seqlens=torch.tensor([0, *(lengths[i] for i in indices)]).cumsum(0).to(torch.int32),
        old_logprobs=batch.old_logprobs[tokens],
        advantages=batch.advantages[tokens],
        loss_mask=batch.loss_mask[tokens],
        reference_logprobs=batch.reference_logprobs[tokens],
        dense_logprobs=batch.dense_logprobs[tokens],
    )

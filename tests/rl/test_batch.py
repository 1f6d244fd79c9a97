from collections.abc import Callable

import pytest
import torch

from rl.batch import microbatches, pack, split, supervised_batch
from rl.types import Batch, Group


def sequences(batch: Batch) -> list[tuple[list[float], ...]]:
    """Every sequence's rows, comparable."""
    bounds = batch.cu_seqlens.tolist()
    fields = (batch.token_ids, batch.positions, batch.old_logprobs, batch.advantages, batch.loss_mask)
    return [
        tuple(field[start:end].tolist() for field in fields) for start, end in zip(bounds, bounds[1:], strict=False)
    ]


def test_pack_lays_prompts_and_responses_end_to_end(make_groups: Callable[..., list[Group]]) -> None:
    groups = make_groups()
    packed = sequences(pack(groups))
    flat = [
        (group, rollout, a) for group in groups for rollout, a in zip(group.rollouts, group.advantages, strict=True)
    ]
    assert len(packed) == len(flat)
    for (tokens, positions, logprobs, advantages, mask), (group, rollout, advantage) in zip(packed, flat, strict=True):
        prompt, response = group.prompt.token_ids, rollout.token_ids
        assert tokens == prompt + response
        assert positions == list(range(len(tokens)))
        assert mask == [False] * len(prompt) + [True] * len(response)
        assert logprobs == pytest.approx([0.0] * len(prompt) + rollout.logprobs)
        assert advantages == pytest.approx([0.0] * len(prompt) + [advantage] * len(response))


def test_dtypes_are_those_of_the_contract(batch: Batch) -> None:
    assert (batch.token_ids.dtype, batch.positions.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert (batch.old_logprobs.dtype, batch.advantages.dtype, batch.loss_mask.dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )


@pytest.mark.parametrize("n", [1, 2, 4, 9, 11])
def test_split_keeps_every_sequence_once_and_in_order(batch: Batch, n: int) -> None:
    whole, shares = sequences(batch), [sequences(share) for share in split(batch, n)]
    assert len(shares) == n
    places = [[whole.index(sequence) for sequence in share] for share in shares]
    assert sorted(place for share in places for place in share) == list(range(len(whole)))
    assert all(share == sorted(share) for share in places)
    assert n > len(whole) or all(places)


def test_split_balances_tokens_within_the_longest_sequence(batch: Batch) -> None:
    loads = [len(share.token_ids) for share in split(batch, 3)]
    assert max(loads) - min(loads) <= int(batch.cu_seqlens.diff().max())


@pytest.mark.parametrize("max_tokens", [1, 20, 33, 10_000])
def test_microbatches_hold_whole_sequences_within_the_budget(batch: Batch, max_tokens: int) -> None:
    pieces = microbatches(batch, max_tokens)
    assert [sequence for piece in pieces for sequence in sequences(piece)] == sequences(batch)
    assert all(len(piece.token_ids) <= max_tokens or len(piece.cu_seqlens) == 2 for piece in pieces)


def test_microbatches_of_nothing_are_none(batch: Batch) -> None:
    (*_, empty) = split(batch, 11)
    assert len(empty.token_ids) == 0
    assert microbatches(empty, 100) == []


def test_supervised_batch_learns_the_solutions_alone() -> None:
    batch = supervised_batch([[5, 6], [7]], [[8], [9, 10]])
    assert batch.token_ids.tolist() == [5, 6, 8, 7, 9, 10]
    assert batch.loss_mask.tolist() == [False, False, True, False, True, True]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]

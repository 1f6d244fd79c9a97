"""What is kept of verifications for gates to learn from: which cycles, rows and layers, and how much."""

import pytest
import torch

from drafter.gate_training import LayerSample
from kernels.attention import paged_attention, paged_sequences
from rollout import gate_sampler
from rollout.gate_sampler import GateSampler, WatchedRows
from rollout.sequence import Sequence
from rollout.types import Prompt

BLOCK, BUDGET = 4, 2


def sequence(name: str, length: int) -> Sequence:
    prompt = Prompt(id=name, token_ids=[1] * length, answer="")
    return Sequence(prompt=prompt, sample=0, noise_key=0, max_length=length + 8, block_size=16)


def watched(sampler: GateSampler, sequences: list[Sequence]) -> WatchedRows:
    """The next cycle that is."""
    return next(each for each in (sampler.next_cycle(sequences) for _ in range(99)) if each is not None)


def sample(size: int) -> LayerSample:
    nothing = torch.empty(0)
    return LayerSample(size, nothing, nothing, torch.zeros(size, 1, 1), nothing)


def test_one_cycle_in_so_many_is_watched() -> None:
    sampler = GateSampler([0], select_block=BLOCK, budget_blocks=BUDGET)
    found = [sampler.next_cycle([sequence("a", 40)]) is not None for _ in range(3 * gate_sampler.WATCH_EVERY)]
    assert sum(found) == 3 and found.index(True) == gate_sampler.WATCH_EVERY - 1


def test_rows_that_leave_blocks_out_take_turns_and_so_do_layers() -> None:
    sampler = GateSampler([0, 2, 3, 5, 6, 7], select_block=BLOCK, budget_blocks=BUDGET)
    short = (BUDGET + 1) * BLOCK  # its last token is pending: it has as many complete blocks as are read anyway
    sequences = [sequence("a", short), sequence("b", short + 1), sequence("c", 40), sequence("d", 40)]
    cycles = [watched(sampler, sequences) for _ in range(3)]
    assert [sorted(each.prompts.values()) for each in cycles] == [["b", "c"], ["b", "d"], ["c", "d"]]
    assert [sorted(each.layers) for each in cycles] == [[0, 2, 3, 5], [0, 2, 6, 7], [3, 5, 6, 7]]
    assert not cycles[0].takes(7) and cycles[1].takes(7)


def test_without_a_sequence_to_select_in_nothing_is_watched() -> None:
    sampler = GateSampler([0], select_block=BLOCK, budget_blocks=BUDGET)
    assert {sampler.next_cycle([sequence("a", 9)]) for _ in range(99)} == {None}


def test_the_newest_are_kept_up_to_a_number_and_up_to_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = GateSampler([0], select_block=BLOCK, budget_blocks=BUDGET)
    monkeypatch.setattr(gate_sampler, "MAX_SAMPLES", 3)
    monkeypatch.setattr(gate_sampler, "MAX_BYTES", 400)
    keep = watched(sampler, [sequence("a", 40)]).keep
    for number, size in enumerate([10, 20, 30, 40]):
        keep(f"p{number}", sample(size))
    assert [prompt for prompt, _ in sampler.take()] == ["p1", "p2", "p3"]
    for number, size in enumerate([60, 30, 50]):  # of four bytes each
        keep(f"q{number}", sample(size))
    assert [prompt for prompt, _ in sampler.take()] == ["q1", "q2"]
    keep("heavy", sample(500))  # one is kept in any case
    assert [prompt for prompt, _ in sampler.take()] == ["heavy"]
    assert sampler.take() == []


def test_what_is_watched_attends_as_it_would_have_and_hands_on_what_autograd_can_keep() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 4, 8, generator=generator)
    keys, values = (torch.randn(9, 16, 2, 8, generator=generator) for _ in range(2))
    seqs = paged_sequences(
        cu_seqlens_q=torch.tensor([0, 3, 6], dtype=torch.int32),
        max_seqlen_q=3,
        context_lens=torch.tensor([37, 45], dtype=torch.int32),
        max_context=45,
        block_tables=torch.arange(8, dtype=torch.int32).view(2, 4),
        slots=torch.zeros(6, dtype=torch.int64),
        block_size=16,
    )
    kept: list[tuple[str, LayerSample]] = []
    positions = torch.tensor([37, 38, 39, 45, 46, 47])
    rows = WatchedRows({1: "b"}, frozenset({3}), BLOCK, lambda *each: kept.append(each))
    with torch.inference_mode():
        attended = rows.attend(3, query.clone(), positions, keys.clone(), values, seqs, scale=0.3)
    expected = paged_attention(query, keys, values, seqs, scale=0.3, sliding_window=None, softcap=None)
    torch.testing.assert_close(attended, expected)
    ((prompt, found),) = kept
    assert prompt == "b" and found.layer == 3 and found.positions.tolist() == [45, 46, 47]
    assert torch.equal(found.query, query[3:]) and torch.equal(found.keys, keys[4:7].flatten(0, 1)[:44])
    assert not any(tensor.is_inference() for tensor in (found.query, found.keys, found.weights, found.positions))

"""Sequences on rows of the device: as many launches for many that come and go as for one, and who sits where."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch

from drafter.ngram import NgramDrafter
from drafter.rings import FeatureRings
from drafter.types import OFF, Strategy
from rollout.residency import Residency
from rollout.sequence import Sequence

Launches = Callable[[Callable[[], object]], int]
MakeSequence = Callable[..., Sequence]
NUM_ROWS, MAX_LENGTH, WIDTH = 32, 64, 20
SUFFIX = Strategy(source="suffix", depth=4, top_k=1, num_verify=4)


def make_residency(source: Literal["off", "suffix"]) -> Residency:
    rings = FeatureRings(
        aux_layers=(0, 1, 1),
        hidden_size=4,
        window=8,
        max_nodes=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sink=None,
        max_windows=math.inf,
    )
    return Residency(
        num_rows=NUM_ROWS,
        num_texts=4 * NUM_ROWS,
        max_length=MAX_LENGTH,
        table_width=WIDTH,
        max_nodes=4,
        dummy_block=0,
        device=torch.device("cpu"),
        drafter=NgramDrafter(min_match=2) if source == "suffix" else None,
        reader=rings if source == "suffix" else None,
    )


def coming(make_sequence: MakeSequence, count: int) -> list[Sequence]:
    """Two samples of each prompt, each with blocks for what it holds."""
    sequences = []
    for number in range(count):
        prompt = [3 + number // 2, 4, 5 + number // 2]
        sequence = make_sequence(f"p{number // 2}", prompt, sample=number % 2, max_new_tokens=20)
        sequence.block_table[:2] = 1 + 2 * number, 2 + 2 * number
        sequence.num_blocks = 2
        sequences.append(sequence)
    return sequences


def assert_mirrored(residency: Residency) -> None:
    """The device's rows are the host's."""
    rows, texts = residency.rows, residency.texts
    count = len(residency.sequences)
    assert rows.active.tolist() == [1] * count + [0] * (NUM_ROWS - count)
    assert rows.text[:count].tolist() == residency.row_texts().tolist()
    assert (texts.groups[rows.text[count:]] == -1).all() and (texts.lengths[rows.text[count:]] == 1).all()
    for row, sequence in enumerate(residency.sequences):
        text = int(rows.text[row])
        assert texts.tokens[text, : texts.lengths[text]].tolist() == sequence.tokens
        assert (int(rows.keys[row]), int(rows.max_lengths[row])) == (sequence.noise_key, sequence.max_length)
        held = sequence.block_table[: sequence.num_blocks]
        assert rows.block_tables[row, : sequence.num_blocks].tolist() == held.tolist()


def finish(residency: Residency, rows: list[int]) -> list[Sequence]:
    gone = [residency.sequences[row] for row in rows]
    for sequence in gone:
        sequence.finish = "stop"
    return gone


@pytest.mark.parametrize("source", ["off", "suffix"])
def test_as_many_launches_for_many_sequences_as_for_two(
    source: Literal["off", "suffix"], make_sequence: MakeSequence, launches: Launches
) -> None:
    def count(number: int) -> tuple[int, ...]:
        residency = make_residency(source)
        sequences = coming(make_sequence, number)
        residency.expect(sequences)
        counts = [launches(partial(residency.enter, sequences)), launches(residency.upload_blocks)]
        gone = finish(residency, list(range(number // 2)))
        return *counts, launches(partial(residency.leave, gone)), launches(residency.upload_blocks)

    assert count(4) == count(24)
    assert max(count(24)) <= 10


def test_a_cycle_without_drafts_does_nothing_for_a_drafter(make_sequence: MakeSequence, launches: Launches) -> None:
    with_drafter, without = make_residency("suffix"), make_residency("off")
    with_drafter.reader = None  # which reads whatever is drafted
    counts = []
    for residency in (with_drafter, without):
        sequences = coming(make_sequence, 10)
        residency.expect(sequences)

        def cycle(residency: Residency = residency, sequences: list[Sequence] = sequences) -> None:
            residency.enter(sequences)
            residency.upload_blocks()
            residency.refresh(OFF)
            residency.leave(finish(residency, [1, 4, 5]))
            residency.clear()

        counts.append(launches(cycle))
    assert counts[0] == counts[1]


def test_rows_mirror_whoever_comes_and_goes(make_sequence: MakeSequence) -> None:
    choices = random.Random(0)
    residency = make_residency("suffix")
    waiting = coming(make_sequence, 120)
    residency.expect(waiting)
    for _ in range(60):
        room = min(NUM_ROWS - len(residency.sequences), len(waiting))
        coming_now = [waiting.pop(0) for _ in range(choices.randint(0, room))]
        residency.enter(coming_now)
        residency.upload_blocks()
        residency.refresh(choices.choice([OFF, SUFFIX]))
        assert_mirrored(residency)
        leaving = choices.sample(range(len(residency.sequences)), choices.randint(0, len(residency.sequences)))
        gone = finish(residency, leaving)
        for sequence in gone[::3]:  # these lost their blocks, and come again
            sequence.finish = None
            waiting.append(sequence)
        residency.leave(gone)
        assert_mirrored(residency)
    residency.clear()
    assert (residency.texts.groups == -1).all()
    assert_mirrored(residency)

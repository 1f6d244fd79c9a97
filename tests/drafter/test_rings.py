"""What cycles leave in the rings reaches the buffer once, in order, aligned with its tokens, and under its version."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from drafter.buffer import FeatureBuffer, FeatureWindow
from drafter.rings import FeatureRings
from drafter.types import CycleFeatures, Drafts, Rows, Texts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, WINDOW, MAX_NODES, MAX_LENGTH, NUM_TEXTS, NUM_ROWS = 4, 8, 5, 200, 6, 3


@dataclass
class Shelf:
    """A sink that keeps everything."""

    windows: list[FeatureWindow] = field(default_factory=list)

    def add(self, window: FeatureWindow) -> None:
        self.windows.append(window)


class Engine:
    """Cycles whose hidden states say where they were computed, by text and position; the host reads one cycle late."""

    def __init__(self, rings: FeatureRings) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=DEVICE)

        self.rings = rings
        self.texts = Texts(zeros(NUM_TEXTS + 1, MAX_LENGTH), zeros(NUM_TEXTS + 1), zeros(NUM_TEXTS + 1))
        nobody = zeros(NUM_ROWS) + NUM_TEXTS
        self.rows = Rows(nobody, zeros(NUM_ROWS).long(), zeros(NUM_ROWS), zeros(NUM_ROWS), zeros(NUM_ROWS, 1))
        self.lengths = [1] * (NUM_TEXTS + 1)  # on the device, ahead of what the host has read
        self.unread: list[tuple[int, int]] = []
        self.alts: dict[tuple[int, int], int] = {}
        rings.attach(self.texts, num_rows=NUM_ROWS)

    def begin(self, row: int, text: int, length: int, prompt_id: str = "") -> None:
        self.texts.tokens[text, :length] = self.said(text, length)
        self.texts.lengths[text] = self.lengths[text] = length
        self.rows.text[row] = text
        self.rings.name(text, prompt_id)
        self.rings.begin([text], [length])

    def said(self, text: int, length: int) -> torch.Tensor:
        return (1000 * text + torch.arange(length)).int().to(DEVICE)

    def cycle(self, counts: list[int], *, version: int = 0, finished: tuple[int, ...] = ()) -> None:
        """Launch a cycle in which rows commit so many tokens, then read the one before."""
        previous, self.unread = self.unread, []
        width = 1 + MAX_NODES
        states = torch.full((4, NUM_ROWS * width, HIDDEN), -1.0, device=DEVICE)
        ids, parents = torch.full((2, NUM_ROWS, MAX_NODES), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            text = int(self.rows.text[row])
            for place in range(count):
                position = self.lengths[text] - 1 + place
                states[:, row * width + place] = 1000.0 * text + position
                if place:
                    ids[row, place - 1], parents[row, place - 1] = 1000 * text + position, place - 2
            if 0 < count < width:  # the node after the last committed one was rejected
                ids[row, count - 1], parents[row, count - 1] = 77, count - 2
                states[3, row * width + count] = -self.lengths[text]
                self.alts[text, self.lengths[text] + count - 2] = self.lengths[text]
            self.lengths[text] += count
            self.texts.tokens[text, : self.lengths[text]] = self.said(text, self.lengths[text])
            self.texts.lengths[text] = self.lengths[text]
            if count:
                self.unread.append((text, self.lengths[text]))
        self.rings.observe(
            self.texts,
            self.rows,
            CycleFeatures(
                num_rows=NUM_ROWS,
                aux=tuple(states[:3]),
                hidden=states[3],
                counts=torch.tensor(counts, dtype=torch.int32, device=DEVICE),
                path=torch.arange(width, dtype=torch.int32, device=DEVICE).repeat(NUM_ROWS, 1),
                num_valid=torch.tensor(counts, dtype=torch.int32, device=DEVICE),
                drafts=Drafts(ids.to(DEVICE), parents.to(DEVICE), ids[:, 0].to(DEVICE)),
            ),
        )
        texts, lengths = np.array(previous, dtype=np.int64).reshape(-1, 2).T
        self.rings.committed(texts, lengths, version=version, finished=np.isin(texts, finished))


def rings_into(sink: object, *, max_windows: float = math.inf) -> FeatureRings:
    return FeatureRings(
        aux_layers=(0, 1, 2),
        hidden_size=HIDDEN,
        window=WINDOW,
        max_nodes=MAX_NODES,
        dtype=torch.float32,
        device=DEVICE,
        sink=sink,  # type: ignore[arg-type]
        max_windows=max_windows,
    )


def check(engine: Engine, windows: list[FeatureWindow], text: int, first: int) -> int:
    """Every window of a text is what was computed there; returns where they end."""
    for window in windows:
        assert window.first == first
        at = 1000 * text + torch.arange(first, first + window.num_tokens, device=DEVICE)
        assert torch.equal(window.token_ids, at.int()) and torch.equal(window.next_ids, at.int() + 1)
        assert torch.equal(window.aux, at[:, None].float().expand(-1, 3 * HIDDEN))
        assert torch.equal(window.hidden, at[:, None].float().expand(-1, HIDDEN))
        for place in range(window.num_tokens):
            alt = engine.alts.get((text, first + place))
            assert int(window.alt_ids[place]) == (-1 if alt is None else 77)
            if alt is not None:
                assert window.alt_hidden[place].tolist() == [-float(alt)] * HIDDEN
        first += window.num_tokens
    return first


def test_windows_follow_one_another_and_the_rest_comes_at_the_end() -> None:
    shelf = Shelf()
    engine = Engine(rings_into(shelf))
    engine.begin(0, 2, 11, "a")
    engine.begin(2, 4, 5, "b")
    for count in (1, 6, 6, 6, 6, 1, 3, 6, 6):
        engine.cycle([count, 0, 6])
    engine.cycle([0, 0, 0], finished=(2, 4))
    for text, prompt, first in ((2, "a", 10), (4, "b", 4)):
        windows = [window for window in shelf.windows if window.prompt_id == prompt]
        assert all(window.num_tokens == WINDOW for window in windows[:-1])
        assert check(engine, windows, text, first) == engine.lengths[text] - 1


def test_slots_are_free_again_when_texts_finish_or_are_sent_back() -> None:
    shelf = Shelf()
    engine = Engine(rings_into(shelf))
    for turn in range(10):
        for row in range(NUM_ROWS):
            engine.begin(row, (turn + row) % NUM_TEXTS, 3 + turn)
        engine.cycle([2, 1, 6])
        finished = (turn % NUM_TEXTS,)
        engine.cycle([0, 0, 0], finished=finished)
        engine.rings.release([(turn + row) % NUM_TEXTS for row in range(NUM_ROWS)])
        assert (engine.rings.rings.slot_of == NUM_ROWS).all()
        for text in {(turn + row) % NUM_TEXTS for row in range(NUM_ROWS)}:
            windows = [window for window in shelf.windows if window.token_ids[0] // 1000 == text]
            assert check(engine, windows, text, 2 + turn) == engine.lengths[text] - 1
        shelf.windows.clear()
        engine.alts.clear()


def test_a_window_is_of_one_policy_version() -> None:
    shelf = Shelf()
    engine = Engine(rings_into(shelf))
    engine.begin(0, 1, 3)
    for version, count in ((0, 3), (0, 2), (0, 4), (1, 1), (1, 6), (1, 1)):
        engine.cycle([count, 0, 0], version=version)
    engine.rings.release([1])
    assert [(window.version, window.num_tokens) for window in shelf.windows] == [(0, 5), (1, 8), (1, 3)]
    # what was in flight at the end has not been read, and is not handed on
    assert check(engine, shelf.windows, 1, 2) == engine.lengths[1] - 2


def test_windows_can_be_learned_from_when_they_were_made_in_inference_mode() -> None:
    buffer = FeatureBuffer(max_bytes=1 << 20, temperature=0.7)
    with torch.inference_mode():
        engine = Engine(rings_into(buffer))
        engine.begin(0, 1, 3, "a prompt to learn from")
        for _ in range(4):
            engine.cycle([6, 0, 0])
    assert buffer.num_tokens == 2 * WINDOW
    batch = buffer.batch(1000)
    weight = torch.ones(3 * HIDDEN, device=DEVICE, requires_grad=True)
    (batch.aux * weight).sum().backward()
    assert weight.grad is not None
    engine.rings.release([1])  # outside of inference mode


def test_what_is_sampled_at_another_temperature_is_neither_trained_on_nor_judged_by() -> None:
    """A greedy evaluation: of the policy before its warm start, or after an update."""
    buffer = FeatureBuffer(max_bytes=1 << 20, temperature=0.7)
    engine = Engine(rings_into(buffer))
    for temperature, kept in ((0.0, 0), (0.7, 24), (0.0, 24)):
        engine.rings.set_temperature(temperature)
        engine.begin(0, 1, 3, "a prompt to learn from")
        for _ in range(4):
            engine.cycle([6, 0, 0])
        engine.cycle([0, 0, 0], finished=(1,))
        assert buffer.num_tokens == kept
        engine.rings.release([1])


def test_the_ring_outlives_windows_that_are_handed_on_a_cycle_late() -> None:
    shelf = Shelf()
    engine = Engine(rings_into(shelf))
    engine.begin(1, 0, 2)
    for _ in range(25):
        engine.cycle([0, 1 + MAX_NODES, 0])
    assert len(shelf.windows) == 24 * (1 + MAX_NODES) // WINDOW
    check(engine, shelf.windows, 0, 1)


def test_a_bounded_sink_is_given_as_many_windows_of_every_octave_and_none_twice() -> None:
    shelf = Shelf()
    engine = Engine(rings_into(shelf, max_windows=0.25))
    num_cycles = 20
    for turn in range(60):
        before = len(shelf.windows)
        for row, length in enumerate((3, 4, 130)):
            engine.begin(row, row, length + turn % WINDOW)
        for _ in range(num_cycles):
            engine.cycle([1, 1, 1])
        engine.cycle([0, 0, 0])
        engine.rings.release([0, 1, 2])
        for text in range(3):
            end = 0
            for window in shelf.windows[before:]:
                if window.token_ids[0] // 1000 == text:
                    assert window.first >= end
                    end = check(engine, [window], text, window.first)
        engine.alts.clear()
    given = sum(window.num_tokens for window in shelf.windows)
    assert given == pytest.approx(0.25 * WINDOW * 60 * num_cycles, rel=0.25)
    by_text = Counter(int(window.token_ids[0]) // 1000 for window in shelf.windows for _ in window.token_ids)
    assert by_text[2] == pytest.approx(by_text[0] + by_text[1], rel=0.4), "the late text gives as much as the early two"
    assert by_text[0] == pytest.approx(by_text[1], rel=0.5)


def test_rings_serve_without_a_sink() -> None:
    engine = Engine(rings_into(None))
    engine.begin(0, 1, 3)
    for _ in range(4):
        engine.cycle([6, 0, 0])
    engine.rings.release([1])

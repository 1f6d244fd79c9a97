"""Where verification leaves its hidden states: a ring of positions for each running text, and windows to learn from."""

import random
from collections.abc import Sequence

import numpy as np
import torch

from drafter.allocation import allocating
from drafter.buffer import OCTAVE, FeatureBuffer, FeatureWindow
from drafter.types import CycleFeatures, Rows, Texts
from kernels.features import NUM_AUX, Rings, keep_features
from kernels.upload import upload

MIN_POSITIONS = 32  # that a ring keeps: what a head catches up with at once


MAX_WINDOWS = 0.125  # of 128 positions: all that up to 16 plain rows say, and some ten microseconds a cycle
MAX_OCTAVES = 32
MEASURED_EVERY = 32  # cycles: how many tokens are committed in each octave changes slowly
NEVER = np.iinfo(np.int64).max


class FeatureRings:
    """drafter.types.FeatureReader: what a cycle computed for committed tokens stays for drafting and for training.

    The device stores it in the cycle's own graph. The host, told of each cycle one cycle late, copies a window out
    when it is full, before the ring comes round: it holds a window and what two cycles can add. A window is of one
    policy version; what is left when a text ends is one too.

    window: positions handed on at a time. max_nodes: drafted tokens a row and cycle at most. sink: None keeps nothing
    beyond the rings. Nothing that was sampled at another temperature than the sink's is handed on: what a run samples
    beside its rollouts, greedy evaluations before the warm start among it, neither trains nor judges a head.
    max_windows: handed on a cycle on average, as each takes the host's time; infinity hands on all. Where there are
    more, chance decides, so that every octave (drafter/buffer.py) gives as many, and within one every window is as
    likely.
    """

    def __init__(
        self,
        *,
        aux_layers: tuple[int, ...],
        hidden_size: int,
        window: int,
        max_nodes: int,
        dtype: torch.dtype,
        device: torch.device,
        sink: FeatureBuffer | None,
        max_windows: float = MAX_WINDOWS,
    ) -> None:
        assert len(aux_layers) == NUM_AUX
        self.aux_layers = aux_layers
        self.num_slots = 0
        self._hidden_size = hidden_size
        self._window = window
        self._max_nodes = max_nodes
        self._ring_size = ring_positions(window, max_nodes)
        self._dtype = dtype
        self._device = device
        self._sink = sink
        self._hands_on = sink is not None
        self._rings: Rings | None = None
        self._texts: Texts | None = None
        self._max_windows = max_windows
        self._random = random.Random(0)
        self._chances = [1.0] * MAX_OCTAVES
        self._num_cycles = 0
        self._version: int | None = None  # that the positions not yet handed on are of
        self._running: dict[int, int] = {}  # text to slot
        # by text: the next position to hand on, tokens as far as the host has read, and tokens that fill a window
        self._firsts = np.zeros(0, dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._due = np.zeros(0, dtype=np.int64)
        self._prompt_of: dict[int, str] = {}
        self._free: list[int] = []
        self._num_begun = 0

    @property
    def rings(self) -> Rings:
        """The tensors, at addresses that stay until texts or rows change in number."""
        assert self._rings is not None, "attach the texts first"
        return self._rings

    def set_temperature(self, temperature: float) -> None:
        """What is read from now on is sampled at this temperature. Between two calls of the engine's generate."""
        self._hands_on = self._sink is not None and temperature == self._sink.temperature

    def attach(self, texts: Texts, *, num_rows: int) -> None:
        """Read about these texts from now on, of which num_rows at most are written at a time; all of them are free."""
        self._texts = texts
        self._running.clear()
        self._prompt_of.clear()
        self._free = list(range(num_rows - 1, -1, -1))
        num_texts = len(texts.lengths)
        self._firsts, self._lengths, self._due = np.zeros((3, num_texts), dtype=np.int64)
        if self._rings is None or self.num_slots != num_rows or len(self._rings.slot_of) != num_texts:
            self._rings = self._empty(num_texts, num_rows)
        self._rings.slot_of.fill_(num_rows)
        self.num_slots = num_rows

    def name(self, text: int, prompt_id: str) -> None:
        """The prompt that a text is about to answer, before or after begin."""
        self._prompt_of[text] = prompt_id

    def begin(self, texts: Sequence[int], lengths: Sequence[int]) -> None:
        """Sequences of so many tokens begin, or go on after an eviction, to write these texts."""
        slots = [self._free.pop() for _ in texts]
        for text, slot, length in zip(texts, slots, lengths, strict=True):
            assert text not in self._running, f"text {text} is already written"
            self._running[text] = slot
            self._lengths[text] = length
            self._go_on_from(text, length - 1)
        numbers = self._num_begun + 1 + np.arange(len(texts), dtype=np.int32)
        self._num_begun += len(texts)
        rings = self.rings
        of_texts, of_slots, first, number, slot_of = upload(
            self._device,
            np.array(texts, dtype=np.int64),
            np.array(slots, dtype=np.int64),
            np.array(lengths, dtype=np.int32) - np.int32(1),
            numbers,
            np.array(slots, dtype=np.int32),
        )
        rings.slot_of.index_copy_(0, of_texts, slot_of)
        rings.starts.index_copy_(0, of_slots, first)
        rings.begun.index_copy_(0, of_slots, number)

    def observe(self, texts: Texts, rows: Rows, features: CycleFeatures) -> None:
        """Keep what was committed. Called after commit, inside the target's CUDA graph: no host synchronisation."""
        keep_features(
            self.rings,
            texts,
            rows.text[: features.num_rows],
            aux=features.aux,
            hidden=features.hidden,
            counts=features.counts,
            path=features.path,
            num_valid=features.num_valid,
            drafts=features.drafts,
        )

    def committed(self, texts: np.ndarray, lengths: np.ndarray, *, version: int, finished: np.ndarray) -> None:
        """The host has read that these texts have so many tokens, of this policy version; hand on what is complete."""
        if version != self._version:
            for text in self._running:
                self._hand_on_rest(text)
            self._version = version
        if self._num_cycles % MEASURED_EVERY == 0 and len(texts):
            self._chances = self._measure(lengths, lengths - self._lengths[texts])
        self._num_cycles += 1
        self._lengths[texts] = lengths
        for text in texts[lengths >= self._due[texts]].tolist():
            while self._lengths[text] >= self._due[text]:
                self._hand_on(text, int(self._due[text]) - 1)
        self._end(texts[finished].tolist())

    def release(self, texts: Sequence[int]) -> None:
        """These texts are no longer written."""
        self._end([text for text in texts if text in self._running])
        for text in texts:
            self._prompt_of.pop(text, None)

    def _measure(self, lengths: np.ndarray, counts: np.ndarray) -> list[float]:
        """With which chance a window of each octave is handed on, where so many tokens were committed at lengths."""
        octaves = np.frexp(lengths // OCTAVE)[1]  # bit lengths
        tokens = np.bincount(octaves, weights=counts, minlength=MAX_OCTAVES)
        each = self._max_windows * self._window / np.count_nonzero(tokens)
        # an octave that texts have yet to reach may be reached by all of them
        chances: list[float] = np.minimum(1.0, each / np.where(tokens > 0, tokens, counts.sum())).tolist()
        return chances

    def _go_on_from(self, text: int, first: int) -> None:
        self._firsts[text] = first
        self._due[text] = first + self._window + 1 if self._hands_on else NEVER

    def _end(self, texts: Sequence[int]) -> None:
        if not texts:
            return
        for text in texts:
            self._hand_on_rest(text)
            self._free.append(self._running.pop(text))
        (ended,) = upload(self._device, np.array(texts, dtype=np.int64))
        self.rings.slot_of.index_fill_(0, ended, self.num_slots)

    def _hand_on_rest(self, text: int) -> None:
        if self._lengths[text] - 1 > self._firsts[text]:
            self._hand_on(text, int(self._lengths[text]) - 1)

    def _hand_on(self, text: int, end: int) -> None:
        """Give the sink a copy of the positions before end, or chance leaves them out."""
        first, slot = int(self._firsts[text]), self._running[text]
        self._go_on_from(text, end)
        if not self._hands_on or self._random.random() >= self._chances[(first // OCTAVE).bit_length()]:
            return
        assert self._sink is not None and self._texts is not None and self._version is not None
        needed = (end - first) * position_bytes(self._hidden_size, self._dtype.itemsize)
        remedy = "lower drafter.buffer_mb"
        # the copies are learned from, and what inference mode makes takes no part in that
        with torch.inference_mode(False), torch.no_grad(), allocating("features to learn from", needed, remedy):
            token_ids = self._texts.tokens[text, first : end + 1].clone()
            states = self._copy(self.rings.states[slot], first, end)
            alt_ids = self._copy(self.rings.alt_ids[slot], first, end)
            size = self._hidden_size
            aux, hidden, alt_hidden = states.split([NUM_AUX * size, size, size], dim=1)
        self._sink.add(
            FeatureWindow(
                prompt_id=self._prompt_of.get(text, ""),
                first=first,
                version=self._version,
                token_ids=token_ids[:-1],
                next_ids=token_ids[1:],
                aux=aux,
                hidden=hidden,
                alt_ids=alt_ids,
                alt_hidden=alt_hidden,
            )
        )

    def _copy(self, ring: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Positions first to end - 1 of a ring [F, ...]."""
        begin, count = first % self._ring_size, end - first
        if begin + count <= self._ring_size:
            return ring[begin : begin + count].clone()
        return torch.cat([ring[begin:], ring[: begin + count - self._ring_size]])

    def _empty(self, num_texts: int, num_slots: int) -> Rings:
        num_bytes = ring_bytes(
            hidden_size=self._hidden_size,
            window=self._window,
            max_nodes=self._max_nodes,
            num_slots=num_slots,
            itemsize=self._dtype.itemsize,
        )
        remedy = "lower drafter.feature_window or rollout.max_running"
        # written in inference mode and outside of it
        with torch.inference_mode(False), allocating("the drafter's rings of hidden states", num_bytes, remedy):

            def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
                return torch.zeros(shape, dtype=dtype, device=self._device)

            return Rings(
                slot_of=zeros(num_texts),
                starts=zeros(num_slots + 1),
                begun=zeros(num_slots + 1),
                states=zeros(num_slots + 1, self._ring_size, (NUM_AUX + 2) * self._hidden_size, dtype=self._dtype),
                alt_ids=zeros(num_slots + 1, self._ring_size),
            )


def ring_positions(window: int, max_nodes: int) -> int:
    """Positions in a text's ring: a window, and what two cycles can add before it is copied out."""
    return max(window + 2 * (1 + max_nodes), MIN_POSITIONS)


def position_bytes(hidden_size: int, itemsize: int) -> int:
    """What a position takes: aux, final and rejected hidden states, and a rejected token."""
    return (NUM_AUX + 2) * hidden_size * itemsize + 4


def ring_bytes(*, hidden_size: int, window: int, max_nodes: int, num_slots: int, itemsize: int) -> int:
    """What the rings of so many texts, and of nobody, take on the device; a few bytes a text are left out."""
    return (num_slots + 1) * ring_positions(window, max_nodes) * position_bytes(hidden_size, itemsize)

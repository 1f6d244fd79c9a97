"""Where features wait to be learned from: bounded, of the newest policies, late windows kept as well as early ones."""

import random
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from drafter.features import FeatureBatch

HELDOUT = 8  # one prompt in so many is never trained on: what a new drafter is judged by
OCTAVE = 32  # positions of the first octave
MAX_AGE = 8  # policy versions after which features say too little of the present one


@dataclass(frozen=True, slots=True)
class FeatureWindow:
    """Consecutive positions of one text, under one policy version: P positions, H the policy's hidden size.

    first: the position of the first of them. Fields as in FeatureBatch: token_ids, next_ids, alt_ids [P] integer;
    aux [P, 3H]; hidden, alt_hidden [P, H]. The tensors are the window's own: nobody writes them any more.
    """

    prompt_id: str
    first: int
    version: int
    token_ids: torch.Tensor
    next_ids: torch.Tensor
    aux: torch.Tensor
    hidden: torch.Tensor
    alt_ids: torch.Tensor
    alt_hidden: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_bytes(self) -> int:
        tensors = (self.token_ids, self.next_ids, self.aux, self.hidden, self.alt_ids, self.alt_hidden)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def octave(self) -> int:
        """Which doubling of the distance from the text's start it lies in."""
        return (self.first // OCTAVE).bit_length()


class FeatureBuffer:
    """Windows of features on the device that made them, in at most max_bytes. Any thread may add and draw.

    Every rollout has early windows and few have late ones, yet the late ones are forwarded when few sequences run and
    speculation gains most. So positions are grouped by octave: a batch draws from all octaves alike, and the octave
    that fills most memory gives up its oldest window first. Held-out windows are of the newest policy alone.
    """

    def __init__(self, *, max_bytes: int, temperature: float, seed: int = 0) -> None:
        """temperature: the one the run samples at."""
        self.max_bytes = max_bytes
        self.temperature = temperature
        self.newest = -1  # policy version; -1 before the first window
        self._random = random.Random(seed)
        self._train = _Shelves(max_bytes - max_bytes // HELDOUT)
        self._heldout = _Shelves(max_bytes // HELDOUT)
        self._lock = threading.Lock()

    def add(self, window: FeatureWindow) -> None:
        """Keep a window; older ones make room."""
        if not window.num_tokens:
            return
        with self._lock:
            if window.version > self.newest:
                self.newest = window.version
                self._train.drop_older(self.newest - MAX_AGE)
                self._heldout.drop_older(self.newest)
            if not is_heldout(window.prompt_id):
                self._train.add(window)
            elif window.version == self.newest:
                self._heldout.add(window)

    @property
    def num_tokens(self) -> int:
        """Positions to train on."""
        return self._train.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory that features take."""
        return self._train.num_bytes + self._heldout.num_bytes

    def batch(self, tokens: int) -> FeatureBatch:
        """Random windows to train on, octaves alike, none of them twice: at most so many positions, or one window."""
        with self._lock:
            windows = _up_to(tokens, self._train.shuffled(self._random))
        return self._pack(windows)

    def heldout(self, tokens: int, *, version: int) -> FeatureBatch | None:
        """The newest windows of held-out prompts, octaves in turn: at most so many positions, or one window.

        None where no such prompt was answered under this policy version: another's features do not judge.
        """
        with self._lock:
            windows = _up_to(tokens, self._heldout.newest_first()) if version == self.newest else []
        return self._pack(windows) if windows else None

    def _pack(self, windows: list[FeatureWindow]) -> FeatureBatch:
        assert windows, "nothing to draw from: ask num_tokens first"
        device = windows[0].hidden.device

        def joined(field: Callable[[FeatureWindow], torch.Tensor]) -> torch.Tensor:
            return torch.cat([field(window) for window in windows])

        lengths = torch.tensor([0, *(window.num_tokens for window in windows)])
        cu_seqlens = lengths.cumsum(0)
        offsets = torch.tensor([window.first for window in windows]) - cu_seqlens[:-1]
        positions = torch.arange(int(cu_seqlens[-1])) + offsets.repeat_interleave(lengths[1:])
        return FeatureBatch(
            token_ids=joined(lambda window: window.token_ids).long(),
            next_ids=joined(lambda window: window.next_ids).long(),
            positions=positions.to(device),
            aux=joined(lambda window: window.aux),
            hidden=joined(lambda window: window.hidden),
            cu_seqlens=cu_seqlens.to(device, torch.int32),
            versions=torch.tensor([window.version for window in windows], device=device),
            alt_ids=joined(lambda window: window.alt_ids).long(),
            alt_hidden=joined(lambda window: window.alt_hidden),
            temperature=self.temperature,
        )


class _Shelves:
    """Windows by octave, oldest first in each, within a bound of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.num_tokens = 0
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._windows: dict[int, deque[FeatureWindow]] = {}
        self._bytes: dict[int, int] = {}

    def add(self, window: FeatureWindow) -> None:
        self._windows.setdefault(window.octave, deque()).append(window)
        self._count(window, 1)
        while self.num_bytes > self._max_bytes:
            self._drop(max(self._bytes, key=self._bytes.__getitem__))

    def drop_older(self, version: int) -> None:
        """Drop the windows of versions before this one."""
        for octave in list(self._windows):
            while octave in self._windows and self._windows[octave][0].version < version:
                self._drop(octave)

    def shuffled(self, source: random.Random) -> Iterator[FeatureWindow]:
        """All windows, each time a random one of a random octave."""
        left = {octave: list(range(len(windows))) for octave, windows in self._windows.items()}
        while left:
            octave = source.choice(list(left))
            indices = left[octave]
            at = source.randrange(len(indices))
            indices[at], indices[-1] = indices[-1], indices[at]
            yield self._windows[octave][indices.pop()]
            if not indices:
                del left[octave]

    def newest_first(self) -> Iterator[FeatureWindow]:
        """All windows, octaves in turn, from the newest to the oldest of each."""
        for age in range(max(map(len, self._windows.values()), default=0)):
            for windows in self._windows.values():
                if age < len(windows):
                    yield windows[-1 - age]

    def _drop(self, octave: int) -> None:
        window = self._windows[octave].popleft()
        self._count(window, -1)
        if not self._windows[octave]:
            del self._windows[octave], self._bytes[octave]

    def _count(self, window: FeatureWindow, sign: int) -> None:
        self.num_tokens += sign * window.num_tokens
        self.num_bytes += sign * window.num_bytes
        self._bytes[window.octave] = self._bytes.get(window.octave, 0) + sign * window.num_bytes


def is_heldout(prompt_id: str) -> bool:
    """Whether a prompt's features are kept for judging: the same answer in every process and run."""
    return zlib.crc32(prompt_id.encode()) % HELDOUT == 0


def _up_to(tokens: int, windows: Iterator[FeatureWindow]) -> list[FeatureWindow]:
    """The first windows that have no more tokens in all, and the first in any case."""
    taken: list[FeatureWindow] = []
    for window in windows:
        tokens -= window.num_tokens
        if taken and tokens < 0:
            break
        taken.append(window)
    return taken

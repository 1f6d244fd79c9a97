"""What gates learn from while sequences are sampled: of few verifications, few rows and layers.

A verification that is watched runs as it is, outside of its CUDA graph, and waits for the device: one in WATCH_EVERY.
Which one, and what of it, goes by counting alone. Greedy rollouts, which evaluations are, leave nothing.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from drafter.gate_learner import verified_samples
from drafter.gate_training import LayerSample
from kernels.attention import PagedSequences
from rollout.model import kv_shape
from rollout.sequence import Sequence as Writing
from rollout.verified import attend_and_watch

WATCH_EVERY = 32  # cycles
ROWS = 2  # of a verification
LAYERS = 4  # of them
MAX_SAMPLES = 256  # kept between two lessons, the newest: they have the longest contexts
MAX_BYTES = 512 << 20  # of their keys, by which they are heavy


class GateSampler:
    """Keeps samples of these layers, of sequences with more complete blocks than a draft reads."""

    def __init__(self, layers: Sequence[int], *, select_block: int, budget_blocks: int) -> None:
        assert layers, "every layer attends to everything"
        self.budget_blocks = budget_blocks
        self._layers = layers
        self._select_block = select_block
        self._num_cycles = 0
        self._num_watched = 0
        self._samples: deque[tuple[str, LayerSample]] = deque()
        self._num_bytes = 0

    def next_cycle(self, sequences: Sequence[Writing]) -> "WatchedRows | None":
        """A cycle verifies these, by row: what it attends with where it is watched, None where it is not."""
        self._num_cycles += 1
        if self._num_cycles % WATCH_EVERY:
            return None
        least = (self.budget_blocks + 1) * self._select_block
        long = [row for row, sequence in enumerate(sequences) if len(sequence.tokens) > least]
        if not long:
            return None
        turn, self._num_watched = self._num_watched, self._num_watched + 1
        rows = {long[(turn * ROWS + number) % len(long)] for number in range(ROWS)}
        layers = {self._layers[(turn * LAYERS + number) % len(self._layers)] for number in range(LAYERS)}
        prompts = {row: sequences[row].prompt.id for row in sorted(rows)}
        return WatchedRows(prompts, frozenset(layers), self._select_block, self._keep)

    def take(self) -> list[tuple[str, LayerSample]]:
        """What was kept since the last time, oldest first, with the ids of prompts."""
        samples = list(self._samples)
        self._samples.clear()
        self._num_bytes = 0
        return samples

    def _keep(self, prompt_id: str, sample: LayerSample) -> None:
        self._samples.append((prompt_id, sample))
        self._num_bytes += sample.keys.nbytes
        while len(self._samples) > 1 and (len(self._samples) > MAX_SAMPLES or self._num_bytes > MAX_BYTES):
            self._num_bytes -= self._samples.popleft()[1].keys.nbytes


def sample_bytes(model_config: PretrainedConfig, *, longest: int, itemsize: int) -> int:
    """What samples of sequences of up to so many tokens take at most: their keys, beside which the rest is little."""
    _, num_kv_heads, head_dim = kv_shape(model_config)
    return min(MAX_BYTES, MAX_SAMPLES * longest * num_kv_heads * head_dim * itemsize)


@dataclass(frozen=True, slots=True)
class WatchedRows:
    """Dense attention of one verification that hands on what some rows leave to learn from: LayerAttention.

    prompts: ids by row.
    """

    prompts: dict[int, str]
    layers: frozenset[int]
    select_block: int
    keep: Callable[[str, LayerSample], None]

    def takes(self, layer: int) -> bool:
        """Other layers attend as they do anyway."""
        return layer in self.layers

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        positions: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        seqs: PagedSequences,
        *,
        scale: float,
    ) -> torch.Tensor:
        """Over everything. Waits for the device."""
        attended, maxima = attend_and_watch(
            query, key_cache, value_cache, seqs, scale=scale, select_block=self.select_block
        )
        with torch.inference_mode(False):  # autograd keeps no tensor that was made in it
            for row, sample in verified_samples(
                layer, query, positions, key_cache, seqs, maxima, rows=sorted(self.prompts)
            ):
                self.keep(self.prompts[row], sample)
        return attended

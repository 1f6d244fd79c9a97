"""Gates that learn on while a run goes, from what dense verification computes anyway.

A verification leaves each layer's queries, the cached keys and the largest score of every block; one text in HELDOUT is
kept from learning, to judge by. Gates propose which keys a draft reads and decide nothing: whatever they learn, what is
committed stays the same.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from drafter.gate import Gates
from drafter.gate_training import GateStats, GateTrainer, LayerSample, gate_loss
from kernels.attention import BlockMaxima, PagedSequences
from kernels.pooled_attention import block_weights

HELDOUT = 8
MAX_KEPT = 64  # samples to judge by, the newest of each layer


@dataclass(frozen=True, slots=True)
class GateJudgement:
    """The mean divergence of the trained and the served gates on what was held out, and what came of it."""

    loss: float
    served_loss: float
    outcome: Literal["published", "kept"]


class GateLearner:
    """Trains a copy of the gates that are served, and serves it where it became better.

    served: of any dtype; its parameters keep their storage, so that captured graphs stay valid. After a publication
    every descriptor it made is stale: publish where no sequence is being written, or describe the cache anew.
    """

    def __init__(self, served: Gates, *, lr: float) -> None:
        self._served = served
        self._trainer = GateTrainer(deepcopy(served).float().requires_grad_(True), lr=lr)
        self._heldout: dict[int, deque[LayerSample]] = {}

    def learn(self, texts: Iterable[tuple[int, LayerSample]]) -> GateStats:
        """One update by samples of these texts, each with the number of its text."""
        for text, sample in texts:
            if text % HELDOUT:
                self._trainer.learn(sample)
            else:
                self._heldout.setdefault(sample.layer, deque(maxlen=MAX_KEPT)).append(sample)
        return self._trainer.update()

    @torch.no_grad()
    def settle(self) -> GateJudgement | None:
        """Serve the trained gates where held-out texts say they are better; None where nothing was held out."""
        kept = [sample for samples in self._heldout.values() for sample in samples]
        self._heldout.clear()
        judged = [self._mean_loss(gates, kept) for gates in (self._trainer.gates, deepcopy(self._served).float())]
        if judged[0] is None or judged[1] is None:
            return None
        loss, served_loss = judged[0], judged[1]
        if not loss < served_loss:  # not a number is not better either
            return GateJudgement(loss, served_loss, "kept")
        trained = self._trainer.gates.state_dict()
        for name, tensor in self._served.state_dict().items():
            tensor.copy_(trained[name])
        return GateJudgement(loss, served_loss, "published")

    def _mean_loss(self, gates: Gates, samples: list[LayerSample]) -> float | None:
        parts = [gate_loss(gates, sample) for sample in samples]
        count = sum(int(num_tokens) for _, num_tokens in parts)
        return sum(float(loss) for loss, _ in parts) / count if count else None


def verified_samples(
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    seqs: PagedSequences,
    maxima: BlockMaxima,
) -> Iterator[tuple[int, LayerSample]]:
    """What a layer's dense verification leaves to learn from: by row, where its context has two complete blocks.

    Called outside of graphs and of inference mode: waits for the device, and copies what autograd is to keep.
    Shapes: query [T, Hq, D] after rotary embedding; positions [T] int64; key_cache [num_blocks, block_size, Hkv, D].
    """
    num_kv_heads, size = key_cache.shape[2], maxima.select_block
    weights = block_weights(maxima.scores, maxima.lse, num_kv_heads=num_kv_heads)
    bounds, contexts = seqs.cu_seqlens_q.tolist(), seqs.context_lens.tolist()
    for row, context in enumerate(contexts):
        new = slice(bounds[row], bounds[row + 1])
        complete = context // size * size  # blocks that draft tokens are part of are nobody's choice
        if complete < 2 * size or new.start == new.stop:
            continue
        blocks = seqs.block_tables[row, : -(-complete // seqs.block_size)].long()
        keys = key_cache[blocks].flatten(0, 1)[:complete]
        yield row, LayerSample(layer, query[new].clone(), positions[new].clone(), keys, weights[new].clone())

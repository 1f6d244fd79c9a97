"""Gates that learn on while a run goes, from what dense verification computes anyway.

A verification leaves each layer's queries, the cached keys and the largest score of every block; prompts that are held
out are kept from learning, to judge by. Gates propose which keys a draft reads and decide nothing: whatever they learn,
what is committed stays the same.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch

from drafter.buffer import is_heldout
from drafter.gate import Gates
from drafter.gate_quality import best_blocks
from drafter.gate_training import GateStats, GateTrainer, LayerSample, candidates, complete_blocks, gate_loss
from kernels.attention import BlockMaxima, PagedSequences
from kernels.pooled_attention import block_weights

BATCH = 32  # samples of an update
MIN_JUDGED = 64  # choices, of a token and key head, by fewer of which nothing is published


@dataclass(frozen=True, slots=True)
class GateStanding:
    """Gates on what was held out: of the blocks with the largest attention weights, as many as the budget has, the
    share that they pick, and the mean divergence in nats."""

    recall: float
    loss: float


@dataclass(frozen=True, slots=True)
class GateJudgement:
    """The trained gates against those served, and what came of it."""

    trained: GateStanding
    served: GateStanding
    outcome: Literal["published", "kept"]


class GateLearner:
    """Trains a copy of the gates that are served, and serves it where it became better.

    served: of any dtype; its parameters keep their storage, so that captured graphs stay valid. budget_blocks: how many
    they pick. After a publication every descriptor they made is stale: publish where no sequence is being written, and
    let nobody find what was cached before.
    """

    def __init__(self, served: Gates, *, lr: float, budget_blocks: int) -> None:
        self.served = served
        self._budget = budget_blocks
        self._trainer = GateTrainer(deepcopy(served).float().requires_grad_(True), lr=lr)
        self._heldout: list[LayerSample] = []

    def learn(self, samples: Sequence[tuple[str, LayerSample]]) -> list[GateStats]:
        """Updates by these samples in turn, each with the id of its prompt; those of held-out prompts teach nothing."""
        taught = [sample for prompt_id, sample in samples if not is_heldout(prompt_id)]
        self._heldout += [sample for prompt_id, sample in samples if is_heldout(prompt_id)]
        return [self._trainer.step(taught[begin : begin + BATCH]) for begin in range(0, len(taught), BATCH)]

    @torch.no_grad()
    def settle(self) -> GateJudgement | None:
        """Serve the trained gates where they find more of what was held out; None where too little was, until more is.

        The held-out samples that were judged by are dropped.
        """
        trained = self._standing(self._trainer.gates)
        served = self._standing(deepcopy(self.served).float())
        if trained is None or served is None:
            return None
        self._heldout.clear()
        if not (trained.recall > served.recall and isfinite(trained.loss)):
            return GateJudgement(trained, served, "kept")
        self._serve(self._trainer.gates.state_dict())
        return GateJudgement(trained, served, "published")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The trained copy and its optimiser, as GateTrainer.state_dict."""
        return self._trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor], served: Gates) -> None:
        """Learn on from a saved state, and serve what was served then."""
        self._trainer.load_state_dict(state)
        self._serve(served.state_dict())

    @torch.no_grad()
    def _serve(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.served.state_dict().items():
            tensor.copy_(state[name])

    def _standing(self, gates: Gates) -> GateStanding | None:
        """Of gates in float32 on what is held out; None where too few of its tokens had a choice."""
        losses = [gate_loss(gates, sample) for sample in self._heldout]
        found = [found_blocks(gates, sample, self._budget) for sample in self._heldout]
        choices = sum(count for _, count in found)
        if choices < MIN_JUDGED:
            return None
        return GateStanding(
            recall=sum(hits for hits, _ in found) / (choices * self._budget),
            loss=sum(float(loss) for loss, _ in losses) / sum(int(num_tokens) for _, num_tokens in losses),
        )


def found_blocks(gates: Gates, sample: LayerSample, budget_blocks: int) -> tuple[int, int]:
    """Over the tokens and key heads with more blocks than the budget: how many of the blocks with the largest weights
    the gates pick, of as many as the budget, and the number of these choices."""
    blocks, starts = complete_blocks(sample.keys, gates.config.select_block)
    allowed = candidates(sample.positions, len(blocks), gates.config.select_block)
    scores = gates.scores(
        sample.layer, sample.query, sample.positions, gates.compress(sample.layer, blocks, starts)[None]
    )
    count = torch.full_like(sample.positions, budget_blocks)
    truth = best_blocks(sample.weights[:, :, : len(blocks)], allowed, count)
    chooses = allowed.sum(dim=2) > budget_blocks
    hits = (best_blocks(scores, allowed, count) & truth & chooses[:, :, None]).sum()
    return int(hits), int(chooses.sum()) * scores.shape[1]


def verified_samples(
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    seqs: PagedSequences,
    maxima: BlockMaxima,
    *,
    rows: Iterable[int],
) -> Iterator[tuple[int, LayerSample]]:
    """What a layer's dense verification leaves to learn from: of these rows, where their context has two complete
    blocks.

    Called outside of graphs and of inference mode: waits for the device, and copies what autograd is to keep.
    Shapes: query [T, Hq, D] after rotary embedding; positions [T] int64; key_cache [num_blocks, block_size, Hkv, D].
    """
    num_kv_heads, size = key_cache.shape[2], maxima.select_block
    bounds, contexts = seqs.cu_seqlens_q.tolist(), seqs.context_lens.tolist()
    for row in rows:
        new = slice(bounds[row], bounds[row + 1])
        complete = contexts[row] // size * size  # blocks that draft tokens are part of are nobody's choice
        if complete < 2 * size or new.start == new.stop:
            continue
        blocks = seqs.block_tables[row, : -(-complete // seqs.block_size)].long()
        keys = key_cache[blocks].flatten(0, 1)[:complete]
        weights = block_weights(maxima.scores[new], maxima.lse[new], num_kv_heads=num_kv_heads)
        yield row, LayerSample(layer, query[new].clone(), positions[new].clone(), keys, weights)

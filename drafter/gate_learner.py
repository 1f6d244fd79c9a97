"""Gates that learn on while a run goes, from what dense verification computes anyway.

A verification leaves each layer's queries, the cached keys and the largest score of every block; prompts that are held
out are kept from learning, to judge by. Gates propose which keys a draft reads and decide nothing: whatever they learn,
what is committed stays the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite, nan
from typing import Literal

import torch

from drafter.buffer import is_heldout
from drafter.gate import Gates
from drafter.gate_quality import best_blocks
from drafter.gate_training import GateStats, GateTrainer, LayerSample, candidates, complete_blocks, gate_loss
from drafter.publish import checksum
from drafter.report import Replica, Standing
from kernels.attention import BlockMaxima, PagedSequences
from kernels.pooled_attention import block_weights

BATCH = 32  # samples of an update
MIN_JUDGED = 64  # choices of all workers, of a token and key head each, by fewer of which nothing is published


@dataclass(frozen=True, slots=True)
class GateStanding:
    """Gates on what was held out: of the blocks with the largest attention weights, as many as the budget has, the
    share that they pick, and the mean divergence in nats."""

    recall: float
    loss: float


@dataclass(frozen=True, slots=True)
class GateJudgement:
    """The trained gates against those served, on the same so many choices."""

    trained: GateStanding
    served: GateStanding
    num_choices: int

    @property
    def outcome(self) -> Literal["published", "kept", "open"]:
        """What should be done; "open": they are too few to say."""
        if self.num_choices < MIN_JUDGED:
            return "open"
        better = self.trained.recall > self.served.recall and isfinite(self.trained.loss)
        return "published" if better else "kept"


def pooled(judgements: Sequence[GateJudgement]) -> GateJudgement:
    """Several workers' judgements as one, each by its share of the choices."""
    total = sum(judgement.num_choices for judgement in judgements)

    def mean(standings: Sequence[GateStanding]) -> GateStanding:
        weighed = [
            (standing, judgement.num_choices / total) for standing, judgement in zip(standings, judgements, strict=True)
        ]
        return GateStanding(
            recall=sum(standing.recall * weight for standing, weight in weighed),
            loss=sum(standing.loss * weight for standing, weight in weighed),
        )

    return GateJudgement(
        trained=mean([judgement.trained for judgement in judgements]),
        served=mean([judgement.served for judgement in judgements]),
        num_choices=total,
    )


class GateLearner:
    """Trains a copy of the gates that are served, and serves it where it became better: one worker's.

    With several workers each trains its own copy: deltas are averaged and applied, judgements pooled, and all conclude
    the same. A single worker's settle does both in one.
    served: of any dtype; its parameters keep their storage, so that captured graphs stay valid. budget_blocks: how many
    they pick. announce: called after each change of what is served, when every descriptor that was made is stale:
    publish where no sequence is being written, and let nobody find what was cached before. version counts the changes.
    """

    def __init__(
        self, served: Gates, *, lr: float, budget_blocks: int, announce: Callable[[], None] = lambda: None
    ) -> None:
        self.served = served
        self.version = 0
        self.checksum = checksum(served.state_dict())
        self.off = ""  # why it learns no more, "" while it does
        self._budget = budget_blocks
        self._announce = announce
        self._trainer = GateTrainer(deepcopy(served).float().requires_grad_(True), lr=lr)
        self._has_learned = False  # since the workers agreed last
        self._heldout: list[LayerSample] = []

    def learn(self, samples: Sequence[tuple[str, LayerSample]]) -> list[GateStats]:
        """Updates by these samples in turn, each with the id of its prompt; those of held-out prompts teach nothing."""
        if self.off:
            return []
        taught = [sample for prompt_id, sample in samples if not is_heldout(prompt_id)]
        self._heldout += [sample for prompt_id, sample in samples if is_heldout(prompt_id)]
        stats = [self._trainer.step(taught[begin : begin + BATCH]) for begin in range(0, len(taught), BATCH)]
        self._has_learned |= any(each.applied for each in stats)
        return stats

    def settle(self) -> GateJudgement | None:
        """Serve the trained gates where they find more of what was held out; None while too little was."""
        judgement = self.judge()
        self.conclude(judgement)
        return None if judgement is None or judgement.outcome == "open" else judgement

    @torch.no_grad()
    def judge(self) -> GateJudgement | None:
        """The trained gates against those served, by what is held out here; None where none of it had a choice."""
        if self.off:
            return None
        trained, num_choices = self._standing(self._trainer.gates)
        served, _ = self._standing(deepcopy(self.served).float())
        return GateJudgement(trained, served, num_choices) if num_choices else None

    def conclude(self, judgement: GateJudgement | None) -> Standing:
        """Do as judged, this worker's judgement or several workers' pooled; what is served then.

        The held-out samples that it was judged by are dropped.
        """
        self._has_learned = False
        if judgement is not None and judgement.outcome != "open":
            self._heldout.clear()
            if judgement.outcome == "published":
                self._serve(self._trainer.gates.state_dict(), self.version + 1)
        return self.version, self.checksum

    @torch.no_grad()
    def delta(self) -> dict[str, torch.Tensor]:
        """How the trained copy differs from what is served, by parameter, on the host; {} where it has learned nothing
        since the workers agreed last."""
        if not self._has_learned:
            return {}
        served = self.served.state_dict()
        trained = self._trainer.gates.state_dict()
        return {name: (tensor - served[name].float()).cpu() for name, tensor in trained.items()}

    @torch.no_grad()
    def apply(self, deltas: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Go on from what all serve plus the mean of these: the same on every worker, bit for bit.

        A lost worker's delta is simply not among them.
        """
        served = self.served.state_dict()
        for name, tensor in self._trainer.gates.state_dict().items():
            mean = torch.stack([delta[name] for delta in deltas]).mean(dim=0)
            tensor.copy_(served[name].float() + mean.to(tensor.device))

    def replica(self) -> Replica:
        """What is served here, and the trained copy."""
        served, trained = self.served.state_dict(), self._trainer.gates.state_dict()
        on_host = [{name: tensor.detach().cpu() for name, tensor in each.items()} for each in (served, trained)]
        return Replica(self.version, on_host[0], {}, on_host[1])

    def become(self, replica: Replica) -> Standing:
        """Serve, and learn on from, what another worker does."""
        self._trainer.gates.load_state_dict(replica.weights)
        self._serve(replica.served, replica.version)
        return self.version, self.checksum

    def give_up(self, reason: str) -> Standing:
        """Learn no more; what is served stays."""
        self.off = reason
        self._heldout.clear()
        return self.version, self.checksum

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The trained copy and its optimiser, as GateTrainer.state_dict, and the version served."""
        return self._trainer.state_dict() | {"version": torch.tensor(self.version)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], served: Gates) -> None:
        """Learn on from a saved state, and serve what was served then."""
        self._trainer.load_state_dict(state)
        self._serve(served.state_dict(), int(state["version"]))

    @torch.no_grad()
    def _serve(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        for name, tensor in self.served.state_dict().items():
            tensor.copy_(state[name])
        self.version, self.checksum = version, checksum(self.served.state_dict())
        self._announce()

    def _standing(self, gates: Gates) -> tuple[GateStanding, int]:
        """Of gates in float32 on what is held out, and how many choices that has; NaN of none."""
        losses = [gate_loss(gates, sample) for sample in self._heldout]
        found = [found_blocks(gates, sample, self._budget) for sample in self._heldout]
        choices = sum(count for _, count in found)
        if not choices:
            return GateStanding(nan, nan), 0
        recall = sum(hits for hits, _ in found) / (choices * self._budget)
        loss = sum(float(loss) for loss, _ in losses) / sum(int(count) for _, count in losses)
        return GateStanding(recall, loss), choices


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

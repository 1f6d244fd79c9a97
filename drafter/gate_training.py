"""Self-distillation of gates: a layer's gate learns which blocks the layer's own attention gives the largest weights.

The target of a token and key head is the largest attention weight in each complete block before the token's own, over
the heads of the group, scaled to sum to 1; the loss its Kullback-Leibler divergence from the softmax of the scores. The
token's own block is always read, and no part of either. Only gates are learned: the policy is never touched.
Source: SeerAttention-R (arXiv 2506.08889) sec. 3.2; microsoft/SeerAttention qwen3/modeling_qwen3_seerattn_training.py
(pooling over the group, the mask below the token's block) and run_distillation_decode.sh (the later half of a sequence,
lr 1e-3 after 20 steps of warm-up, by a cosine to 1e-5, no weight decay).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import cos, isfinite, pi
from time import perf_counter

import torch
from torch import nn

from drafter.gate import Gates

MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 20
LAST_LR = 0.01  # of lr, where the number of steps is known
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


@dataclass(frozen=True, slots=True)
class LayerSample:
    """What one layer's attention computed for some tokens of one sequence: T tokens, S keys from the first on.

    query [T, Hq, D] and keys [S, Hkv, D] after the policy's rotary embedding, as attention compares them; positions [T]
    int64. weights [T, Hkv, NB]: kernels.pooled_attention.block_weights, of S // select_block blocks at least.
    """

    layer: int
    query: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class GateStats:
    """One update.

    loss: the mean divergence, in nats, over layers, key heads and tokens that had a choice. seconds: since the update
    before. applied: False where none had, or loss or gradient was not finite.
    """

    loss: float
    seconds: float
    applied: bool


def candidates(positions: torch.Tensor, num_blocks: int, select_block: int) -> torch.Tensor:
    """Which blocks each token may choose from: the complete ones before its own. positions [T]; [T, 1, NB] bool."""
    return torch.arange(num_blocks, device=positions.device) < (positions // select_block)[:, None, None]


def complete_blocks(keys: torch.Tensor, select_block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The complete blocks of keys [S, Hkv, D] that begin at position 0, [NB, P, Hkv, D], and their positions [NB]."""
    num_blocks = len(keys) // select_block
    starts = torch.arange(num_blocks, device=keys.device) * select_block
    return keys[: num_blocks * select_block].unflatten(0, (num_blocks, select_block)), starts


def gate_loss(gates: Gates, sample: LayerSample) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of divergences over a sample's tokens and key heads, and how many of them had a choice of two blocks."""
    select_block = gates.config.select_block
    blocks, starts = complete_blocks(sample.keys, select_block)
    allowed = candidates(sample.positions, len(blocks), select_block)
    compressed = gates.compress(sample.layer, blocks, starts)
    scores = gates.scores(sample.layer, sample.query, sample.positions, compressed[None])
    target = sample.weights[:, :, : len(blocks)].float() * allowed
    target = target / target.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # finite, for a token without candidates; of one with any, exp of it is 0
    predicted = scores.masked_fill(~allowed, torch.finfo(torch.float32).min / 2).log_softmax(dim=2)
    chooses = allowed.sum(dim=2) > 1
    divergence = (torch.xlogy(target, target) - target * predicted.where(allowed, 0.0)).sum(dim=2)
    return (divergence * chooses).sum(), chooses.sum() * scores.shape[1]


class GateTrainer:
    """AdamW on gates in float32; bfloat16 products on a GPU.

    An update takes any number of samples, of any layers and sequences, one after the other: learn, learn, ..., update.
    What a sample needs is freed with it, so all layers of a long sequence never stand in memory at once.
    """

    def __init__(self, gates: Gates, *, lr: float, num_steps: int | None = None) -> None:
        """num_steps: updates in all, where that is known; otherwise the learning rate stays after its warm-up."""
        assert all(parameter.dtype == torch.float32 for parameter in gates.parameters())
        self.gates = gates
        self.steps = 0  # updates applied
        self._lr = lr
        self._num_steps = num_steps
        self._adam = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.0)
        self._loss = self._count = torch.zeros(())
        self._begun = perf_counter()

    def learn(self, sample: LayerSample) -> None:
        """Add a sample's gradients. Nothing waits for the device."""
        device = sample.query.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss, count = gate_loss(self.gates, sample)
        loss.backward()
        self._loss = self._loss.to(device) + loss.detach()
        self._count = self._count.to(device) + count

    def update(self) -> GateStats:
        """One step along the mean gradient of what was learned since the last; one that is not finite is left out."""
        count = self._count.clamp(min=1)
        for parameter in self.gates.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        norm = nn.utils.clip_grad_norm_(self.gates.parameters(), MAX_GRAD_NORM)
        loss, grad_norm, num_choices = torch.stack([self._loss / count, norm, self._count]).tolist()
        applied = num_choices > 0 and isfinite(loss) and isfinite(grad_norm)
        if applied:
            self.steps += 1
            for group in self._adam.param_groups:
                group["lr"] = self.learning_rate
            self._adam.step()
        self._adam.zero_grad()
        begun, self._begun = self._begun, perf_counter()
        self._loss = self._count = torch.zeros(())
        return GateStats(loss, self._begun - begun, applied)

    def step(self, samples: Iterable[LayerSample]) -> GateStats:
        """One update by these samples."""
        for sample in samples:
            self.learn(sample)
        return self.update()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs to train the same: copies of nothing, under flat names."""
        state = {f"gates.{name}": tensor for name, tensor in self.gates.state_dict().items()}
        for name, parameter in self.gates.named_parameters() if self.steps else ():
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = self._adam.state[parameter][moment]
        return state | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up a saved state, copying it."""
        for name, tensor in self.gates.state_dict().items():
            tensor.copy_(state[f"gates.{name}"])
        self.steps = int(state["steps"])
        self._adam.state.clear()
        for name, parameter in self.gates.named_parameters() if self.steps else ():
            moments = {moment: torch.empty_like(parameter).copy_(state[f"{moment}.{name}"]) for moment in MOMENTS}
            self._adam.state[parameter] = {"step": torch.tensor(float(self.steps)), **moments}

    @property
    def learning_rate(self) -> float:
        """Of the last update that was applied."""
        if self.steps <= WARMUP_STEPS:
            return self._lr * self.steps / WARMUP_STEPS
        if self._num_steps is None:
            return self._lr
        done = min(1.0, (self.steps - WARMUP_STEPS) / max(1, self._num_steps - WARMUP_STEPS))
        return self._lr * (LAST_LR + (1 - LAST_LR) * (1 + cos(pi * done)) / 2)

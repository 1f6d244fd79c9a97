"""Training the drafter: one packed batch of features a step, and a step can always be the last."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import TypedDict

import torch
from torch import nn

from configs.errors import ConfigError
from configs.faults import hit
from configs.schema import DrafterConfig
from drafter.eagle import EagleHead
from drafter.features import FeatureBatch, on_device
from drafter.graphed import GraphedStep
from drafter.losses import Loss, Targets, row_chunks, targets_of, token_losses
from drafter.unroll import Chains, Step, unroll

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 20  # Adam's first steps are as long as its later ones, in directions of one batch
DEPTH_DECAY = 0.8  # a deeper draft counts only where those before it were accepted


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """One step, or one evaluation.

    acceptance: by depth, the mean chance of a draft whose predecessors were right. accept_length: tokens committed a
    cycle by chains as deep, the target's own among them. applied: False for an update that was not finite and an
    evaluation. grad_norm: before clipping. num_tokens: positions of the batch. seconds: without the capture of a graph.
    """

    loss: float
    acceptance: tuple[float, ...]
    accept_length: float
    grad_norm: float
    num_tokens: int
    seconds: float
    applied: bool


class DrafterTrainer:
    """AdamW on the head's float32 weights; on a GPU bfloat16 forwards, and CUDA graphs for what a FeatureBuffer gives.

    embedding [V, H] and lm_head [V, H] are the policy's own, as they are at each step: read, never written.
    """

    def __init__(
        self, head: EagleHead, *, embedding: torch.Tensor, lm_head: torch.Tensor, config: DrafterConfig
    ) -> None:
        """Raises ConfigError for chains that the head's window does not hold."""
        assert all(parameter.dtype == torch.float32 for parameter in head.parameters())
        require_unroll(config, window=head.config.window)
        self.head = head
        self.embedding = embedding
        self.lm_head = lm_head
        self.config = config
        self.steps = 0  # updates applied
        device = head.fc.weight.device
        self._rate = torch.tensor(config.lr, device=device)  # a tensor, for a graph reads it anew each time
        self.adam = torch.optim.AdamW(head.parameters(), lr=self._rate, betas=BETAS, weight_decay=0.0, fused=True)
        for parameter in head.parameters():  # here and not at the first update, so that their storage never changes
            self.adam.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._graphs = self._graphed() if device.type == "cuda" else None

    def step(self, batch: FeatureBatch) -> DrafterStats:
        """One update; a loss or gradient that is not finite leaves weights and optimiser as they were."""
        graphs = self._graphs if self._graphs is not None and self._graphs.takes(batch) else None
        begun = perf_counter()
        figures = graphs.measure(batch) if graphs else self._gradients(batch, **_shape(batch))
        if hit("drafter.step") == "nan":
            figures = figures * torch.nan
        loss, grad_norm, accept_length, *acceptance = figures.tolist()
        applied = isfinite(loss) and isfinite(grad_norm)
        if applied:
            self.steps += 1
            self._rate.fill_(self.config.lr * min(1.0, self.steps / WARMUP_STEPS))
            if graphs:
                graphs.update()
            else:
                self._update(figures)
        return DrafterStats(
            loss=loss,
            acceptance=tuple(acceptance),
            accept_length=accept_length,
            grad_norm=grad_norm,
            num_tokens=len(batch.next_ids),
            seconds=perf_counter() - begun,
            applied=applied,
        )

    def train(self, next_batch: Callable[[], FeatureBatch | None], *, until: Callable[[], bool]) -> list[DrafterStats]:
        """Step after step until told to stop, or there is nothing to learn from; asked before every step."""
        stats = []
        while not until() and (batch := next_batch()) is not None:
            stats.append(self.step(batch))
        return stats

    def evaluate(self, batch: FeatureBatch) -> DrafterStats:
        """What the present weights make of a batch, without learning from it."""
        return evaluate(self.head, batch, embedding=self.embedding, lm_head=self.lm_head, config=self.config)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs to train the same: copies of nothing, under flat names."""
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for name, parameter in self.head.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if self.steps:
                    state[f"{moment}.{name}"] = self.adam.state[parameter][moment]
        return state | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up a saved state, copying it. Weights keep their storage."""
        self.head.load_state_dict(
            {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
        )
        self.steps = int(state["steps"])
        for name, parameter in self.head.named_parameters():
            own = self.adam.state[parameter]
            own["step"].fill_(self.steps)
            for moment in ("exp_avg", "exp_avg_sq"):
                if self.steps:
                    own[moment].copy_(state[f"{moment}.{name}"])
                else:
                    own[moment].zero_()

    def _graphed(self) -> GraphedStep:
        """The step of what a FeatureBuffer gives."""
        longest = self.config.feature_window
        return GraphedStep(
            measure=lambda batch: self._gradients(batch, longest=longest, rejected=True),
            update=self._update,
            places=self._places,
            num_tokens=self.config.batch_tokens,
            longest=longest,
            device=self._rate.device,
        )

    def _gradients(self, batch: FeatureBatch, *, longest: int, rejected: bool) -> torch.Tensor:
        """The batch's gradients, in the head; its loss, their norm, accept length and acceptance by depth."""
        # to zero and not to None, for a graph adds to them where they are
        self.adam.zero_grad(set_to_none=False)
        record, _ = _measure(
            self.head, batch, self.embedding, self.lm_head, self.config, longest=longest, rejected=rejected
        )
        gradients = [parameter.grad for parameter in self.head.parameters() if parameter.grad is not None]
        return torch.cat([record[:1], nn.utils.get_total_norm(gradients)[None], record[1:]])

    def _update(self, figures: torch.Tensor, capturable: bool = False) -> None:
        """One of Adam's, by the gradients in the head, clipped. capturable: as Adam wants it said, or not said."""
        nn.utils.clip_grads_with_norm_(self.head.parameters(), MAX_GRAD_NORM, figures[1])
        for group in self.adam.param_groups:
            group["capturable"] = capturable
        self.adam.step()

    def _places(self) -> tuple[int, ...]:
        """Where that lies which a step reads or writes and others may have moved."""
        parameters = list(self.head.parameters())
        gradients = [parameter.grad for parameter in parameters]
        tensors = [self.embedding, self.lm_head, *self.head.buffers(), *parameters, *gradients]
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def require_unroll(config: DrafterConfig, *, window: int) -> None:
    """Raise ConfigError for chains that a head's window does not hold."""
    if config.unroll >= window:
        raise ConfigError(f"drafter.unroll={config.unroll} does not fit drafter.window={window}; raise the window")


@torch.no_grad()
def evaluate(
    head: EagleHead, batch: FeatureBatch, *, embedding: torch.Tensor, lm_head: torch.Tensor, config: DrafterConfig
) -> DrafterStats:
    """What a head makes of a batch; of equal batches, the same figures on every call."""
    begun = perf_counter()
    record, _ = _measure(head, batch, embedding, lm_head, config, **_shape(batch))
    loss, accept_length, *acceptance = record.tolist()
    return DrafterStats(
        loss=loss,
        acceptance=tuple(acceptance),
        accept_length=accept_length,
        grad_norm=0.0,
        num_tokens=len(batch.next_ids),
        seconds=perf_counter() - begun,
        applied=False,
    )


@torch.no_grad()
def reached_by_window(
    head: EagleHead, batch: FeatureBatch, *, embedding: torch.Tensor, lm_head: torch.Tensor, config: DrafterConfig
) -> torch.Tensor:
    """What the chains that begin in each window add to an accept length of 1: [W] float64 on the host.

    With that 1 they add up to the accept length of `evaluate`.
    """
    _, reached = _measure(head, batch, embedding, lm_head, config, **_shape(batch))
    before = torch.nn.functional.pad(reached.double().cumsum(0), (1, 0)).cpu()
    return before[batch.cu_seqlens.cpu().long()].diff()


def choose_vocabulary(counts: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most frequent tokens, of equals those with smaller ids, as (d2t, t2d) of an EagleHead.

    counts [V]: how often each token was seen. Returns d2t [min(size, V)] int64, target id minus draft id in ascending
    order of both; t2d [V] bool.
    """
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    known = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    known[chosen] = True
    return chosen - torch.arange(len(chosen), device=counts.device), known


class _Shape(TypedDict):
    """longest: positions of the longest window. rejected: whether tokens that were rejected are looked at."""

    longest: int
    rejected: bool


def _shape(batch: FeatureBatch) -> _Shape:
    """What a step of this batch launches, for which the host waits."""
    return {"longest": int(batch.cu_seqlens.diff().max()), "rejected": bool((batch.alt_ids >= 0).any())}


def _measure(
    head: EagleHead,
    batch: FeatureBatch,
    embedding: torch.Tensor,
    lm_head: torch.Tensor,
    config: DrafterConfig,
    *,
    longest: int,
    rejected: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, accept length and acceptance by depth, [2 + unroll]; what the chain from each position adds to an accept
    length of 1, [T]. Where gradients are enabled, they add up in the head.

    The loss is a mean over the known positions of each step, weighted by depth. longest may be more than the longest
    window has, and rejected true where nothing was rejected. May be captured in a CUDA graph: nothing waits.
    """
    device = head.fc.weight.device
    batch = on_device(batch, device)
    chains, depth = Chains(batch), config.unroll
    decays = [DEPTH_DECAY**level for level in range(depth)]
    share = 1 / (sum(decays) + (batch.alt_ids >= 0).any())  # of a weight of 1; what was rejected has one, where it is
    targets = _targets(head, batch.hidden, batch.next_ids, lm_head, batch.temperature)
    unrolled = unroll(head, chains, embedding, depth=depth, longest=longest, rejected=rejected)
    total = torch.zeros((), device=device)
    survival = torch.ones(len(batch.next_ids), device=device)  # chance that all drafts of a chain so far are accepted
    reached = torch.zeros_like(survival)
    acceptance, outputs, gradients = [], [], []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for step, decay in zip(unrolled, [*decays, 1.0] if rejected else decays, strict=True):
            if step.depth < 0:
                targets = _targets(
                    head, batch.alt_hidden, torch.full_like(batch.alt_ids, -1), lm_head, batch.temperature
                )
            count = step.known.sum().clamp(min=1)
            weights = step.known * (decay * share / count)
            loss, accepted, gradient = _score(head, step, targets, weights, config.loss, batch.temperature)
            total += loss
            outputs.append(step.outputs)
            gradients.append(gradient)
            if step.depth >= 0:
                survival = survival * accepted * step.known
                acceptance.append((accepted * step.known).sum() / count)
                reached += survival / count
    if torch.is_grad_enabled():
        torch.autograd.backward(outputs, gradients)
    return torch.stack([total, 1 + reached.sum(), *acceptance]), reached


def _targets(
    head: EagleHead, hidden: torch.Tensor, next_ids: torch.Tensor, lm_head: torch.Tensor, temperature: float
) -> Targets:
    return targets_of(hidden, next_ids, lm_head, head.target_ids(), temperature=temperature)


def _score(
    head: EagleHead, step: Step, targets: Targets, weights: torch.Tensor, loss: Loss, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A step's weighted loss, each token's acceptance [T], and the loss's gradient by the step's outputs [T, H].

    A chunk of rows at a time goes to logits and back, so that no step's logits are kept for the backward pass; the
    gradients of the output weights add up on the way.
    """
    leaf = step.outputs.detach().requires_grad_(torch.is_grad_enabled())
    accepted = torch.empty(len(leaf), device=leaf.device)
    total = torch.zeros((), device=leaf.device)
    for rows in row_chunks(len(leaf), head.config.draft_vocab, leaf.device):
        values, accepted[rows] = token_losses(
            loss, head.logits(leaf[rows]), targets.at(step.index[rows]), temperature=temperature
        )
        part = (values * weights[rows]).sum()
        if part.requires_grad:
            part.backward()
        total += part.detach()
    return total, accepted, leaf.grad

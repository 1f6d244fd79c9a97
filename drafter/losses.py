"""What training minimises and what it is judged by, over the reduced vocabulary.

p is the target's distribution cut to the V' tokens the draft can propose: what it puts on others is missing from its
sum, for a draft can never have such a token accepted. q is the draft's distribution, over the same V' tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.logprob import selected_logprobs

Loss = Literal["lk", "kl", "ce", "tv"]

LK_DECAY = 3.0  # how fast acceptance takes over from KL: arXiv 2602.23881 uses this value
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}  # of logits that are float32 at a time: 8 MB and 128 MB


@dataclass(frozen=True, slots=True)
class Targets:
    """What T positions should predict. probs [T, V'] float32: p. best [T] int64: the draft id of the target's likeliest
    token, -1 where the draft cannot propose it or the run is not greedy and nothing asks. sampled [T] int64: the draft
    id of the token that followed, -1 where the draft cannot propose it or it is unknown."""

    probs: torch.Tensor
    best: torch.Tensor
    sampled: torch.Tensor

    def at(self, index: torch.Tensor) -> "Targets":
        """Those at some positions."""
        return Targets(self.probs[index], self.best[index], self.sampled[index])


@torch.no_grad()
def targets_of(
    hidden: torch.Tensor,
    next_ids: torch.Tensor,
    lm_head: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float,
) -> Targets:
    """The policy's own distributions, from its final hidden states.

    Shapes: hidden [T, H]; next_ids [T] int64, negative where unknown; lm_head [V, H], the policy's; target_ids [V']
    int64: the target id of each draft id. The target's likeliest token is the first of equals.
    """
    num_rows, num_drafted = len(hidden), len(target_ids)
    draft_ids = torch.full((lm_head.shape[0],), -1, device=hidden.device)
    draft_ids[target_ids] = torch.arange(num_drafted, device=hidden.device)
    probs = torch.empty(num_rows, num_drafted, device=hidden.device)
    best = torch.full((num_rows,), -1, device=hidden.device)
    sharp = sharpness(temperature)
    for rows in row_chunks(num_rows, lm_head.shape[0], hidden.device):
        logits = hidden[rows].to(lm_head.dtype) @ lm_head.T
        if not temperature:
            best[rows] = draft_ids[logits.argmax(dim=1)]
        drafted = logits[:, target_ids]
        # the first token's probability is found in one read of all logits, and tells what every logit is divided by
        first, _ = selected_logprobs(logits, target_ids[:1].expand(len(logits)), temperature=sharp)
        log_total = drafted[:, 0].float() / sharp - first
        torch.exp(torch.add(-log_total[:, None], drafted, alpha=1 / sharp), out=probs[rows])
    sampled = torch.where(next_ids < 0, -1, draft_ids[next_ids.clamp(min=0)])
    return Targets(probs, best, sampled)


def sharpness(temperature: float) -> float:
    """What logits are divided by; greedy drafts still learn the whole distribution, which says more than its mode."""
    return temperature or 1.0


def token_losses(
    loss: Loss, logits: torch.Tensor, targets: Targets, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's loss, and the chance that its draft is accepted, of draft logits [T, V'].

    Accepted: by rejection sampling, sum min(p, q) (Leviathan et al., arXiv 2211.17192); where the run is greedy, 1 if
    the likeliest tokens are the same. Returns [T] float32 each, the first with gradients.
    """
    sharp = sharpness(temperature)
    logq = torch.log_softmax(logits if sharp == 1 else logits.float() / sharp, dim=1, dtype=torch.float32)
    overlap = overlap_of(logq, targets.probs)
    values = _LOSSES[loss](logq, overlap, targets)
    accepted = overlap.detach() if temperature else (logits.argmax(dim=1) == targets.best).float()
    return values, accepted


def overlap_of(logq: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """sum min(p, q), [T]."""
    return torch.minimum(logq.exp(), probs).sum(dim=1)


def _kl(logq: torch.Tensor, overlap: torch.Tensor, targets: Targets) -> torch.Tensor:
    """m KL(p / m || q) with m = sum p: over the tokens the draft can propose, by how often they are the ones wanted."""
    probs = targets.probs
    mass = probs.sum(dim=1)
    return torch.special.xlogy(probs, probs).sum(dim=1) - torch.special.xlogy(mass, mass) - (probs * logq).sum(dim=1)


def _tv(logq: torch.Tensor, overlap: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The total variation 1 - sum min(p, q): the chance of a rejection."""
    return 1 - overlap


def _lk(logq: torch.Tensor, overlap: torch.Tensor, targets: Targets) -> torch.Tensor:
    """-log sum min(p, q), blended with KL by w = exp(-LK_DECAY sum min(p, q)), a constant.

    Where nothing overlaps yet, the gradient of the acceptance is next to nothing and KL leads; where drafts are mostly
    accepted, their acceptance itself is what counts. Source: LK losses (arXiv 2602.23881), both of their forms at once.
    """
    weight = torch.exp(-LK_DECAY * overlap.detach())
    tiny = torch.finfo(overlap.dtype).tiny
    return weight * _kl(logq, overlap, targets) - (1 - weight) * overlap.clamp(min=tiny).log()


def _ce(logq: torch.Tensor, overlap: torch.Tensor, targets: Targets) -> torch.Tensor:
    """-log q of the token that was sampled; 0 where the draft cannot propose it."""
    chosen = logq.gather(1, targets.sampled.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(targets.sampled >= 0, -chosen, 0)


_LOSSES: dict[Loss, Callable[[torch.Tensor, torch.Tensor, Targets], torch.Tensor]] = {
    "lk": _lk,
    "kl": _kl,
    "ce": _ce,
    "tv": _tv,
}


def row_chunks(num_rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of rows of this width that stay within the device's budget of float32 temporaries."""
    rows = max(1, CHUNK_ELEMENTS[device.type] // width)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]

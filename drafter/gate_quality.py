"""How well blocks are selected: the truth's best blocks found, and the attention mass on what is read.

Whatever selects has the same number of keys: the blocks it may choose, and the token's own block, which is always read.
"""

from dataclasses import dataclass, fields

import torch

from drafter.gate import Gates
from drafter.gate_training import candidates, complete_blocks

FINE_BLOCK = 16  # of the bound as Quest and ReSA use it


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over the tokens, heads and layers that had more blocks than the budget.

    recall: of as many blocks with the largest attention weights, the share selected. mass: attention on what was read,
    over the heads of a group. best reads those blocks, which need not have the largest mass; gate the gates' choice;
    bound the best by Quest's bound of the group's mean query over the same blocks, fine_bound over blocks of 16 keys,
    as many keys; recent the newest.
    """

    gate_recall: float
    bound_recall: float
    gate_mass: float
    bound_mass: float
    fine_bound_mass: float
    recent_mass: float
    best_mass: float

    @classmethod
    def mean(cls, parts: "list[Quality]") -> "Quality":
        """Of several layers or texts, each counting once."""
        return cls(*(sum(getattr(part, field.name) for part in parts) / len(parts) for field in fields(cls)))


def bound_scores(query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Quest's bound, sum over d of max(q_d min_d, q_d max_d), for a group's mean query, of blocks of one sequence.

    Shapes: query [T, Hq, D]; blocks [NB, P, Hkv, D]. Returns [T, Hkv, NB]. Source: Quest (arXiv 2406.10774) eq. 2, the
    mean over the group from ReSA (2506.04108).
    """
    mean = query.float().unflatten(1, (blocks.shape[2], -1)).mean(dim=2)
    low, high = blocks.float().amin(dim=1), blocks.float().amax(dim=1)
    # max(q min, q max) is q max where q is positive, and q min elsewhere
    return torch.einsum("thd,nhd->thn", mean.clamp(min=0), high) + torch.einsum("thd,nhd->thn", mean.clamp(max=0), low)


@torch.no_grad()
def selection_quality(
    gates: Gates,
    layer: int,
    query: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    budget_blocks: int,
) -> Quality | None:
    """Select for some tokens of one sequence, and see what dense attention makes of it; None where none had a choice.

    Shapes: query [T, Hq, D] and keys [S, Hkv, D], after rotary embedding; positions [T] int64.
    """
    select_block = gates.config.select_block
    chooses = positions // select_block > budget_blocks
    if not chooses.any():
        return None
    query, positions = query[chooses], positions[chooses]
    num_kv_heads = keys.shape[1]
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    index = torch.arange(len(keys), device=keys.device)
    unseen = index > positions[:, None, None, None]
    probs = (torch.einsum("thgd,shd->thgs", grouped, keys.float()) * scale).masked_fill(unseen, -torch.inf).softmax(3)
    blocks, starts = complete_blocks(keys, select_block)
    allowed = candidates(positions, len(blocks), select_block)
    weights = probs[..., : len(blocks) * select_block].unflatten(3, (-1, select_block)).amax(dim=(2, 4))
    gate = gates.scores(layer, query, positions, gates.compress(layer, blocks, starts)[None])
    picks = {
        name: best_blocks(scores, allowed, torch.full_like(positions, budget_blocks))
        for name, scores in {
            "gate": gate,
            "bound": bound_scores(query, blocks),
            "recent": torch.arange(len(blocks), device=keys.device).expand_as(gate).float(),
            "best": weights,
        }.items()
    }
    recall = {name: float((pick & picks["best"]).sum() / picks["best"].sum()) for name, pick in picks.items()}
    own = index // select_block == (positions // select_block)[:, None, None]
    mass = {name: _mass(probs, pick, select_block, own) for name, pick in picks.items()}
    fine_blocks, _ = complete_blocks(keys, FINE_BLOCK)
    # what of the token's own large block lies in complete small ones may be chosen too, and is room to choose
    spare = budget_blocks * (select_block // FINE_BLOCK) + positions % select_block // FINE_BLOCK
    fine = best_blocks(bound_scores(query, fine_blocks), candidates(positions, len(fine_blocks), FINE_BLOCK), spare)
    fine_own = index // FINE_BLOCK == (positions // FINE_BLOCK)[:, None, None]
    return Quality(
        gate_recall=recall["gate"],
        bound_recall=recall["bound"],
        gate_mass=mass["gate"],
        bound_mass=mass["bound"],
        fine_bound_mass=_mass(probs, fine, FINE_BLOCK, fine_own),
        recent_mass=mass["recent"],
        best_mass=mass["best"],
    )


def best_blocks(scores: torch.Tensor, allowed: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The so many best of the allowed blocks, [T, Hkv, NB] bool. scores [T, Hkv, NB]; count [T]."""
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=2, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        2, order, torch.arange(scores.shape[2], device=order.device).expand_as(order)
    )
    return (rank < count[:, None, None]) & allowed


def _mass(probs: torch.Tensor, pick: torch.Tensor, block: int, own: torch.Tensor) -> float:
    """The mean attention on keys of picked blocks and own ones. probs [T, Hkv, G, S]; own [T, 1, S]."""
    read = torch.zeros(*pick.shape[:2], probs.shape[3], dtype=torch.bool, device=probs.device)
    chosen = pick.repeat_interleave(block, dim=2)
    read[:, :, : chosen.shape[2]] = chosen
    return float((probs * (read | own)[:, :, None]).sum(dim=3).mean())

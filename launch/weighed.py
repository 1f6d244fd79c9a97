"""Attention to picked blocks, and what share of the dense attention they carry."""

from dataclasses import dataclass

import torch

from configs.schema import SparseConfig
from kernels.attention import PagedSequences
from kernels.select import choose_blocks, num_selection_blocks
from kernels.sparse_attention import sparse_attention
from launch.teacher_forced import Places
from rollout.selectors import choice_of
from rollout.sparse import SparseAttention, kept

BEST = "best"  # the blocks that carry most of the attention: what no selector knows before it has read everything


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One selector under one budget."""

    selector: str
    config: SparseConfig
    sparse: SparseAttention


class Weighed:
    """Attention to what a selector picks, as rollout.sparse has it, that also weighs what was picked.

    mass: by layer, the share of the dense attention on keys that were read, over places and heads.
    """

    def __init__(self, side: Side, places: Places) -> None:
        self._side = side
        self._places = places
        self.mass: dict[int, float] = {}

    def takes(self, layer: int) -> bool:
        """Whether a layer attends so."""
        return self._side.sparse.part_of(layer) is not None

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
        """Over the blocks that are picked."""
        part, config = self._side.sparse.part_of(layer), self._side.config
        assert part is not None
        shares = block_shares(query, key_cache, self._places, scale=scale, select_block=config.block_tokens)
        if self._side.selector == BEST:
            lists = choose_blocks(shares.mean(dim=2), seqs, choice_of(config), select_block=config.block_tokens)
        else:
            text = self._places.rows.text
            lists = part.selector.select(layer - part.layers.start, query, positions, seqs, kept(part.selector, text))
        self.mass[layer] = float((shares * lists.listed(shares.shape[3])[:, :, None]).sum(dim=3).mean())
        return sparse_attention(query, key_cache, value_cache, seqs, lists, scale=scale)


def block_shares(
    query: torch.Tensor, key_cache: torch.Tensor, places: Places, *, scale: float, select_block: int
) -> torch.Tensor:
    """The share of a token's attention on each selection block, the token's own included.

    Shapes: query [R, Hq, D]; key_cache [num_blocks, 64, Hkv, D]. Returns [R, Hkv, G, NB] float32.
    """
    keys = key_cache[places.keys].flatten(0, 1)
    own = key_cache.flatten(0, 1)[places.seqs.slots].float()
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("rhgd,shd->rhgs", grouped, keys.float()) * scale
    index = torch.arange(len(keys), device=keys.device)
    before, at = index < places.positions[:, None], index == places.positions[:, None]
    itself = torch.einsum("rhgd,rhd->rhg", grouped, own)[..., None] * scale
    scores = torch.where(at[:, None, None], itself, scores.masked_fill(~before[:, None, None], -torch.inf))
    num_blocks = num_selection_blocks(places.seqs, select_block)
    shares = scores.softmax(dim=3).unflatten(3, (-1, select_block)).sum(dim=4)
    return shares[..., :num_blocks]

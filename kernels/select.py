"""Which cached blocks a sparse forward reads: scores of blocks by query and descriptor, and lists of the best.

A selection block is select_block tokens of one sequence, index = token // select_block; it lies inside one block of the
cache, where kernels/describe.py keeps its descriptor. A block is complete where the context holds all of its tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.attention import PagedSequences
from kernels.describe import most_touched

if TYPE_CHECKING:
    from kernels.attention import BlockMaxima


@dataclass(frozen=True, slots=True)
class BlockLists:
    """The selection blocks that each sequence's new tokens read, a list for each key head.

    blocks [B, Hkv, K] int32: indices in the sequence, ascending and distinct; entries past counts hold anything in
    range. counts [B, Hkv] int32. held: made by an earlier launch than the one before the attention's, as all that says
    which keys they are; attention reads them while that one still runs, which lets it in only once all before have
    ended (kernels/cache_triton.py's rope_and_write_triton does).
    """

    blocks: torch.Tensor
    counts: torch.Tensor
    select_block: int
    held: bool = False

    def listed(self, num_blocks: int) -> torch.Tensor:
        """Which of a sequence's first blocks are read, [B, Hkv, num_blocks] bool."""
        exists = torch.arange(self.blocks.shape[2], device=self.blocks.device) < self.counts[:, :, None]
        # one column more takes what lies past a list's end
        column = torch.where(exists, self.blocks, num_blocks).clamp(0, num_blocks).long()
        read = torch.zeros(*self.counts.shape, num_blocks + 1, dtype=torch.bool, device=self.blocks.device)
        return read.scatter_(2, column, True)[:, :, :num_blocks]


@dataclass(frozen=True, slots=True)
class Choice:
    """How many blocks a list holds, and which it always holds.

    Always, whatever their scores: the incomplete blocks (those from context_len // select_block to the last new
    token's), the `recent` newest complete ones, and the first `sinks`. They count against the budget, and stay where it
    is too little.
    The budget: budget_blocks, or this share of the sequence's blocks, to the nearest, where that is more, but at most
    max_blocks, the room of a list. threshold None: a list fills the budget. Otherwise it holds, of the others, those
    alone that score more, up to the budget.
    """

    max_blocks: int
    budget_blocks: int
    share: float = 0.0
    threshold: float | None = None
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.budget_blocks <= self.max_blocks, self
        assert 0 <= self.share <= 1 and self.sinks >= 0 and self.recent >= 0, self

    @property
    def share_in_65536ths(self) -> int:
        """The share as a whole number: devices agree on its products."""
        return round(self.share * 65536)


def num_selection_blocks(seqs: PagedSequences, select_block: int) -> int:
    """A bound on the selection blocks of a sequence, known to the host: NB."""
    width = seqs.block_tables.shape[1] * (seqs.block_size // select_block)
    return min(-(-(seqs.max_context + seqs.max_seqlen_q) // select_block), width)


def list_room(seqs: PagedSequences, choice: Choice, *, select_block: int) -> int:
    """Blocks that a list has room for: K. What is always read has to fit."""
    num_blocks = num_selection_blocks(seqs, select_block)
    room = min(choice.max_blocks, num_blocks)
    incomplete = most_touched(seqs.max_seqlen_q, select_block)
    assert room >= min(choice.sinks + choice.recent + incomplete, num_blocks), (
        f"{choice} has no room for {incomplete} blocks of {seqs.max_seqlen_q} new tokens besides sinks and recent ones"
    )
    return room


def bound_scores(query: torch.Tensor, minmax: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
    """What no key of a block can exceed: the sum over d of max(q_d min_d, q_d max_d), q the group's mean query.

    The largest over a sequence's new tokens, without a scale. Only complete blocks are scored; the others' entries hold
    anything. query: after rotary embedding; minmax: one layer's of kernels.describe.describe.
    Shapes: query [T, Hq, D]; minmax [num_blocks, block_size / select_block, Hkv, 2 D]. Returns [B, Hkv, NB] float32.
    Source: Quest (arXiv 2406.10774) eq. 2; one list for a group as in ReSA (2506.04108).
    """
    if not query.is_cuda:
        return bound_scores_reference(query, minmax, seqs)
    # only where it runs: importing triton settles whether kernels are interpreted
    from kernels.scores_triton import bound_scores_triton

    return bound_scores_triton(query, minmax, seqs)


def mean_scores(query: torch.Tensor, means: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
    """The product of the group's mean query with a block's mean key; else as bound_scores.

    Shapes: means [num_blocks, block_size / select_block, Hkv, D]. Source: MoBA (arXiv 2502.13189).
    """
    if not query.is_cuda:
        return mean_scores_reference(query, means, seqs)
    from kernels.scores_triton import mean_scores_triton

    return mean_scores_triton(query, means, seqs)


def verified_scores(maxima: "BlockMaxima", seqs: PagedSequences, out: torch.Tensor, rows: torch.Tensor) -> None:
    """The log of a block's largest attention weight in a dense forward, over the group's heads and the new tokens.

    seqs: of that forward. A block that nobody sees scores -inf, and every block of a sequence without new tokens.
    Those of sequence b become out[rows[b]]'s first: out [S, Hkv, at least NB] float32, as wide as the maxima or wider;
    rows [B] int64; of equal ones any sequence's. Source: PillarAttn (arXiv 2512.01278).
    """
    if not maxima.scores.is_cuda:
        verified_scores_reference(maxima, seqs, out, rows)
        return
    from kernels.scores_triton import verified_scores_triton

    verified_scores_triton(maxima, seqs, out, rows)


def choose_blocks(scores: torch.Tensor, seqs: PagedSequences, choice: Choice, *, select_block: int) -> BlockLists:
    """The blocks that are always read, and the best of the others by score; of equal ones the newer.

    scores [B, Hkv, S] float32, no NaN among the complete blocks'; complete blocks from S on score -inf.
    On CUDA one launch, without synchronisation. Returns lists of K = min(choice.max_blocks, NB).
    """
    if not scores.is_cuda:
        return choose_blocks_reference(scores, seqs, choice, select_block=select_block)
    from kernels.select_triton import choose_blocks_triton

    return choose_blocks_triton(scores, seqs, choice, select_block=select_block)


def newest_blocks(
    equal: torch.Tensor, seqs: PagedSequences, choice: Choice, *, num_kv_heads: int, select_block: int
) -> BlockLists:
    """The sinks and, up to the budget, the newest blocks: a window (StreamingLLM), or everything where that fits.

    equal [1] float32: the score of every block, any number. Source: arXiv 2309.17453.
    """
    shape = (len(seqs.context_lens), num_kv_heads, num_selection_blocks(seqs, select_block))
    return choose_blocks(equal.expand(shape), seqs, choice, select_block=select_block)


def bound_scores_reference(query: torch.Tensor, minmax: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
    """bound_scores in torch."""
    scores = []
    for q, described in by_sequence(_mean_queries(query, minmax), minmax, seqs):
        low, high = described.chunk(2, dim=2)
        # the larger product is with the maximum where q is positive, and with the minimum where it is negative
        bounds = torch.einsum("thd,nhd->thn", q.clamp(min=0), high) + torch.einsum("thd,nhd->thn", q.clamp(max=0), low)
        scores.append(largest_over_tokens(bounds))
    return torch.stack(scores)


def mean_scores_reference(query: torch.Tensor, means: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
    """mean_scores in torch."""
    pairs = by_sequence(_mean_queries(query, means), means, seqs)
    return torch.stack([largest_over_tokens(torch.einsum("thd,nhd->thn", q, described)) for q, described in pairs])


def _mean_queries(query: torch.Tensor, descriptors: torch.Tensor) -> torch.Tensor:
    """Over the query heads of a key head, [T, Hkv, D] float32."""
    return query.float().unflatten(1, (descriptors.shape[2], -1)).mean(dim=2)


def by_sequence(
    asked: torch.Tensor, descriptors: torch.Tensor, seqs: PagedSequences
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each sequence, what its new tokens ask, [Q, Hkv, D] of asked [T, Hkv, D], and its blocks' descriptors.

    These are [NB, Hkv, F] float32; those of blocks that are not complete are another block's.
    """
    parts = descriptors.shape[1]
    num_blocks = num_selection_blocks(seqs, seqs.block_size // parts)
    index = torch.arange(num_blocks, device=asked.device)
    complete = index < (seqs.context_lens // (seqs.block_size // parts))[:, None]
    # the tables' entries past a sequence's last block may hold anything
    blocks = torch.where(complete, seqs.block_tables[:, index // parts], 0).long()
    described = descriptors[blocks, index % parts].float()
    return list(zip(asked.split(seqs.cu_seqlens_q.diff().tolist()), described, strict=True))


def largest_over_tokens(products: torch.Tensor) -> torch.Tensor:
    """-inf without any token. [Q, Hkv, NB] to [Hkv, NB]."""
    lowest = products.new_full((1, *products.shape[1:]), -torch.inf)
    return torch.cat([lowest, products]).amax(dim=0)


def verified_scores_reference(
    maxima: "BlockMaxima", seqs: PagedSequences, out: torch.Tensor, rows: torch.Tensor
) -> None:
    """verified_scores in torch."""
    # a row that sees nothing: -inf less -inf is not a number
    finite = maxima.lse.masked_fill(maxima.lse.isneginf(), 0)
    weights = maxima.scores.float() - finite[:, :, None]
    groups = weights.unflatten(1, (out.shape[1], -1)).amax(dim=2)
    scores = torch.stack([largest_over_tokens(each) for each in groups.split(seqs.cu_seqlens_q.diff().tolist())])
    out[:, :, : scores.shape[2]].index_copy_(0, rows, scores)


def choose_blocks_reference(
    scores: torch.Tensor, seqs: PagedSequences, choice: Choice, *, select_block: int
) -> BlockLists:
    """choose_blocks in torch."""
    num_blocks = num_selection_blocks(seqs, select_block)
    missing = num_blocks - scores.shape[2]
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)  # or cut
    context, query_lens = seqs.context_lens[:, None, None], seqs.cu_seqlens_q.diff()[:, None, None]
    total = (context + query_lens + select_block - 1) // select_block
    index = torch.arange(num_blocks, device=scores.device)
    exists = index < total
    always = exists & ((index < choice.sinks) | (index >= context // select_block - choice.recent))
    wanted = (total.long() * choice.share_in_65536ths + 32768) // 65536
    wanted = wanted.clamp(choice.budget_blocks, choice.max_blocks)
    if choice.threshold is not None:
        passing = always | (exists & (scores > choice.threshold))
        wanted = torch.minimum(wanted, passing.sum(dim=2, keepdim=True))
    counts = torch.minimum(torch.maximum(wanted, always.sum(dim=2, keepdim=True)), total)

    # by what they are and then by score, newest first: the sorts keep the order of equals
    newest = torch.arange(num_blocks - 1, -1, -1, device=scores.device).expand_as(scores)
    order = newest.gather(2, scores.gather(2, newest).sort(dim=2, descending=True, stable=True).indices)
    rank = (exists.int() + always.int()).expand_as(scores).gather(2, order)
    order = order.gather(2, rank.sort(dim=2, descending=True, stable=True).indices)
    room = list_room(seqs, choice, select_block=select_block)
    best = order[:, :, :room]
    is_listed = index[:room] < counts
    blocks = torch.where(is_listed, best, num_blocks).sort(dim=2).values
    return BlockLists(
        blocks=torch.where(is_listed, blocks, 0).int(),
        counts=counts.expand(-1, scores.shape[1], 1)[:, :, 0].int(),
        select_block=select_block,
    )

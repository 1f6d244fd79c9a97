"""Drafts from texts on the device: a hash table of n-grams, and trees of what followed them.

Hashed, not sorted: a suffix array would be sorted anew for every token committed, while a table takes the few new
n-grams of a cycle in place, at addresses that a CUDA graph can keep, and finds one in a single read. What it costs is
certainty: an entry may be overwritten, and may be of another n-gram. The first loses a draft, never a token; against
the second, every match is compared token by token.
"""

from dataclasses import dataclass

import torch

from kernels.cycle import Drafts, Rows, Texts

# An n-gram's places are kept one a way, a way for each text modulo WAYS: siblings do not displace one another.
WAYS = 8
MAX_MATCH = 16  # longest agreement that is told apart
MAX_SIZES = 4  # n-gram sizes double from the shortest; with 8 ways that is 32 matches, a warp's worth
CATCH_UP = 64  # tokens of a text entered in one cycle at most: more than one cycle can commit
MAX_ENTRIES = 1 << 23  # 64 MB

# A match votes for what followed it with the length of its agreement; ESCAPE is the weight of "none of them"
# (drafter/tree.py says how it was chosen).
ESCAPE = 8.0

MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class NgramIndex:
    """Where n-grams occur in N texts of at most L tokens.

    A place is text * L + after, where after is the index of the token that follows; its n-gram of every size ends
    there. table [entries] int64: clock << 32 | place by bucket and way, 0 where nothing is; the newest entry wins.
    indexed [N] int32: the places of a text up to this one are entered. clock [1] int64: cycles since the beginning.
    sizes: of n-grams, shortest first.
    """

    table: torch.Tensor
    indexed: torch.Tensor
    clock: torch.Tensor
    sizes: tuple[int, ...]


def empty_index(texts: Texts, *, min_match: int) -> NgramIndex:
    """An index of these texts that knows nothing yet. min_match: shortest agreement that proposes."""
    assert 1 <= min_match <= MAX_MATCH
    num_places = texts.tokens.numel()
    assert num_places < 1 << 31, "a place is an int32"
    sizes = tuple(size for size in (min_match << order for order in range(MAX_SIZES)) if size <= MAX_MATCH)
    # a power of two, with room for each place at each size
    entries = max(1 << 12, min(MAX_ENTRIES, 1 << (len(sizes) * num_places - 1).bit_length()))
    return NgramIndex(
        table=texts.tokens.new_zeros(entries, dtype=torch.int64),
        indexed=texts.tokens.new_zeros(len(texts.tokens)),
        clock=texts.tokens.new_ones(1, dtype=torch.int64),
        sizes=sizes,
    )


def insert(index: NgramIndex, texts: Texts, text_ids: torch.Tensor, *, max_places: int) -> None:
    """Enter the next places of these texts: from indexed, which stays, to the last that has a successor.

    text_ids [B] int32, distinct but for free texts, of which nothing is entered. Mutates index.table.
    """
    if texts.tokens.is_cuda:
        from kernels.ngram_triton import insert_triton

        insert_triton(index, texts, text_ids, max_places=max_places)
    else:
        insert_reference(index, texts, text_ids, max_places=max_places)


def propose(index: NgramIndex, texts: Texts, rows: Rows, out: Drafts, *, depth: int, top_k: int) -> None:
    """Draft for the first B rows of out from places of their group that agree with their last tokens.

    Enters what was committed since the last call first. The nodes drafted are the M most probable, at most depth
    levels below the pending token and top_k below a node, in that order. A node's probability is its parent's times
    its share of the votes of the matches that agree with the path so far, as in drafter/tree.py. A text that agrees
    with its own end is continued as a repetition.
    Mutates index, and out, whose M nodes a row are filled as far as num_nodes says.
    """
    num_rows = out.num_nodes.shape[0]
    insert(index, texts, rows.text[:num_rows], max_places=CATCH_UP)
    if texts.tokens.is_cuda:
        from kernels.ngram_triton import look_up_triton

        look_up_triton(index, texts, rows, out, depth=depth, top_k=top_k)
    else:
        look_up_reference(index, texts, rows, out, depth=depth, top_k=top_k)


def insert_reference(index: NgramIndex, texts: Texts, text_ids: torch.Tensor, *, max_places: int) -> None:
    """The definition of insert."""
    device = texts.tokens.device
    text = text_ids.long()[:, None, None]
    sizes = torch.tensor(index.sizes, device=device)
    after = index.indexed[text] + 1 + torch.arange(max_places, device=device)[:, None]
    entered = (texts.groups[text] >= 0) & (after < texts.lengths[text]) & (after >= sizes)
    bucket = _buckets(index, texts, text, after, sizes)
    entry = (index.clock << 32) + text * texts.tokens.shape[1] + after
    slot = bucket * WAYS + text % WAYS
    index.table.scatter_reduce_(0, slot[entered], entry.expand_as(slot)[entered], "amax")


def look_up_reference(index: NgramIndex, texts: Texts, rows: Rows, out: Drafts, *, depth: int, top_k: int) -> None:
    """The definition of propose, after insertion; it moves indexed and the clock on."""
    num_rows, num_nodes = out.token_ids.shape
    device = texts.tokens.device
    text = rows.text[:num_rows].long()[:, None]
    group, length = texts.groups[text], texts.lengths[text].long()
    drafting = (rows.active[:num_rows, None] != 0) & (group >= 0)

    # one match for each size and way: [B, C]
    sizes = torch.tensor(index.sizes, device=device).repeat_interleave(WAYS)
    candidate = torch.arange(len(sizes), device=device)
    slot = _buckets(index, texts, text, length, sizes) * WAYS + candidate % WAYS
    entry = torch.where(drafting & (sizes <= length), index.table[slot], 0)
    place = entry & MASK_32
    other, after = place // texts.tokens.shape[1], place % texts.tokens.shape[1]
    end = texts.lengths[other].long()
    valid = (entry != 0) & (texts.groups[other] == group) & (after < end)
    agreement = _agreement(texts, text, length, other, after)
    valid &= agreement >= index.sizes[0]
    is_earlier = candidate < candidate[:, None]
    valid &= ~((place[:, :, None] == place[:, None]) & valid[:, None] & is_earlier).any(dim=2)
    rank = (valid[:, None] & (entry[:, None] > entry[:, :, None])).sum(dim=2)  # 0 is the newest match

    # what follows them, level by level; pairs [B, C, C]: two matches that have agreed so far
    max_depth = rows.max_lengths[:num_rows, None] - length - 1  # the last token has no successor to verify
    keys = torch.zeros(num_rows, depth, len(sizes), dtype=torch.int64, device=device)
    first = torch.zeros_like(keys)  # rank of the newest match that says the same up to this level
    tokens = torch.zeros_like(keys)
    pairs = valid[:, :, None] & valid[:, None]
    probability = torch.ones(num_rows, len(sizes), device=device)
    kept = valid
    for level in range(depth):
        # a text that agrees with its own end is repeating itself
        offset = torch.where(other == text, level % (length - after).clamp(min=1), level)
        exists = valid & (level < max_depth) & (after + offset < end)
        token = texts.tokens.flatten()[torch.where(exists, place + offset, 0)].long()
        weight = torch.where(exists, agreement + level, 0)
        total = (pairs * weight[:, None]).sum(dim=2)
        rivals = pairs
        pairs = pairs & exists[:, :, None] & exists[:, None] & (token[:, :, None] == token[:, None])
        votes = (pairs * weight[:, None]).sum(dim=2)
        first[:, level] = torch.where(pairs, rank[:, None], len(sizes)).amin(dim=2)
        is_first = exists & (first[:, level] == rank)
        more = votes[:, None] > votes[:, :, None]
        as_many = votes[:, None] == votes[:, :, None]
        ahead = more | (as_many & (rank[:, None] < first[:, level, :, None]))
        kept = kept & exists & ((rivals & is_first[:, None] & ahead).sum(dim=2) < top_k)
        probability = probability * (votes.float() / (ESCAPE + total.float()))
        # between equal probabilities the upper level decides, then the newer match
        order = (depth - 1 - level << 10) + (len(sizes) - 1 - rank << 5) + candidate
        key = (probability.view(torch.int32).long() << 32) + order
        keys[:, level] = torch.where(kept & is_first, key, 0)
        tokens[:, level] = token

    # the most probable of all levels: a node stands before its less probable children
    keys = keys.flatten(1).sort(dim=1, descending=True).values[:, :num_nodes]
    drafted = keys > 0
    below, older, chosen = keys >> 10 & 63, keys >> 5 & 31, keys & 31
    levels = depth - 1 - below
    node = torch.arange(keys.shape[1], device=device).expand_as(keys)
    numbers = torch.zeros(num_rows, depth * len(sizes) + 1, dtype=torch.int64, device=device)
    numbers.scatter_(1, torch.where(drafted, levels * len(sizes) + len(sizes) - 1 - older, depth * len(sizes)), node)
    above = (levels - 1).clamp(min=0) * len(sizes)
    parent = numbers.gather(1, above + first.flatten(1).gather(1, above + chosen))
    out.token_ids[:, : keys.shape[1]] = tokens.flatten(1).gather(1, levels * len(sizes) + chosen).int()
    out.parents[:, : keys.shape[1]] = torch.where(levels == 0, -1, parent).int()
    out.num_nodes.copy_(drafted.sum(dim=1))

    live = text[group >= 0]
    index.indexed[live] = torch.minimum(index.indexed[live] + CATCH_UP, texts.lengths[live] - 1)
    index.clock.add_(1)


def _buckets(
    index: NgramIndex, texts: Texts, text: torch.Tensor, after: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Buckets of the n-grams of these sizes that end before after: FNV-1a over tokens, newest first, then mixed."""
    state = texts.groups[text].long() * 0x3C6EF373 + sizes * 0x61C88647 & MASK_32
    for back in range(1, 1 + max(index.sizes)):
        token = texts.tokens[text, (after - back).clamp(0, texts.tokens.shape[1] - 1)].long()
        state = torch.where(back <= sizes, (state ^ token) * 0x01000193 & MASK_32, state)
    state = (state ^ (state >> 15)) * 0x2C1B3C6D & MASK_32
    state = (state ^ (state >> 12)) * 0x297A2D39 & MASK_32
    return (state ^ (state >> 15)) % (len(index.table) // WAYS)


def _agreement(
    texts: Texts, text: torch.Tensor, length: torch.Tensor, other: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """Tokens before after in the other text that equal the text's last ones, at most MAX_MATCH. [B, C]."""
    back = torch.arange(1, 1 + MAX_MATCH, device=text.device)
    mine, theirs = length[:, :, None] - back, after[:, :, None] - back
    equal = texts.tokens[text[:, :, None], mine.clamp(min=0)] == texts.tokens[other[:, :, None], theirs.clamp(min=0)]
    return (equal & (mine >= 0) & (theirs >= 0)).long().cumprod(dim=2).sum(dim=2)

"""What an EAGLE head does between its matrix products: catching up, joining its inputs, growing and ranking a tree.

A step at position p reads the token at p + 1 and a state of position p. Positions that the target has computed are
caught up with together; the last of them predicts the first drafted token, and every level below takes one more step.
Keys and values of a text stand in a ring of blocks, so that a text of any length takes a window's worth of memory.
"""

from dataclasses import dataclass

import torch

from kernels.cycle import Drafts, Rows, Texts
from kernels.features import NUM_AUX, Rings
from kernels.linear import Norm, rms_norm_reference
from kernels.sample import log_exponential_noise

LOG2_E = 1.4426950408889634
MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class KvRings:
    """Keys and values of S texts and of nobody, each in a ring of K blocks.

    storage [2, (S + 1) K, block_size, Hkv, D]. Position p is the ring's entry (p - origin) % (K block_size).
    origins, digested [S + 1] int32: positions from origin to digested - 1 are there. begun [S + 1] int32: whose they
    are, by Rings.begun. window: positions a step attends to, itself included.
    """

    storage: torch.Tensor
    origins: torch.Tensor
    digested: torch.Tensor
    begun: torch.Tensor
    window: int

    @property
    def blocks_each(self) -> int:
        return self.storage.shape[1] // len(self.origins)

    @property
    def block_size(self) -> int:
        return self.storage.shape[2]


@dataclass(frozen=True, slots=True)
class CatchUp:
    """What the steps of B rows forward: C known positions each, then L - 1 levels of k nodes.

    token_ids, positions, slots [B * C] int64 and aux [B * C, 3H]: of the last C positions, the newest last; what is
    not known goes to nobody's ring. block_tables [B, K] int32: the ring from the block where the window begins; indices
    count from there. contexts [L, B] int32: keys before the queries of the newest position, and of each level's nodes.
    node_positions, node_slots, node_indices [L - 1, B * k] int64: of each level's nodes, where node_indices count
    positions as indices do. sample_positions [L, B] int64: of the tokens each level proposes.
    drafting [B] int32: 0 for a row that has nothing to go on from.
    """

    token_ids: torch.Tensor
    aux: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    contexts: torch.Tensor
    node_positions: torch.Tensor
    node_slots: torch.Tensor
    node_indices: torch.Tensor
    sample_positions: torch.Tensor
    drafting: torch.Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """All nodes thought of for B rows, N each: k below the pending token, then k below each of k nodes a level.

    keys [B, N] int64: the more probable the larger, then the lower number. token_ids, parents [B, N] int32: a parent is
    a candidate's number, -1 the pending token.
    """

    keys: torch.Tensor
    token_ids: torch.Tensor
    parents: torch.Tensor


@dataclass(frozen=True, slots=True)
class Beams:
    """The k likeliest nodes of a level in each of B rows, from which the next level grows. All [B * k].

    token_ids, rows int64: rows of the step that proposed them. scores float32: log2 of their joint probability.
    numbers int32: of the candidates. ancestors int64: bit i is set for the i-th node stepped, themselves included.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    scores: torch.Tensor
    numbers: torch.Tensor
    ancestors: torch.Tensor


def catch_up(
    texts: Texts,
    rows: Rows,
    rings: Rings,
    kv: KvRings,
    published: torch.Tensor,
    *,
    num_rows: int,
    num_positions: int,
    levels: int,
    top_k: int,
) -> CatchUp:
    """Lay out the steps of the first num_rows rows; kv's origins, digested and begun move on to what they will cache.

    A row whose text has n tokens steps at positions n - 1 - num_positions to n - 2. Cached already or not makes no
    difference: a key and a value are functions of their position's inputs alone. Where more has come since the last
    call, what is cached is given up, and the ring begins anew with these.
    published [1] int32: 0 while there are no weights, and no row drafts.
    """
    if texts.tokens.is_cuda:
        from kernels.eagle_triton import catch_up_triton as lay_out
    else:
        lay_out = catch_up_reference
    return lay_out(
        texts,
        rows,
        rings,
        kv,
        published,
        num_rows=num_rows,
        num_positions=num_positions,
        levels=levels,
        top_k=top_k,
    )


def join_inputs(
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    states: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    embed_norm: Norm,
    state_norm: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed embeddings and normed states side by side, and the states.

    rows [T] int64: which of the states each token takes; None takes them in order, and returns them as they are.
    Shapes: token_ids [T] int64; embedding [V, H]; states [S, H]. Returns [T, 2H] and [T, H].
    """
    if token_ids.is_cuda:
        from kernels.eagle_triton import join_inputs_triton as join
    else:
        join = join_inputs_reference
    return join(token_ids, embedding, states, rows, embed_norm=embed_norm, state_norm=state_norm)


def grow(
    logits: torch.Tensor,
    keys: torch.Tensor,
    sample_positions: torch.Tensor,
    vocabulary: torch.Tensor,
    transform: torch.Tensor,
    beams: Beams | None,
    out: Candidates,
    *,
    level: int,
    top_k: int,
) -> Beams:
    """Enter the top_k likeliest children of every beam as candidates; the top_k likeliest of them are the next beams.

    The target's token is the one of largest p / E, whose noise E is known: so a child is as likely as its share of
    q / E, not of q. With top_k 1 that is the chain of argmaxes under the shared noise. Of equals the first counts more.
    Shapes: logits [B * beams, V'] with one beam, the pending token, at level 0 and top_k after; keys [>= B] int64;
    sample_positions [B] int64; vocabulary [V'] int32: the target's tokens; transform [2] float32: log2 e over the
    temperature and 1, or log2 e and 0, which leaves the noise out. Mutates out.
    """
    if logits.is_cuda:
        from kernels.eagle_grow_triton import grow_triton as enter
    else:
        enter = grow_reference
    return enter(logits, keys, sample_positions, vocabulary, transform, beams, out, level=level, top_k=top_k)


def rank(candidates: Candidates, drafting: torch.Tensor, out: Drafts) -> None:
    """Draft the M likeliest candidates, likeliest first, so that parents stand before children; out is mutated."""
    if candidates.keys.is_cuda:
        from kernels.eagle_grow_triton import rank_triton

        rank_triton(candidates, drafting, out)
    else:
        rank_reference(candidates, drafting, out)


def num_candidates(levels: int, top_k: int) -> int:
    """N of Candidates."""
    return top_k + (levels - 1) * top_k * top_k


def catch_up_reference(
    texts: Texts,
    rows: Rows,
    rings: Rings,
    kv: KvRings,
    published: torch.Tensor,
    *,
    num_rows: int,
    num_positions: int,
    levels: int,
    top_k: int,
) -> CatchUp:
    """The definition of catch_up."""
    device, nobody = texts.tokens.device, len(rings.starts) - 1
    ring_size, size = rings.states.shape[1], kv.block_size
    assert num_positions <= ring_size
    text = rows.text[:num_rows].long()
    slot = rings.slot_of[text].long()
    newest = texts.lengths[text].long() - 2
    drafting = (rows.active[:num_rows] != 0) & (slot < nobody) & (newest >= rings.starts[slot]) & (published != 0)
    slot = torch.where(drafting, slot, nobody)

    first = torch.maximum(newest - (num_positions - 1), rings.starts[slot])
    is_new = (kv.begun[slot] != rings.begun[slot]) | (kv.digested[slot] < first)
    origin = torch.where(is_new, first, kv.origins[slot].long())
    changed = slot[drafting]
    kv.origins[changed] = origin[drafting].int()
    kv.digested[changed] = newest[drafting].int() + 1
    kv.begun[changed] = rings.begun[changed]
    newest, origin = torch.where(drafting, newest, 0), torch.where(drafting, origin, 0)

    def slots(entry: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return (of * kv.blocks_each + entry // size % kv.blocks_each) * size + entry % size

    position = newest[:, None] - (num_positions - 1) + torch.arange(num_positions, device=device)
    known = drafting[:, None] & (position >= rings.starts[slot][:, None])
    cached = drafting[:, None] & (position >= origin[:, None])
    source = torch.where(known, slot[:, None], nobody)
    position = torch.where(known, position, 0)
    tokens = torch.where(known, texts.tokens[text[:, None], position + 1].long(), 0)
    aux_width = rings.states.shape[2] // (NUM_AUX + 2) * NUM_AUX

    entry = newest - origin
    first_block = (entry - kv.window + 1).clamp(min=0) // size
    index = entry - first_block * size
    table = slot[:, None] * kv.blocks_each + (first_block[:, None] + torch.arange(kv.blocks_each, device=device)) % (
        kv.blocks_each
    )
    level = torch.arange(levels, device=device)[:, None]
    below = (level[1:] - 1)[..., None] * top_k + torch.arange(top_k, device=device) + 1  # [L - 1, 1, k]
    each = level[1:, :, None] + torch.zeros(1, 1, top_k, dtype=torch.int64, device=device)
    return CatchUp(
        token_ids=tokens.flatten(),
        aux=rings.states[source, torch.where(known, position % ring_size, 0), :aux_width].flatten(0, 1),
        positions=position.flatten(),
        slots=torch.where(
            cached, slots((position - origin[:, None]).clamp(min=0), slot[:, None]), nobody * kv.blocks_each * size
        ).flatten(),
        block_tables=table.int(),
        contexts=torch.where(level == 0, index, index + 1 + (level - 1) * top_k).int(),
        node_positions=(newest[:, None] + each).flatten(1),
        node_slots=slots(entry[:, None] + below, slot[:, None]).flatten(1),
        node_indices=(index[:, None] + each).flatten(1),
        sample_positions=newest + 2 + level,
        drafting=drafting.int(),
    )


def join_inputs_reference(
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    states: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    embed_norm: Norm,
    state_norm: Norm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of join_inputs."""
    states = states if rows is None else states[rows]
    embeds = rms_norm_reference(embedding[token_ids], embed_norm)
    return torch.cat([embeds, rms_norm_reference(states, state_norm)], dim=1), states


def grow_reference(
    logits: torch.Tensor,
    keys: torch.Tensor,
    sample_positions: torch.Tensor,
    vocabulary: torch.Tensor,
    transform: torch.Tensor,
    beams: Beams | None,
    out: Candidates,
    *,
    level: int,
    top_k: int,
) -> Beams:
    """The definition of grow."""
    num_rows, device = len(sample_positions), logits.device
    num_beams = len(logits) // num_rows
    noise = log_exponential_noise(keys[:num_rows], sample_positions, vocabulary) * LOG2_E
    scores = logits.float() * transform[0] - (transform[1] * noise).repeat_interleave(num_beams, dim=0)
    best, columns = (x[:, :top_k] for x in scores.sort(dim=1, descending=True, stable=True))
    total = torch.exp2(scores - best[:, :1]).sum(dim=1, keepdim=True).log2()
    share = (best - best[:, :1] - total).clamp(max=0).view(num_rows, num_beams * top_k)
    above = torch.zeros(num_rows * num_beams, device=device) if beams is None else beams.scores
    joint = above.view(num_rows, num_beams).repeat_interleave(top_k, dim=1) + share

    first = 0 if level == 0 else num_candidates(level, top_k)
    local = torch.arange(num_beams * top_k, device=device)
    fields = slice(first, first + num_beams * top_k)
    out.keys[:, fields] = _keys(joint, first + local)
    out.token_ids[:, fields] = vocabulary[columns].view(num_rows, -1)
    if beams is None:
        out.parents[:, fields] = -1
    else:
        out.parents[:, fields] = beams.numbers.view(num_rows, num_beams).repeat_interleave(top_k, dim=1)

    chosen = out.keys[:, fields].sort(dim=1, descending=True).indices[:, :top_k]
    row = torch.arange(num_rows, device=device)[:, None]
    beam_row = row * num_beams + chosen // top_k
    bits = (
        torch.ones(top_k, dtype=torch.int64, device=device) << (level * top_k + torch.arange(top_k, device=device)) % 64
    )
    ancestors = bits if beams is None else bits | beams.ancestors[beam_row]
    return Beams(
        token_ids=out.token_ids[:, fields].gather(1, chosen).long().flatten(),
        rows=beam_row.flatten(),
        scores=joint.gather(1, chosen).flatten(),
        numbers=(first + chosen).int().flatten(),
        ancestors=ancestors.expand(num_rows, -1).flatten(),
    )


def rank_reference(candidates: Candidates, drafting: torch.Tensor, out: Drafts) -> None:
    """The definition of rank."""
    num_rows, num_nodes = out.token_ids.shape
    count = min(num_nodes, candidates.keys.shape[1])
    chosen = candidates.keys.sort(dim=1, descending=True).indices
    place = chosen.argsort(dim=1)
    chosen = chosen[:, :count]
    above = candidates.parents.gather(1, chosen).long()
    out.token_ids[:, :count] = candidates.token_ids.gather(1, chosen)
    out.parents[:, :count] = torch.where(above < 0, -1, place.gather(1, above.clamp(min=0))).int()
    out.num_nodes.copy_(torch.where(drafting != 0, count, 0))


def _keys(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 in the order of float32 scores; of equal ones the lower number is the larger key."""
    bits = scores.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) + (MASK_32 - numbers)

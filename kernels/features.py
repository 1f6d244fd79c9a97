"""Keeping what the target computed for committed tokens: one launch a cycle, into a ring of positions for each text."""

from dataclasses import dataclass

import torch

from kernels.cycle import Drafts, Texts

NUM_AUX = 3  # residual streams that EAGLE-3 reads


@dataclass(frozen=True, slots=True)
class Rings:
    """The last F positions of S texts; position p of a text is at p % F of its slot. One more slot belongs to nobody.

    slot_of [N] int32: the slot of each text, S where it has none. starts [S + 1] int32: the first position of which
    anything is known. begun [S + 1] int32: a number of its own for each time that a text took the slot.
    states [S + 1, F, (A + 2) H]: residual streams at the A aux layers, the final hidden state, and that of a drafted
    token that was rejected as the position's successor. alt_ids [S + 1, F] int32: that token, -1 where there is none;
    its state is then any.
    """

    slot_of: torch.Tensor
    starts: torch.Tensor
    begun: torch.Tensor
    states: torch.Tensor
    alt_ids: torch.Tensor


def keep_features(
    rings: Rings,
    texts: Texts,
    text: torch.Tensor,
    *,
    aux: tuple[torch.Tensor, ...],
    hidden: torch.Tensor,
    counts: torch.Tensor,
    path: torch.Tensor,
    num_valid: torch.Tensor,
    drafts: Drafts | None,
) -> None:
    """Store the states from which the last committed tokens were sampled; rings are mutated.

    A text of n tokens to which c were just added gets positions n - c - 1 to n - 2. The rejected successor is the
    first drafted one, which is the likeliest; texts without a slot are left out.
    Shapes: text [B] int32; aux [B * Q, H] A times, hidden [B * Q, H]; counts, num_valid [B], path [B, Q] int32 as in
    drafter.types.CycleFeatures; drafts of M = Q - 1 nodes, None where Q is 1. B may be less than drafts and text have.
    """
    if hidden.is_cuda:
        from kernels.features_triton import keep_features_triton as keep
    else:
        keep = keep_features_reference
    keep(rings, texts, text, aux=aux, hidden=hidden, counts=counts, path=path, num_valid=num_valid, drafts=drafts)


def keep_features_reference(
    rings: Rings,
    texts: Texts,
    text: torch.Tensor,
    *,
    aux: tuple[torch.Tensor, ...],
    hidden: torch.Tensor,
    counts: torch.Tensor,
    path: torch.Tensor,
    num_valid: torch.Tensor,
    drafts: Drafts | None,
) -> None:
    """The definition of keep_features."""
    num_rows, num_tokens = path.shape
    text = text[:num_rows].long()
    slot = rings.slot_of[text].long()
    place = torch.arange(num_tokens, device=hidden.device)
    first = texts.lengths[text].long() - counts - 1
    position = first[:, None] + place
    row, place = ((place < counts[:, None]) & (slot < len(rings.states) - 1)[:, None]).nonzero(as_tuple=True)
    column, at = path[row, place].long(), position[row, place]
    alt_ids = torch.full_like(column, -1)
    alt_column = column
    if drafts is not None:
        committed = texts.tokens[text[row], at + 1]
        node = torch.arange(num_tokens - 1, device=hidden.device)
        drafted = drafts.token_ids[row]
        is_child = (node < num_valid[row, None]) & (drafts.parents[row] + 1 == column[:, None])
        rejected = is_child & (drafted != committed[:, None])
        alt = rejected.int().argmax(dim=1)
        found = rejected.any(dim=1)
        alt_ids = torch.where(found, drafted.gather(1, alt[:, None])[:, 0].long(), -1)
        alt_column = torch.where(found, alt + 1, column)
    forwarded = row * num_tokens
    states = [x[forwarded + column] for x in (*aux, hidden)] + [hidden[forwarded + alt_column]]
    ring = at % rings.states.shape[1]
    rings.states[slot[row], ring] = torch.cat(states, dim=1)
    rings.alt_ids[slot[row], ring] = alt_ids.int()

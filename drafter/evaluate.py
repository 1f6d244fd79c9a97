"""How many tokens a drafter would have saved on finished texts, without drafting them again.

Up to its first rejected token a chain reads the very tokens that were sampled. So all chains of a text can be unrolled
at once over the text itself, and the cycles an engine would have run are found by walking from chain to chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from drafter.eagle import EagleHead
from drafter.features import FeatureBatch
from drafter.losses import row_chunks
from drafter.unroll import Chains, unroll
from kernels.sample import sample

FIRST_BAND = 32  # response tokens; each further band of a table is twice as far


@dataclass(frozen=True, slots=True)
class Cycles:
    """Draft-and-verify cycles, one an element: how many tokens of the response came before it, and how many of its
    depth drafted tokens were accepted."""

    depth: int
    places: list[int]
    accepted: list[int]

    def __add__(self, other: "Cycles") -> "Cycles":
        assert self.depth == other.depth, f"drafts of {self.depth} and of {other.depth} tokens"
        return Cycles(self.depth, self.places + other.places, self.accepted + other.accepted)

    @property
    def accept_length(self) -> float:
        """Tokens a forward of the policy commits, its own included; NaN without cycles."""
        return 1 + sum(self.accepted) / len(self.accepted) if self.accepted else float("nan")

    def table(self) -> dict[str, Any]:
        """What `paceline drafter eval` reports, JSON-able.

        by_depth: the share of drafts accepted up to each drafted token, as vLLM counts per position. by_place: accept
        length where the cycle began within the response.
        """
        bands = [0, FIRST_BAND]
        while bands[-1] <= max(self.places, default=0):
            bands.append(2 * bands[-1])
        by_place = []
        for low, high in pairwise(bands):
            inside = [count for place, count in zip(self.places, self.accepted, strict=True) if low <= place < high]
            if inside:
                by_place.append(
                    {"from": low, "to": high, "drafts": len(inside), "accept_length": 1 + sum(inside) / len(inside)}
                )
        drafts = len(self.accepted)
        return {
            "depth": self.depth,
            "drafts": drafts,
            "draft_tokens": drafts * self.depth,
            "accepted": sum(self.accepted),
            "accept_length": self.accept_length if drafts else None,
            "by_depth": [sum(count > d for count in self.accepted) / max(1, drafts) for d in range(self.depth)],
            "by_place": by_place,
        }


def walk(
    head: EagleHead,
    batch: FeatureBatch,
    *,
    first: Sequence[int],
    embedding: torch.Tensor,
    depth: int,
    keys: torch.Tensor | None,
) -> Cycles:
    """The cycles of chains of depth tokens over the batch's texts, a window each.

    first: in each window, the index of the prompt's last token, at which the first chain begins. embedding [V, H] is
    the policy's. keys [N] int64: the noise each text was sampled with, at the batch's temperature; None where greedy.
    """
    assert (keys is None) == (batch.temperature == 0), "greedy texts have no noise, and others are not known without"
    accepted = accepted_tokens(head, batch, embedding=embedding, depth=depth, keys=keys).tolist()
    places, counts = [], []
    for (start, end), skip in zip(pairwise(batch.cu_seqlens.tolist()), first, strict=True):
        # of the window's end - start positions the last one predicts the last token: no chain begins there
        chain = start + skip
        while chain < end - 1:
            places.append(chain - start - skip + 1)
            counts.append(accepted[chain])
            chain += accepted[chain] + 1
    return Cycles(depth, places, counts)


@torch.no_grad()
def accepted_tokens(
    head: EagleHead, batch: FeatureBatch, *, embedding: torch.Tensor, depth: int, keys: torch.Tensor | None
) -> torch.Tensor:
    """How many tokens would be accepted of the chain begun at each position, [T] int64; depth, keys as in walk."""
    chains = Chains(batch)
    targets = head.target_ids()
    target_ids = targets.int()
    owners = torch.repeat_interleave(chains.lengths)
    running = torch.ones_like(batch.next_ids, dtype=torch.bool)
    accepted = torch.zeros_like(batch.next_ids)
    longest = int(chains.lengths.max())
    for step in unroll(head, chains, embedding, depth=depth, longest=longest, rejected=False):
        drafted = torch.empty_like(batch.next_ids)
        for rows in row_chunks(len(drafted), head.config.draft_vocab, drafted.device):
            logits = head.logits(step.outputs[rows]).float()
            if keys is None:
                drafted[rows] = targets[logits.argmax(dim=1)]
                continue
            # the noise of the drafted token's own place in the text: what the policy will sample it with
            places = batch.positions[rows] + step.depth + 2
            drafted[rows], _ = sample(
                logits,
                keys[owners[rows]],
                places,
                temperature=batch.temperature,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                token_ids=target_ids,
            )
        running &= step.known & (drafted == batch.next_ids[step.index])
        accepted += running
    return accepted

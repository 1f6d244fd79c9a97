"""The policy as its own drafter: approximated, a few tokens ahead, over the cache that verification then rewrites.

Each round is a cycle like the target's: prepare, forward, sample with the noise of the very positions, commit. So a
draft is right wherever the approximation changes no sampled token, and what it leaves in the cache lies where the dense
verification writes next: the rectification of ReSA (arXiv 2506.04108), paid for by every cycle anyway.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from drafter.types import Begun, CycleFeatures, Drafts, FeatureReader, ResidentDrafter, Rows, Strategy, Texts
from kernels.cycle import CycleInputs, commit, prepare

INNER_DEPTH = 3  # tokens that are drafted for a round: four forwarded a row still read the weights about once
INNER_KEPT = 2  # tokens hoped for of such a round: half as many rounds run as tokens are to be drafted


class Drawn(Protocol):
    """What a forward of T tokens gave: [T] int64, [T] float32, [T, H] and as much for each layer asked for."""

    @property
    def token_ids(self) -> torch.Tensor:
        """Sampled after each token."""

    @property
    def logprobs(self) -> torch.Tensor:
        """Of those."""

    @property
    def hidden(self) -> torch.Tensor:
        """After the final norm."""

    @property
    def aux(self) -> tuple[torch.Tensor, ...]:
        """The residual stream where it enters each of the layers."""


class Drawing(Protocol):
    """The forwards of one draft."""

    def draw(
        self, rows: Rows, inputs: CycleInputs, *, num_rows: int, num_nodes: int, aux_layers: Sequence[int]
    ) -> Drawn:
        """Forward what prepare gave and sample after each token, as the target does; keys and values are cached."""


class ApproximatePolicy(Protocol):
    """The policy's forward, approximated, over the cache of the rows of one generate call.

    block_size and dummy_slot: of the cache. stop_ids [K] int32.
    """

    block_size: int
    dummy_slot: int
    stop_ids: torch.Tensor

    def ahead(self, rows: Rows, contexts: torch.Tensor, *, num_rows: int, num_new: int) -> Drawing:
        """The forwards of a draft that begins after so many cached tokens, [B] int32, and forwards num_new at most."""

    def draft_logprobs(self, num_rows: int, num_nodes: int) -> torch.Tensor | None:
        """Where to leave what drafted tokens were drawn with, [B, M] float32; None where nobody is to know."""


@runtime_checkable
class DraftsAsPolicy(Protocol):
    """A drafter that is lent the policy."""

    def lend(self, policy: ApproximatePolicy | None) -> None:
        """Draft with this from now on; None takes back what was lent, and the cache that it holds. Between cycles."""


class SelfDrafter:
    """drafter.types.ResidentDrafter: chains that the policy would say if it attended to less.

    inner: who drafts for its rounds, and as which source, so that a round may commit several tokens (three tiers). It
    is told of texts by whoever made it. reader: what keeps the hidden states that the inner drafter goes on from.
    """

    def __init__(
        self,
        inner: ResidentDrafter | None = None,
        *,
        source: Literal["suffix", "eagle"] = "suffix",
        reader: FeatureReader | None = None,
    ) -> None:
        self._inner = inner
        self._ahead = Strategy(source, depth=INNER_DEPTH, top_k=1, num_verify=INNER_DEPTH)
        self._reader = reader
        self._policy: ApproximatePolicy | None = None

    def lend(self, policy: ApproximatePolicy | None) -> None:
        """Draft with this from now on; with None there is nothing to draft with."""
        self._policy = policy

    def attach(self, texts: Texts) -> None:
        """Nothing is kept of texts."""

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        """Sequences start to write texts; they need none besides."""
        return [[] for _ in begun]

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        """Let the inner drafter make ready."""
        if self._inner is not None:
            self._inner.refresh(self._ahead, grown=grown)

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Write a chain for each of the first B rows. Captured in a CUDA graph: no host synchronisation.

        The texts are written on for as long as this takes, and are as long as before when it is done.
        """
        num_rows, num_nodes = out.token_ids.shape
        text = rows.text[:num_rows].long()
        lengths = texts.lengths.clone()
        begin = lengths[text]
        # the last token of all has no successor to verify
        ends = torch.minimum(rows.max_lengths[:num_rows] - 1, begin + num_nodes)
        ahead = Rows(
            text=rows.text[:num_rows],
            keys=rows.keys[:num_rows],
            max_lengths=ends,
            active=rows.active[:num_rows] * (begin < ends),
            block_tables=rows.block_tables[:num_rows],
        )
        rounds, num_new = num_nodes, num_nodes
        if self._inner is not None:
            rounds, num_new = -(-num_nodes // INNER_KEPT), num_nodes + INNER_DEPTH
        assert self._policy is not None, "lend the policy first"
        drawing = self._policy.ahead(ahead, (begin - 1).clamp(min=0), num_rows=num_rows, num_new=num_new)
        logprobs = [self._advance(texts, ahead, drawing) for _ in range(rounds)]
        if (kept := self._policy.draft_logprobs(num_rows, num_nodes)) is not None:
            assert self._inner is None, "a round may commit several tokens"
            kept.copy_(torch.cat(logprobs, dim=1))
        node = torch.arange(num_nodes, device=text.device, dtype=torch.int32)
        drafted = (begin[:, None] + node).clamp(max=texts.tokens.shape[1] - 1)
        out.token_ids.copy_(texts.tokens[text[:, None], drafted])
        out.parents.copy_((node - 1).expand_as(out.parents))
        out.num_nodes.copy_(texts.lengths[text] - begin)
        texts.lengths.copy_(lengths)

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The sequence that wrote this text is complete; nothing is remembered of it here."""

    def release(self, texts: Sequence[int]) -> None:
        """These texts are free again."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the policy is all there is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""

    def _advance(self, texts: Texts, rows: Rows, drawing: Drawing) -> torch.Tensor:
        """One cycle of the approximate policy: its texts grow, and a row that reaches its end is no longer active.

        Returns what its tokens were drawn with, [B, 1 and the inner drafter's] float32.
        """
        policy, num_rows = self._policy, len(rows.text)
        assert policy is not None
        drafts, num_nodes = None, 0
        if self._inner is not None:
            num_nodes = self._ahead.num_verify
            drafts = _empty_drafts(num_rows, num_nodes, rows.text.device)
            self._inner.propose(texts, rows, self._ahead, drafts)
        inputs = prepare(
            texts, rows, drafts, num_rows=num_rows, block_size=policy.block_size, dummy_slot=policy.dummy_slot
        )
        reader = self._reader
        drawn = drawing.draw(
            rows,
            inputs,
            num_rows=num_rows,
            num_nodes=num_nodes,
            aux_layers=reader.aux_layers if reader else (),
        )
        result = commit(
            texts,
            rows,
            drafts,
            inputs,
            drawn.token_ids,
            drawn.logprobs,
            num_rows=num_rows,
            block_size=policy.block_size,
            stop_ids=policy.stop_ids,
        )
        if reader is not None:
            # of positions that the target computes again before anyone but the inner drafter reads them
            reader.observe(
                texts,
                rows,
                CycleFeatures(
                    num_rows=num_rows,
                    aux=drawn.aux,
                    hidden=drawn.hidden,
                    counts=result.counts,
                    path=result.path,
                    num_valid=inputs.num_valid,
                    drafts=drafts,
                ),
            )
        return result.logprobs


def _empty_drafts(num_rows: int, num_nodes: int, device: torch.device) -> Drafts:
    return Drafts(
        token_ids=torch.zeros(num_rows, num_nodes, dtype=torch.int32, device=device),
        parents=torch.zeros(num_rows, num_nodes, dtype=torch.int32, device=device),
        num_nodes=torch.zeros(num_rows, dtype=torch.int32, device=device),
    )

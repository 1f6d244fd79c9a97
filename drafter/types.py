"""What a drafter is given and what it gives back: tokens and tree parents, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from kernels.cycle import Drafts as Drafts
from kernels.cycle import Rows as Rows
from kernels.cycle import Texts as Texts


@dataclass(frozen=True, slots=True)
class Strategy:
    """How far and how widely to draft. A value: equal strategies are interchangeable."""

    source: Literal["off", "suffix", "eagle", "sparse"]
    depth: int  # levels below the pending token
    top_k: int  # children kept a node; 1 drafts a chain
    num_verify: int  # drafted tokens verified at most


OFF = Strategy(source="off", depth=0, top_k=0, num_verify=0)


@dataclass(frozen=True, slots=True)
class DraftState:
    """One running sequence, as a drafter sees it.

    token_ids: prompt and all committed tokens; the last one is pending (its successor is what a draft starts with).
    max_tokens: how many more tokens the sequence may take; a draft never needs to be deeper.
    """

    prompt_id: str
    sample: int
    token_ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of proposed tokens below the pending token; a chain is the tree whose every node has one child.

    token_ids [M]; parents [M]: index of each node's parent, -1 for the pending token. Parents stand before children.
    Siblings carry different tokens.
    """

    token_ids: list[int]
    parents: list[int]


EMPTY = Draft(token_ids=[], parents=[])


class Drafter(Protocol):
    """Proposes; never decides. Its state follows the sequences through begin, extend and finish."""

    def begin(self, prompt_id: str, sample: int, prompt_ids: Sequence[int]) -> None:
        """A sequence starts, or starts over (its worker was lost)."""

    def extend(self, prompt_id: str, sample: int, token_ids: Sequence[int]) -> None:
        """These tokens were committed to the sequence."""

    def finish(self, prompt_id: str, sample: int) -> None:
        """The sequence is complete; what it taught may serve its siblings and later epochs."""

    def propose(self, states: Sequence[DraftState], strategy: Strategy) -> list[Draft]:
        """One draft a state, EMPTY where nothing is worth proposing."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draft the same: JSON-able with default=list."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, replacing the present one."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A sequence that starts to write a text of a group: its prompt, and the text's length so far, prompt included."""

    text: int
    group: int
    prompt_id: str
    prompt_ids: Sequence[int]
    length: int


@runtime_checkable
class ResidentDrafter(Protocol):
    """Proposes from and into tensors on the device, so that a cycle needs no word from the host.

    begin, finish and release are the host's bookkeeping: what of them the device must know is told by refresh, so that
    sequences that come and go cost no launches where nothing is drafted, and as few for many as for one elsewhere.
    """

    def attach(self, texts: Texts) -> None:
        """Draft from these texts from now on; all of them are free."""

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        """Sequences start to write texts, whose tokens, lengths and groups are set already.

        free_texts: texts the drafter may take for what it remembers of the prompts; returns those it took for each of
        begun, in all the first of free_texts. It fills in their tokens, lengths and groups.
        """

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        """Before propose, and outside of its graph: let the device know what begin, finish and release have told.

        grown: tokens at most that a text has got since the strategy's source proposed last, or since it was begun.
        """

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Write a draft for each of the first B rows. Captured in a CUDA graph: no host synchronisation."""

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The sequence that wrote this text is complete; token_ids is its response."""

    def release(self, texts: Sequence[int]) -> None:
        """These texts are free again."""

    def state_dict(self) -> dict[str, Any]:
        """As Drafter.state_dict."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As Drafter.load_state_dict."""


@runtime_checkable
class FollowsTemperature(Protocol):
    """A drafter that draws its tokens with the target's own noise, or a reader that keeps what one temperature left."""

    def set_temperature(self, temperature: float) -> None:
        """The target samples at this temperature from now on, 0 for greedy. Between cycles; graphs stay valid."""


@dataclass(frozen=True, slots=True)
class CycleFeatures:
    """What the target computed for the tokens of one cycle: B rows of Q = 1 + M forwarded tokens, Q consecutive each.

    aux: residual stream entering each of the reader's aux_layers, [B * Q, H] each; hidden [B * Q, H]: after the final
    norm, what the head reads. counts [B] int32: tokens committed, 0 for an inactive row. path [B, Q] int32: path[b, k]
    is the column (0 the pending token, 1 + j node j) whose hidden state the k-th committed token was sampled from;
    entries past counts[b] hold anything in range. num_valid [B] int32 and drafts: nodes that were verified.
    """

    num_rows: int
    aux: tuple[torch.Tensor, ...]
    hidden: torch.Tensor
    counts: torch.Tensor
    path: torch.Tensor
    num_valid: torch.Tensor
    drafts: Drafts | None


class FeatureReader(Protocol):
    """Keeps the hidden states that verification leaves behind: for a learned drafter to go on from, and to learn from.

    Position p of a text is the place of its p-th token; its features are the hidden states computed there, and the
    token it predicts is the one at p + 1.
    """

    aux_layers: tuple[int, ...]  # () reads none

    def attach(self, texts: Texts, *, num_rows: int) -> None:
        """Read about these texts from now on, of which num_rows at most are written at a time; all of them are free."""

    def begin(self, texts: Sequence[int], lengths: Sequence[int]) -> None:
        """Sequences of so many tokens begin, or go on after an eviction, to write these texts: features up to their
        pending tokens, the last, are unknown."""

    def observe(self, texts: Texts, rows: Rows, features: CycleFeatures) -> None:
        """Keep what was committed. Called after commit, inside the target's CUDA graph: no host synchronisation.

        A row that committed c tokens and whose text has n now gives features of positions n - c - 1 to n - 2.
        """

    def committed(self, texts: np.ndarray, lengths: np.ndarray, *, version: int, finished: np.ndarray) -> None:
        """The host has read that these texts have so many tokens, of this policy version; cycles launched since may
        still be adding to them. Called once a cycle, of the rows that committed anything.

        texts, lengths [K] int64; finished [K] bool: those that are complete.
        """

    def release(self, texts: Sequence[int]) -> None:
        """These texts are no longer written."""

"""The policy as its own drafter, with a policy whose every token is known: what it drafts, and what it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from drafter.combined import CombinedDrafter
from drafter.selfdraft import INNER_DEPTH, DraftsAsPolicy, SelfDrafter
from drafter.types import Drafts, Rows, Strategy, Texts
from kernels.cycle import CycleInputs

NUM_NODES = 5
STRATEGY = Strategy("sparse", NUM_NODES, 1, NUM_NODES)
STOP = 99


@dataclass
class Said:
    """What a forward gave."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    hidden: torch.Tensor
    aux: tuple[torch.Tensor, ...] = ()


@dataclass
class Counting:
    """A policy that says 10 and its position after every token, and STOP at some positions."""

    stops: tuple[int, ...] = ()
    block_size: int = 4
    dummy_slot: int = 400
    stop_ids: torch.Tensor = field(default_factory=lambda: torch.tensor([STOP], dtype=torch.int32))
    written: list[list[int]] = field(default_factory=list)  # slots, by forward
    begun: list[tuple[list[int], int]] = field(default_factory=list)  # contexts of a draft, and tokens it may forward

    def ahead(self, rows: Rows, contexts: torch.Tensor, *, num_rows: int, num_new: int) -> "Counting":
        self.begun.append((contexts.tolist(), num_new))
        return self

    def draw(
        self, rows: Rows, inputs: CycleInputs, *, num_rows: int, num_nodes: int, aux_layers: Sequence[int]
    ) -> Said:
        self.written.append(inputs.slots.tolist())
        positions = inputs.sample_positions
        token_ids = torch.where(torch.isin(positions, torch.tensor(self.stops)), STOP, 10 + positions)
        return Said(token_ids, torch.zeros(len(positions)), torch.zeros(len(positions), 1))

    def draft_logprobs(self, num_rows: int, num_nodes: int) -> None:
        return None


class Guessing(SelfDrafter):
    """An inner drafter that knows what Counting will say, but for every third position."""

    def __init__(self) -> None:
        super().__init__()
        self.refreshed: list[Strategy] = []

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        self.refreshed.append(strategy)

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        position = texts.lengths[rows.text.long()][:, None] + torch.arange(strategy.depth)
        out.token_ids.copy_(torch.where(position % 3 == 0, 7, 10 + position))
        out.parents.copy_(torch.arange(-1, strategy.depth - 1).expand_as(out.parents))
        out.num_nodes.fill_(strategy.depth)


def state() -> tuple[Texts, Rows]:
    """Three rows: of 6 tokens with room, of 9 whose last but two is next, and nobody's."""
    texts = Texts(
        tokens=torch.arange(64, dtype=torch.int32).repeat(4, 1),
        lengths=torch.tensor([9, 6, 3, 1], dtype=torch.int32),
        groups=torch.tensor([0, 0, -1, -1], dtype=torch.int32),
    )
    rows = Rows(
        text=torch.tensor([1, 0, 3], dtype=torch.int32),
        keys=torch.arange(3),
        max_lengths=torch.tensor([40, 12, 0], dtype=torch.int32),
        active=torch.tensor([1, 1, 0], dtype=torch.int32),
        block_tables=torch.arange(3 * 20, dtype=torch.int32).view(3, 20),
    )
    return texts, rows


def drafts() -> Drafts:
    return Drafts(*(torch.full(shape, 77, dtype=torch.int32) for shape in ((3, NUM_NODES), (3, NUM_NODES), (3,))))


@pytest.mark.parametrize("inner", [False, True], ids=["alone", "sped up"])
def test_the_draft_is_what_the_policy_says_and_nothing_else_is_left(inner: bool) -> None:
    texts, rows = state()
    policy, drafter = Counting(), SelfDrafter(Guessing() if inner else None)
    drafter.lend(policy)
    lengths, active, max_lengths = texts.lengths.clone(), rows.active.clone(), rows.max_lengths.clone()
    before = [texts.tokens[text, :length].clone() for text, length in enumerate(lengths)]
    out = drafts()
    drafter.propose(texts, rows, STRATEGY, out)
    # the second row's last token has no successor: two are drafted where three may come
    assert out.num_nodes.tolist() == [NUM_NODES, 2, 0]
    assert out.token_ids[0].tolist() == [16, 17, 18, 19, 20]
    assert out.token_ids[1, :2].tolist() == [19, 20]
    assert out.parents.tolist() == [[-1, 0, 1, 2, 3]] * 3
    assert torch.equal(texts.lengths, lengths)
    assert torch.equal(rows.active, active) and torch.equal(rows.max_lengths, max_lengths)
    for text, tokens in enumerate(before):
        assert torch.equal(texts.tokens[text, : len(tokens)], tokens)
    assert len(policy.written) == (3 if inner else NUM_NODES)
    # once for all rounds: cached are all tokens but the pending one, and an inner drafter forwards some beyond
    assert policy.begun == [([5, 8, 0], NUM_NODES + (INNER_DEPTH if inner else 0))]


def test_keys_are_written_only_where_verification_writes_them_again() -> None:
    texts, rows = state()
    policy = Counting()
    for drafter in (SelfDrafter(), SelfDrafter(Guessing())):
        drafter.lend(policy)
        drafter.propose(texts, rows, STRATEGY, drafts())
    # the target forwards the pending token, at index length - 1, and the nodes behind it
    mine, others = set(range(5, 5 + 1 + NUM_NODES)), set(range(80 + 8, 80 + 8 + 1 + 2))
    assert {slot for slots in policy.written for slot in slots} <= mine | others | {policy.dummy_slot}


def test_a_stop_token_ends_the_draft() -> None:
    texts, rows = state()
    for inner in (None, Guessing()):
        drafter = SelfDrafter(inner)
        drafter.lend(Counting(stops=(8,)))
        out = drafts()
        drafter.propose(texts, rows, STRATEGY, out)
        assert out.num_nodes.tolist() == [3, 2, 0]
        assert out.token_ids[0, :3].tolist() == [16, 17, STOP]


def test_a_sequence_that_may_take_one_more_token_is_not_drafted_for() -> None:
    texts, rows = state()
    rows.max_lengths[1] = 10
    policy, drafter, out = Counting(), SelfDrafter(), drafts()
    drafter.lend(policy)
    drafter.propose(texts, rows, STRATEGY, out)
    assert out.num_nodes.tolist() == [NUM_NODES, 0, 0]
    assert all(slots[1] == policy.dummy_slot for slots in policy.written)


def test_the_inner_drafter_is_told_of_its_own_strategy() -> None:
    inner = Guessing()
    SelfDrafter(inner, source="eagle").refresh(STRATEGY, grown=4)
    assert inner.refreshed == [Strategy("eagle", INNER_DEPTH, 1, INNER_DEPTH)]


def test_whoever_drafts_with_the_policy_among_several_is_lent_it() -> None:
    alone, beside = SelfDrafter(), Guessing()
    combined = CombinedDrafter({"suffix": beside, "sparse": alone})
    assert isinstance(combined, DraftsAsPolicy) and isinstance(alone, DraftsAsPolicy)
    policy = Counting()
    combined.lend(policy)
    assert alone._policy is policy
    combined.lend(None)
    assert alone._policy is None
    with pytest.raises(AssertionError, match="lend the policy"):
        alone.propose(*state(), STRATEGY, drafts())

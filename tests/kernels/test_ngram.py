"""The n-gram index on the device: what it finds, what it must not, and its kernels against their references."""

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cycle import Drafts, Rows, Texts
from kernels.ngram import CATCH_UP, NgramIndex, empty_index, insert, insert_reference, look_up_reference, propose
from kernels.ngram_triton import insert_triton, look_up_triton

MAX_LENGTH = 90
# few tokens, so that suffixes repeat
TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@dataclass
class World:
    """Texts, rows that write the first of them, an index of them and a place for drafts."""

    texts: Texts
    rows: Rows
    index: NgramIndex
    drafts: Drafts

    def say(self, text: int, token_ids: list[int], *, group: int = 0) -> None:
        """Let a text be these tokens."""
        self.texts.tokens[text, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int32)
        self.texts.lengths[text] = len(token_ids)
        self.texts.groups[text] = group

    def propose(self, *, depth: int = 6, top_k: int = 1) -> list[tuple[list[int], list[int]]]:
        """Token ids and parents of each row's draft."""
        propose(self.index, self.texts, self.rows, self.drafts, depth=depth, top_k=top_k)
        counts = self.drafts.num_nodes.tolist()
        return [
            (self.drafts.token_ids[row, :count].tolist(), self.drafts.parents[row, :count].tolist())
            for row, count in enumerate(counts)
        ]

    def catch_up(self) -> None:
        """Enter every row's text up to its end."""
        for _ in range(-(-MAX_LENGTH // CATCH_UP)):
            self.propose()


def make_world(*, num_rows: int, num_texts: int = 6, num_nodes: int = 6, min_match: int = 2) -> World:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    texts = Texts(
        tokens=ints(num_texts + 1, MAX_LENGTH), lengths=ints(num_texts + 1) + 1, groups=ints(num_texts + 1) - 1
    )
    rows = Rows(
        text=torch.arange(num_rows, dtype=torch.int32),
        keys=torch.zeros(num_rows, dtype=torch.int64),
        max_lengths=ints(num_rows) + MAX_LENGTH,
        active=ints(num_rows) + 1,
        block_tables=ints(num_rows, 1),
    )
    drafts = Drafts(ints(num_rows, num_nodes) - 9, ints(num_rows, num_nodes) - 9, ints(num_rows) - 9)
    index = empty_index(texts, min_match=min_match)
    # so large that no entry is lost to another n-gram's
    index = replace(index, table=index.table.new_zeros(1 << 18))
    return World(texts, rows, index, drafts)


@settings(deadline=None, max_examples=50)
@given(
    said=st.lists(TEXT, min_size=1, max_size=5),
    depth=st.integers(1, 5),
    top_k=st.integers(1, 4),
    num_nodes=st.integers(1, 12),
    room=st.integers(1, 8),
)
def test_a_draft_is_a_tree_within_every_limit(
    said: list[list[int]], depth: int, top_k: int, num_nodes: int, room: int
) -> None:
    world = make_world(num_rows=len(said), num_nodes=num_nodes)
    for text, token_ids in enumerate(said):
        world.say(text, token_ids)
        world.rows.max_lengths[text] = len(token_ids) + room
    for token_ids, parents in world.propose(depth=depth, top_k=top_k):
        levels: list[int] = []
        children: dict[int, list[int]] = {}
        for node, (token, parent) in enumerate(zip(token_ids, parents, strict=True)):
            assert -1 <= parent < node
            levels.append(1 if parent < 0 else levels[parent] + 1)
            children.setdefault(parent, []).append(token)
        assert max(levels, default=0) <= min(depth, room - 1)
        assert all(len(tokens) == len(set(tokens)) <= top_k for tokens in children.values())


@settings(deadline=None, max_examples=50)
@given(said=st.lists(TEXT, min_size=1, max_size=5), min_match=st.integers(1, 3))
def test_a_draft_is_there_just_where_a_suffix_has_a_successor(said: list[list[int]], min_match: int) -> None:
    world = make_world(num_rows=len(said), min_match=min_match)
    for text, token_ids in enumerate(said):
        world.say(text, token_ids)
    for text, (token_ids, _) in enumerate(world.propose()):
        own = said[text]
        suffix = own[len(own) - min_match :]
        followers = {
            other[after]
            for other in said
            for after in range(min_match, len(other))
            if len(own) >= min_match and other[after - min_match : after] == suffix
        }
        assert bool(token_ids) == bool(followers)
        assert set(token_ids[:1]) <= followers


def test_a_periodic_text_is_continued_past_its_end() -> None:
    world = make_world(num_rows=1, num_nodes=8)
    world.say(0, [9, 1, 2, 3, 1, 2, 3, 1, 2])
    assert world.propose(depth=8) == [([3, 1, 2, 3, 1, 2, 3, 1], [-1, 0, 1, 2, 3, 4, 5, 6])]


def test_siblings_are_quoted_by_their_votes_and_other_groups_never() -> None:
    world = make_world(num_rows=1, num_nodes=5)
    world.say(0, [5, 6, 7])
    for text, (token_ids, group) in enumerate(
        [([5, 6, 7, 1, 2], 0), ([4, 6, 7, 3], 0), ([5, 6, 7, 1, 8], 0), ([5, 6, 7, 4], 1)], start=1
    ):
        world.say(text, token_ids, group=group)
    insert(world.index, world.texts, torch.arange(6, dtype=torch.int32), max_places=CATCH_UP)
    # 1 has two votes of 3, 3 one of 2; below 1 the newer of equals, the later text, stands first
    assert world.propose(top_k=2) == [([1, 3, 8, 2], [-1, -1, 0, 0])]
    assert world.propose(top_k=1) == [([1, 8], [-1, 0])]


def test_a_text_that_was_freed_or_taken_by_another_group_is_not_quoted() -> None:
    world = make_world(num_rows=1)
    world.say(0, [5, 6, 7])
    world.say(1, [5, 6, 7, 1, 2])
    insert(world.index, world.texts, torch.tensor([1], dtype=torch.int32), max_places=CATCH_UP)
    assert world.propose() == [([1, 2], [-1, 0])]
    for group in (-1, 3):
        world.texts.groups[1] = group
        assert world.propose() == [([], [])]
    # its entries outlive what it said
    world.say(1, [8, 8, 8, 8, 8], group=0)
    assert world.propose() == [([], [])]


def test_an_entry_of_another_ngram_is_not_believed() -> None:
    world = make_world(num_rows=1)
    world.say(0, [5, 6, 7])
    world.say(1, [1, 2, 3, 4])
    wrong = (1 << 32) + MAX_LENGTH + 3
    world.index.table.fill_(wrong)
    assert world.propose() == [([], [])]


def test_a_table_too_small_for_its_texts_still_drafts_the_truth() -> None:
    rng = np.random.default_rng(0)
    world = make_world(num_rows=4)
    world.index = replace(world.index, table=world.index.table[:16])
    said = [rng.integers(0, 3, 80).tolist() for _ in range(4)]
    for text, token_ids in enumerate(said):
        world.say(text, token_ids)
    world.catch_up()
    for text, (token_ids, _) in enumerate(world.propose(depth=1)):
        suffix = said[text][-2:]
        followers = {other[at + 2] for other in said for at in range(len(other) - 2) if other[at : at + 2] == suffix}
        assert set(token_ids) <= followers


def test_a_long_text_is_caught_up_with_over_several_cycles() -> None:
    world = make_world(num_rows=1)
    token_ids = [7, 8, *range(100, 170), 5, 6, 9, *range(10, 20), 5, 6]
    world.say(0, token_ids)
    assert world.propose(depth=1) == [([], [])]
    assert int(world.index.indexed[0]) == CATCH_UP
    assert world.propose(depth=1) == [([9], [-1])]
    assert int(world.index.indexed[0]) == len(token_ids) - 1


def test_rows_that_are_idle_or_full_draft_nothing() -> None:
    world = make_world(num_rows=3)
    for text in range(3):
        world.say(text, [1, 2, 3, 1, 2])
    world.rows.active[0] = 0
    world.rows.max_lengths[1] = 6  # its last token has no successor to verify
    world.rows.max_lengths[2] = 7
    assert world.propose() == [([], []), ([], []), ([3], [-1])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
@pytest.mark.parametrize(("depth", "top_k", "num_nodes", "min_match"), [(6, 1, 6, 2), (3, 3, 7, 1), (5, 2, 16, 3)])
def test_the_kernels_do_what_their_references_do(depth: int, top_k: int, num_nodes: int, min_match: int) -> None:
    expected = random_world(0, num_rows=5, num_nodes=num_nodes, min_match=min_match)
    got = deepcopy(expected)
    for cycle in range(4):
        insert_reference(expected.index, expected.texts, expected.rows.text, max_places=CATCH_UP)
        insert_triton(got.index, got.texts, got.rows.text, max_places=CATCH_UP)
        assert torch.equal(got.index.table, expected.index.table)
        look_up_reference(expected.index, expected.texts, expected.rows, expected.drafts, depth=depth, top_k=top_k)
        look_up_triton(got.index, got.texts, got.rows, got.drafts, depth=depth, top_k=top_k)
        assert_same(got, expected)
        if cycle == 0:
            assert (expected.drafts.num_nodes > 0).any() and not expected.drafts.num_nodes[0]
        for world in (expected, got):
            grow(world, cycle)


@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "top_k", "num_nodes"), [(6, 1, 6), (8, 4, 16), (12, 3, 63)])
def test_the_compiled_kernels_do_what_their_references_do(depth: int, top_k: int, num_nodes: int) -> None:
    expected = random_world(1, num_rows=64, num_nodes=num_nodes, min_match=2)
    got = World(*(to_cuda(getattr(expected, field.name)) for field in fields(World)))
    for cycle in range(8):
        for world in (expected, got):
            world.propose(depth=depth, top_k=top_k)
            grow(world, cycle)
        assert_same(got, expected)


def random_world(seed: int, *, num_rows: int, num_nodes: int, min_match: int) -> World:
    """Rows of several groups that say similar things; the first is idle."""
    rng = np.random.default_rng(seed)
    world = make_world(num_rows=num_rows, num_texts=num_rows + 3, num_nodes=num_nodes, min_match=min_match)
    base = rng.integers(0, 4, MAX_LENGTH)
    for text in range(num_rows + 2):
        token_ids = np.where(rng.random(MAX_LENGTH) < 0.2, rng.integers(0, 4, MAX_LENGTH), base)
        world.say(text, token_ids[: rng.integers(1, 60)].tolist(), group=int(rng.integers(0, 1 + num_rows // 4)))
    world.rows.max_lengths.copy_(world.texts.lengths[:num_rows] + torch.from_numpy(rng.integers(8, 20, num_rows)))
    world.rows.active[0] = 0
    return world


def grow(world: World, cycle: int) -> None:
    """Every row commits two tokens that come from its draft or from nowhere."""
    lengths = world.texts.lengths
    for row in range(1, len(world.rows.text)):
        drafted = world.drafts.num_nodes[row] > 0 and row % 2
        world.texts.tokens[row, lengths[row]] = world.drafts.token_ids[row, 0] if drafted else cycle % 3
        world.texts.tokens[row, lengths[row] + 1] = row % 3
        lengths[row] += 2


def assert_same(got: World, expected: World) -> None:
    assert torch.equal(got.index.table.cpu(), expected.index.table)
    assert torch.equal(got.index.indexed.cpu(), expected.index.indexed)
    assert torch.equal(got.index.clock.cpu(), expected.index.clock)
    counts = expected.drafts.num_nodes
    assert torch.equal(got.drafts.num_nodes.cpu(), counts)
    drafted = torch.arange(expected.drafts.token_ids.shape[1]) < counts[:, None]
    assert torch.equal(got.drafts.token_ids.cpu()[drafted], expected.drafts.token_ids[drafted])
    assert torch.equal(got.drafts.parents.cpu()[drafted], expected.drafts.parents[drafted])


def to_cuda(value: Any) -> Any:
    """The same tensors on the device."""
    moved = {field.name: getattr(value, field.name) for field in fields(value)}
    return type(value)(**{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in moved.items()})

"""Draft trees: pruning, masks and the walk that accepts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drafter.types import Draft
from rollout.speculate import ancestry, depths, is_chain, prune, verify


@st.composite
def trees(draw: st.DrawFn) -> Draft:
    """Trees of up to 9 nodes in any order with parents first, siblings distinct, over four tokens."""
    nodes: list[tuple[int, int]] = []  # (parent, token)
    for _ in range(draw(st.integers(0, 9))):
        node = (draw(st.integers(-1, len(nodes) - 1)), draw(st.integers(0, 3)))
        if node not in nodes:
            nodes.append(node)
    return Draft(token_ids=[token for _, token in nodes], parents=[parent for parent, _ in nodes])


def test_a_chain_is_kept_up_to_its_first_wrong_token() -> None:
    assert verify([5, 6, 7], [-1, 0, 1], [5, 6, 8, 9]) == [0, 1]


def test_nothing_is_kept_when_the_first_token_is_wrong() -> None:
    assert verify([5, 6], [-1, 0], [4, 6, 6]) == []


def test_the_matching_branch_of_a_tree_is_kept_and_the_others_are_not() -> None:
    #        5 -> 7
    # root <
    #        6 -> 7 -> 8
    draft_ids, parents = [5, 7, 6, 7, 8], [-1, 0, -1, 2, 3]
    assert verify(draft_ids, parents, [6, 7, 7, 7, 8, 1]) == [2, 3, 4]


def test_an_empty_draft_keeps_nothing() -> None:
    assert verify([], [], [3]) == []


@given(trees(), st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_verify_keeps_the_longest_path_the_target_agrees_with(draft: Draft, target_ids: list[int]) -> None:
    agreed = [-1]
    for node, parent in enumerate(draft.parents):
        if parent in agreed and target_ids[parent + 1] == draft.token_ids[node]:
            agreed.append(node)
    assert verify(draft.token_ids, draft.parents, target_ids) == agreed[1:]


@given(trees(), st.integers(0, 5), st.integers(0, 9))
def test_a_pruned_tree_is_a_tree_with_the_same_paths(draft: Draft, max_depth: int, max_nodes: int) -> None:
    def paths(tree: Draft) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for token, parent in zip(tree.token_ids, tree.parents, strict=True):
            found.append((*(found[parent] if parent >= 0 else ()), token))
        return found

    pruned = prune(draft, max_depth=max_depth, max_nodes=max_nodes)
    assert paths(pruned) == [path for path in paths(draft) if len(path) <= max_depth][:max_nodes]
    assert all(parent < node for node, parent in enumerate(pruned.parents))


@given(st.lists(trees(), min_size=1, max_size=3))
def test_a_node_attends_exactly_its_ancestors_and_itself(drafts: list[Draft]) -> None:
    padded = np.full((len(drafts), 9), -1)
    for row, draft in zip(padded, drafts, strict=True):
        row[: len(draft.parents)] = draft.parents
    for attends, draft in zip(ancestry(padded), drafts, strict=True):
        for node in range(9):
            line, parent = {node}, draft.parents[node] if node < len(draft.parents) else -1
            while parent >= 0:
                line.add(parent)
                parent = draft.parents[parent]
            assert set(np.flatnonzero(attends[node]).tolist()) == line


@given(trees())
def test_only_a_line_of_nodes_is_a_chain(draft: Draft) -> None:
    in_line = all(parent == node - 1 for node, parent in enumerate(draft.parents))
    assert is_chain(depths(draft.parents)) == in_line

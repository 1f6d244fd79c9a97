"""Draft trees: their geometry, and the walk that decides what is kept. Pure functions."""

from collections.abc import Sequence

import numpy as np

from drafter.types import Draft


def depths(parents: Sequence[int]) -> list[int]:
    """Levels each node lies below the pending token; 1 is directly below."""
    levels: list[int] = []
    for parent in parents:
        levels.append(1 if parent < 0 else levels[parent] + 1)
    return levels


def is_chain(levels: Sequence[int]) -> bool:
    """Whether nodes of these depths each continue the one before, so that causal order masks them rightly."""
    # m nodes reach level m in a line only
    return not levels or levels[-1] == len(levels)


def ancestry(parents: np.ndarray) -> np.ndarray:
    """Which nodes each node attends: itself and its ancestors.

    Shapes: B trees, M nodes. parents [B, M] int, padded with -1. Returns [B, M, M] bool, row attends column.
    """
    num_trees, num_nodes = parents.shape
    attends = np.tile(np.eye(num_nodes, dtype=bool), (num_trees, 1, 1))
    trees = np.arange(num_trees)
    for node in range(num_nodes):
        attends[:, node] |= attends[trees, parents[:, node]] & (parents[:, node] >= 0)[:, None]
    return attends


def prune(draft: Draft, *, max_depth: int, max_nodes: int) -> Draft:
    """The first max_nodes nodes at most max_depth levels below the pending token. Never loses a kept node's parent."""
    if len(draft.parents) <= min(max_depth, max_nodes):  # no tree is deeper than it has nodes
        return draft
    levels = depths(draft.parents)
    kept = [node for node, level in enumerate(levels) if level <= max_depth][:max_nodes]
    place = {node: index for index, node in enumerate(kept)} | {-1: -1}
    return Draft(
        token_ids=[draft.token_ids[node] for node in kept],
        parents=[place[draft.parents[node]] for node in kept],
    )


def verify(draft_ids: Sequence[int], parents: Sequence[int], target_ids: Sequence[int]) -> list[int]:
    """Walk the draft tree along the tokens the target sampled; return the nodes passed, root first.

    A node is kept when its parent is kept and its token equals the target's at the parent. Shapes: draft_ids and
    parents [M], target_ids [M + 1]: the target's token after the pending token, then after each node.
    Committed are target_ids[0] and target_ids[1 + node] for every kept node.
    Source: SpecInfer (arXiv 2305.09781) sec. 4, with the target's token drawn first (DESIGN.md, idea 2).
    """
    path: list[int] = []
    reached = -1
    # parents stand before children, so one pass meets the path in order
    for node, parent in enumerate(parents):
        if parent == reached and draft_ids[node] == target_ids[reached + 1]:
            reached = node
            path.append(node)
    return path

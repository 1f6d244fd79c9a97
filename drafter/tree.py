"""The tree of most probable continuations of a few matches, best nodes first."""

from collections.abc import Sequence
from heapq import heappop, heappush

from drafter.types import Draft

# A place whose past agrees with the sequence's: (text, index of the token that followed there, tokens agreeing).
Match = tuple[list[int], int, int]

# A match votes for what followed it with its length; ESCAPE is the weight of "none of them": prediction by partial
# matching (Cleary and Witten 1984) with the orders pooled. 8 and a power of 1 for the length are the most likely of
# 0.5..16 and 0.5..3 on rollouts of SmolLM2-135M-Instruct (T=1, arithmetic), with and without an earlier epoch.
ESCAPE = 8.0


def grow(matches: Sequence[Match], *, depth: int, top_k: int, num_verify: int, min_probability: float) -> Draft:
    """Draft at most num_verify nodes, depth levels and top_k children a node, in the order of their joint probability.

    matches: those to prefer in a tie first. A node's probability is its parent's times its share of the votes of the
    matches that agree with the path so far; nodes below min_probability are not drafted.
    """
    token_ids: list[int] = []
    parents: list[int] = []
    # order: unique, so that neither tokens nor matches are ever compared, and ties go to the node found first
    frontier: list[tuple[float, int, int, int, int, list[Match]]] = []
    order = 0
    node, level, probability = -1, 0, 1.0
    alive: Sequence[Match] = matches
    while True:
        if alive and level < depth:
            for share, token, agreeing in _children(alive)[:top_k]:
                joint = probability * share
                if joint < min_probability:
                    break
                heappush(frontier, (-joint, order, node, level + 1, token, agreeing))
                order += 1
        if not frontier or len(token_ids) == num_verify:
            return Draft(token_ids=token_ids, parents=parents)
        negative, _, parent, level, token, alive = heappop(frontier)
        probability = -negative
        node = len(token_ids)
        token_ids.append(token)
        parents.append(parent)


def _children(matches: Sequence[Match]) -> list[tuple[float, int, list[Match]]]:
    """What may follow: (share of the votes, token, the matches one token on that agree), largest share first."""
    total = ESCAPE
    votes: dict[int, float] = {}
    agreeing: dict[int, list[Match]] = {}
    for text, after, length in matches:
        total += length
        token = text[after]
        if token not in votes:
            votes[token] = 0.0
            agreeing[token] = []
        votes[token] += length
        if after + 1 < len(text):
            agreeing[token].append((text, after + 1, length + 1))
    # sorted is stable: equal shares keep the matches' order
    return sorted(
        ((vote / total, token, agreeing[token]) for token, vote in votes.items()), key=lambda child: -child[0]
    )

"""The draft tree grown from matches."""

from drafter.tree import ESCAPE, grow


def test_a_single_match_drafts_the_chain_that_followed_it() -> None:
    draft = grow([([1, 2, 3, 4, 5], 2, 2)], depth=8, top_k=1, num_verify=8, min_probability=0.0)
    assert draft.token_ids == [3, 4, 5]
    assert draft.parents == [-1, 0, 1]


def test_two_continuations_share_their_prefix_in_a_tree() -> None:
    matches = [([0, 7, 8], 1, 3), ([0, 7, 9], 1, 3)]
    draft = grow(matches, depth=4, top_k=2, num_verify=8, min_probability=0.0)
    assert draft.token_ids == [7, 8, 9]
    assert draft.parents == [-1, 0, 0]


def test_a_chain_follows_the_heavier_votes_and_a_tie_goes_to_the_first_match() -> None:
    heavier = grow([([0, 5], 1, 2), ([0, 6], 1, 3)], depth=1, top_k=1, num_verify=1, min_probability=0.0)
    assert heavier.token_ids == [6]
    tied = grow([([0, 6], 1, 2), ([0, 5], 1, 2)], depth=1, top_k=1, num_verify=1, min_probability=0.0)
    assert tied.token_ids == [6]


def test_nodes_come_by_joint_probability_when_the_budget_is_short() -> None:
    # 7 has most votes; what follows it is surer than the alternative 5
    matches = [([0, 7, 8], 1, 20), ([0, 7, 8], 1, 20), ([0, 5, 1], 1, 2)]
    draft = grow(matches, depth=4, top_k=2, num_verify=2, min_probability=0.0)
    assert draft.token_ids == [7, 8]
    assert draft.parents == [-1, 0]


def test_improbable_nodes_are_not_drafted() -> None:
    match = ([0, 7], 1, 2)
    share = 2 / (2 + ESCAPE)
    drafted = grow([match], depth=1, top_k=1, num_verify=1, min_probability=share - 1e-6)
    dropped = grow([match], depth=1, top_k=1, num_verify=1, min_probability=share + 1e-6)
    assert (drafted.token_ids, dropped.token_ids) == ([7], [])

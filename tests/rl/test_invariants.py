"""What is asserted after every step."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from rl.invariants import check_step
from rl.types import Group


@pytest.fixture
def groups(make_groups: Callable[..., list[Group]]) -> list[Group]:
    return [
        replace(group, rollouts=[replace(each, version_spans=[(7, len(each.token_ids))]) for each in group.rollouts])
        for group in make_groups()
    ]


def check(groups: list[Group], whole: list[Group], num_samples: int = 3) -> None:
    check_step(groups, [group.prompt for group in whole], num_samples=num_samples, version=7)


def test_a_whole_step_of_one_version_passes(groups: list[Group]) -> None:
    check(groups, groups)


def test_a_lost_prompt_and_a_doubled_one_are_found(groups: list[Group]) -> None:
    for broken in (groups[1:], [*groups, groups[0]]):
        with pytest.raises(AssertionError, match="lost or doubled"):
            check(broken, groups)


def test_a_sample_that_is_missing_or_there_twice_is_found(groups: list[Group]) -> None:
    first = groups[0].rollouts
    for rollouts in (first[1:], [first[0], first[0], first[2]]):
        with pytest.raises(AssertionError, match="has samples"):
            check([replace(groups[0], rollouts=rollouts), *groups[1:]], groups)


def test_another_version_and_tokens_of_none_are_found(groups: list[Group]) -> None:
    first, *others = groups[0].rollouts
    for spans in ([(6, len(first.token_ids))], [(7, len(first.token_ids) - 1)]):
        with pytest.raises(AssertionError, match="version"):
            check([replace(groups[0], rollouts=[replace(first, version_spans=spans), *others]), *groups[1:]], groups)

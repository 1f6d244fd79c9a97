"""What trying may cost is bounded by construction: whatever is hoped for, and whatever is reported."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.budget import (
    CAPTURE_CYCLES,
    CAPTURE_SHARE,
    DEAREST,
    FIRST_CAPTURES,
    LATE_CYCLES,
    PURSE_CYCLES,
    PURSE_SHARE,
    SAVED_CYCLES,
    Captures,
    Purse,
)

PLAIN_S = 1e-3


@given(st.integers(0, 2**32), st.floats(0.01, 3.0), st.integers(0, 3))
def test_whoever_always_drafts_loses_the_share_and_no_more(seed: int, loss: float, delay: int) -> None:
    """loss: in plain cycles, of each that drafts and has nothing accepted; reports come delay cycles late."""
    choices = random.Random(seed)
    purse, lost, total = Purse(), 0.0, PLAIN_S
    purse.settle(1, 0, PLAIN_S, 0.0, PLAIN_S)
    late: list[tuple[int, float]] = []
    for cycle in range(2, 2000):
        this_loss = loss * PLAIN_S * choices.uniform(0.5, 1.5)
        drafts = purse.affords(this_loss)
        if drafts:
            purse.set_aside(cycle, 1, this_loss)
        late.append((int(drafts), PLAIN_S + this_loss * drafts))
        if len(late) > delay:
            arm, seconds = late.pop(0)
            purse.settle(cycle, arm, seconds, -(seconds - PLAIN_S), PLAIN_S)
            lost, total = lost + seconds - PLAIN_S, total + seconds
    assert lost <= PURSE_CYCLES * PLAIN_S + PURSE_SHARE * total + 1e-9


def test_drafts_that_saved_time_may_lose_some_and_then_stop() -> None:
    purse = Purse()
    for cycle in range(500):
        purse.settle(cycle, 1, PLAIN_S, PLAIN_S, PLAIN_S)
    lost = 0
    for cycle in range(500, 600):
        if purse.affords(PLAIN_S):
            purse.set_aside(cycle, 1, PLAIN_S)
            purse.settle(cycle, 1, 2 * PLAIN_S, -PLAIN_S, PLAIN_S)
            lost += 1
        else:
            purse.settle(cycle, 0, PLAIN_S, 0.0, PLAIN_S)
    assert SAVED_CYCLES - 1 <= lost <= SAVED_CYCLES + 1


def test_what_was_set_aside_for_a_cycle_that_never_ran_comes_back() -> None:
    purse = Purse()
    purse.settle(0, 0, PLAIN_S, 0.0, PLAIN_S)
    purse.set_aside(1, 1, 1.9 * PLAIN_S)
    assert not purse.affords(PLAIN_S)
    purse.settle(2 + LATE_CYCLES, 0, PLAIN_S, 0.0, PLAIN_S)
    assert purse.affords(PLAIN_S)


def test_captures_cost_what_was_seen_but_for_the_dearest_which_compiled() -> None:
    captures = Captures()
    captures.observe((0, 8), 2.0, PLAIN_S, 0.0, PLAIN_S)
    assert captures.cost_s == pytest.approx(CAPTURE_CYCLES * PLAIN_S)
    for rows in (4, 2, 1):
        captures.observe((0, rows), 0.01, PLAIN_S, 0.0, PLAIN_S)
    assert captures.cost_s == pytest.approx((CAPTURE_CYCLES * PLAIN_S + 3 * 0.01) / 4)
    assert captures.ready((0, 4)) and not captures.ready((1, 4))


def test_where_nothing_is_captured_everything_is_ready() -> None:
    captures = Captures()
    assert not captures.ready((1, 4))
    captures.observe((0, 4), 0.0, PLAIN_S, 0.0, PLAIN_S)
    assert captures.ready((1, 4)) and captures.cost_s == 0.0 and captures.affords()


def test_graphs_that_are_captured_again_say_that_others_may_be_gone_too() -> None:
    captures = Captures()
    for place in ((1, 4), (1, 8)):
        captures.observe(place, 0.01, PLAIN_S, 0.0, PLAIN_S)
    captures.observe((1, 4), 0.01, PLAIN_S, 0.0, PLAIN_S)
    assert captures.ready((1, 4)) and not captures.ready((1, 8))


def test_graphs_that_were_there_all_along_do_not_make_others_cheap() -> None:
    captures = Captures()
    for rows in (1, 2, 4, 8):
        captures.observe((1, rows), 0.01, PLAIN_S, 0.0, PLAIN_S)
    captures.observe((1, 8), 0.01, PLAIN_S, 0.0, PLAIN_S)  # for another temperature: the rest are still there
    cost_s = captures.cost_s
    for rows in (1, 2, 4) * 10:
        captures.observe((1, rows), 0.0, PLAIN_S, 0.0, PLAIN_S)
    assert captures.cost_s == pytest.approx(cost_s)
    assert captures.ready((1, 4)) and not captures.ready((1, 16))


def test_captures_for_nothing_take_their_share_and_no_more() -> None:
    captures, spent, total = Captures(), 0.0, 0.0
    for place in range(20_000):
        if captures.affords():
            captures.observe((1, place), 0.025, PLAIN_S, 0.0, PLAIN_S)
            spent += 0.025
        else:
            captures.observe((0, 8), 0.0, PLAIN_S, 0.0, PLAIN_S)
        total += PLAIN_S
    assert spent <= CAPTURE_SHARE * total + (FIRST_CAPTURES + DEAREST) * 0.025
    assert captures.spent_s == pytest.approx(spent)

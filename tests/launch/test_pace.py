"""What looks at workers tell of rates, lengths and moves."""

import pytest

from launch.pace import MOVE_S, Look, Pace

BASE_S, EACH_S = 0.01, 0.001


def look(at_s: float, *lengths: int) -> Look:
    return Look(at_s, {("p", sample): length for sample, length in enumerate(lengths)})


def seconds(running: int, tokens: int) -> float:
    return tokens * (BASE_S + EACH_S * running)


def taught() -> Pace:
    """A pace that has seen one and four sequences run."""
    pace = Pace(slots=8)
    pace.observe(look(0, 5), look(seconds(1, 20), 25))
    pace.observe(look(3, 1, 1, 2, 3), look(3 + seconds(4, 10), 11, 11, 12, 13))
    return pace


def test_nothing_is_known_before_two_looks() -> None:
    assert Pace(slots=8).costs() is None


def test_the_rate_is_that_of_the_sequences_that_grew() -> None:
    costs = taught().costs()
    assert costs is not None and costs.slots == 8
    assert costs.rate.base_s == pytest.approx(BASE_S) and costs.rate.each_s == pytest.approx(EACH_S)


def test_sequences_that_wait_or_came_later_are_no_part_of_a_rate() -> None:
    pace = Pace(slots=2)
    pace.observe(look(0, 5, 5, 0), look(seconds(2, 20), 25, 25, 0, 30))
    costs = pace.costs()
    assert costs is not None and costs.rate.seconds(2) == pytest.approx(BASE_S + 2 * EACH_S)


def test_looks_that_say_nothing_change_nothing() -> None:
    pace = taught()
    before = pace.costs()
    pace.observe(look(0, 5), look(9, 5))
    pace.observe(look(0, 5), look(1e-6, 6))
    assert pace.costs() == before


def test_what_a_takeover_did_not_sample_was_its_move() -> None:
    pace = taught()
    for _ in range(20):
        pace.moved(look(0, 40, 50), look(0.3 + seconds(2, 10), 50, 60))
    costs = pace.costs()
    assert costs is not None and costs.move_s == pytest.approx(0.3, abs=1e-3) and costs.move_s != MOVE_S


def test_a_load_is_given_up_from_its_shortest_response() -> None:
    pace = taught()
    for length in (20, 100):
        pace.finished(length)
    load = pace.load(3, look(0, 50, 10, 0).lengths, limit=120)
    assert load.worker == 3
    assert load.remaining == pytest.approx((60, 50, 50))  # of 20 and 100: what is left past 0, 10 and 50

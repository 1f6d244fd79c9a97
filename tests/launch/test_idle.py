"""What an idle worker is told to do: the sums behind it, and what a whole step makes of the advice."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.idle import (
    Costs,
    DecodeRate,
    Learn,
    Load,
    Rest,
    Score,
    TakeOver,
    counts,
    decide,
    expected_remaining,
    finish_s,
    fit_rate,
)

rates = st.builds(DecodeRate, base_s=st.floats(1e-3, 1e-1), each_s=st.floats(0, 1e-2))
remaining = st.lists(st.integers(1, 2000).map(float), max_size=40)


def costs(rate: DecodeRate, *, move_s: float = 0.5, slots: int = 64) -> Costs:
    return Costs(rate=rate, move_s=move_s, slots=slots)


def stepped(tokens: Sequence[float], given: Costs) -> float:
    """finish_s by its definition: token after token."""
    waiting, running, seconds = [int(count) for count in tokens], [], 0.0
    while waiting or running:
        while waiting and len(running) < given.slots:
            running.append(waiting.pop(0))
        seconds += given.rate.seconds(len(running))
        running = [left - 1 for left in running if left > 1]
    return seconds


@given(st.lists(st.integers(1, 30).map(float), max_size=12), rates, st.integers(1, 5))
def test_the_time_to_finish_is_that_of_decoding_token_by_token(
    tokens: list[float], rate: DecodeRate, slots: int
) -> None:
    given = costs(rate, slots=slots)
    assert finish_s(tokens, given) == pytest.approx(stepped(tokens, given))


@given(remaining, rates, st.booleans())
def test_a_takeover_is_of_some_that_are_there_and_pays_for_its_move(
    tokens: list[float], rate: DecodeRate, can_learn: bool
) -> None:
    given = costs(rate)
    task = decide([Load(3, tuple(tokens))], given, can_learn=can_learn, can_score=False)
    if not isinstance(task, TakeOver):
        assert task == (Learn() if can_learn else Rest())
        return
    assert task.source == 3 and 1 <= task.count <= len(tokens) // 2
    moved, kept = tokens[: task.count], tokens[task.count :]
    assert max(given.move_s + finish_s(moved, given), finish_s(kept, given)) < finish_s(tokens, given)


@given(st.lists(remaining, min_size=1, max_size=4), rates)
def test_only_the_worker_that_would_finish_last_is_relieved(loads: list[list[float]], rate: DecodeRate) -> None:
    given = costs(rate)
    busy = [Load(number, tuple(tokens)) for number, tokens in enumerate(loads)]
    task = decide(busy, given, can_learn=False, can_score=False)
    if isinstance(task, TakeOver):
        finish = [finish_s(load.remaining, given) for load in busy]
        assert finish[task.source] == max(finish)


def test_one_straggler_leaves_everybody_else_to_learn() -> None:
    given = costs(DecodeRate(0.01, 0.0001))
    assert decide([Load(0, (500.0,))], given, can_learn=True, can_score=False) == Learn()
    assert decide([Load(0, (500.0,))], given, can_learn=False, can_score=False) == Rest()


def test_what_is_finished_is_scored_before_anybody_learns_and_after_what_ends_the_step_sooner() -> None:
    given = costs(DecodeRate(0.01, 0.0001))
    for can_learn in (True, False):
        assert decide([Load(0, (500.0,))], given, can_learn=can_learn, can_score=True) == Score()
    relief = costs(DecodeRate(0.01, 0.0), slots=4)
    assert decide([Load(1, (400.0,) * 8)], relief, can_learn=True, can_score=True) == TakeOver(1, 4)


def test_sequences_that_wait_for_a_slot_are_taken_over_and_those_that_cost_nothing_are_not() -> None:
    waiting = costs(DecodeRate(0.01, 0.0), slots=4)
    assert decide([Load(1, (400.0,) * 8)], waiting, can_learn=True, can_score=False) == TakeOver(1, 4)
    together = costs(DecodeRate(0.01, 0.0), slots=64)
    assert decide([Load(1, (400.0,) * 8)], together, can_learn=True, can_score=False) == Learn()


def test_nothing_is_moved_before_anything_was_measured() -> None:
    assert decide([Load(0, (900.0,) * 64)], None, can_learn=True, can_score=False) == Learn()
    assert decide([Load(0, (900.0,) * 64)], None, can_learn=False, can_score=False) == Rest()


def test_a_move_that_takes_longer_than_it_saves_is_not_made() -> None:
    rate = DecodeRate(0.0, 0.001)
    assert isinstance(
        decide([Load(0, (100.0,) * 16)], costs(rate, move_s=0.1), can_learn=False, can_score=False), TakeOver
    )
    assert decide([Load(0, (100.0,) * 16)], costs(rate, move_s=2.0), can_learn=False, can_score=False) == Rest()


@given(st.integers(0, 500))
def test_at_most_half_is_considered_and_every_number_while_they_are_few(total: int) -> None:
    considered = counts(total)
    assert considered == sorted(set(considered))
    assert all(1 <= count <= total // 2 for count in considered)
    assert set(range(1, min(total // 2, 8) + 1)) <= set(considered)
    assert total < 2 or total // 2 in considered


@given(st.integers(0, 100), st.lists(st.integers(1, 100)))
def test_what_remains_is_neither_negative_nor_past_the_limit(length: int, finished: list[int]) -> None:
    assert 0 <= expected_remaining(length, finished, 100) <= 100 - length


def test_what_remains_is_what_remained_of_those_that_came_as_far() -> None:
    assert expected_remaining(10, [5, 20, 40], 1000) == 20
    assert expected_remaining(50, [5, 20, 40], 1000) == 50  # nobody came as far: as much again
    assert expected_remaining(50, [5, 20, 40], 60) == 10


@given(rates, st.lists(st.integers(1, 256), min_size=2, max_size=8, unique=True))
def test_a_rate_is_found_again_from_what_it_produced(rate: DecodeRate, batches: list[int]) -> None:
    fitted = fit_rate([(batch, rate.seconds(batch)) for batch in batches])
    assert fitted is not None
    assert fitted.base_s == pytest.approx(rate.base_s, rel=1e-6, abs=1e-9)
    assert fitted.each_s == pytest.approx(rate.each_s, rel=1e-6, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 256), st.floats(1e-4, 1)), min_size=1, max_size=8))
def test_no_part_of_a_fitted_rate_is_negative(samples: list[tuple[int, float]]) -> None:
    fitted = fit_rate(samples)
    assert fitted is not None
    assert fitted.base_s >= -1e-12 and fitted.each_s >= 0
    assert fit_rate([]) is None


class Simulation:
    """Workers that sample sequences of given true lengths; the idle are asked to decide at every tick."""

    def __init__(self, lengths: list[list[int]], given: Costs, *, can_learn: bool) -> None:
        self.given, self.can_learn = given, can_learn
        self.now = 0.0
        self.left = [[float(length) for length in worker] for worker in lengths]
        self.total = [list(worker) for worker in self.left]
        self.held_until = [0.0] * len(lengths)  # while what it took over is on its way
        self.moves = 0
        self.finished: list[int] = []

    def run(self, tick: float, limit: int) -> float:
        while any(self.left):
            for worker in [number for number, left in enumerate(self.left) if not left]:
                self.ask(worker, limit)
            self.advance(tick)
        return self.now

    def ask(self, worker: int, limit: int) -> None:
        busy = []
        for other, left in enumerate(self.left):
            said = sorted(int(all_ - rest) for all_, rest in zip(self.total[other], left, strict=True))
            if left and self.held_until[other] <= self.now:
                expected = tuple(expected_remaining(length, self.finished, limit) for length in said)
                busy.append(Load(other, expected))
        task = decide(busy, self.given, can_learn=self.can_learn, can_score=False)
        if isinstance(task, TakeOver):
            source = task.source
            order = sorted(range(len(self.left[source])), key=lambda at: self.total[source][at] - self.left[source][at])
            taken = set(order[: task.count])
            for here in (self.left, self.total):
                here[worker] = [value for at, value in enumerate(here[source]) if at in taken]
                here[source] = [value for at, value in enumerate(here[source]) if at not in taken]
            self.held_until[worker] = self.now + self.given.move_s
            self.moves += 1

    def advance(self, seconds: float) -> None:
        for worker, left in enumerate(self.left):
            time = seconds - max(0.0, self.held_until[worker] - self.now)
            while left and time > 0:
                rate = self.given.rate.seconds(len(left))
                step = min(min(left), time / rate)
                time -= step * rate
                left[:] = [rest - step for rest in left]
                done = [at for at, rest in enumerate(left) if rest <= 1e-9]
                self.finished += [int(self.total[worker][at]) for at in done]
                for at in reversed(done):
                    del left[at], self.total[worker][at]
        self.now += seconds


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 4), rates, st.booleans())
def test_a_step_ends_no_later_for_the_advice_than_its_moves_took(
    seed: int, workers: int, rate: DecodeRate, can_learn: bool
) -> None:
    source, tick, limit = random.Random(seed), 0.5, 2000
    lengths = [
        [min(limit, int(source.paretovariate(1.0) * 20)) for _ in range(source.randrange(1, 24))]
        for _ in range(workers)
    ]
    given = costs(rate, move_s=0.2, slots=64)
    alone = max(finish_s([float(length) for length in worker], given) for worker in lengths)
    simulation = Simulation(lengths, given, can_learn=can_learn)
    seconds = simulation.run(tick, limit)
    assert sorted(simulation.finished) == sorted(length for worker in lengths for length in worker)
    assert seconds <= alone + simulation.moves * given.move_s + tick


def test_advice_shortens_a_lopsided_step() -> None:
    given = costs(DecodeRate(0.005, 0.001), move_s=0.2)
    lengths = [[400] * 48, [40] * 4]
    alone = max(finish_s([float(length) for length in worker], given) for worker in lengths)
    assert Simulation(lengths, given, can_learn=True).run(0.1, 400) < 0.75 * alone

"""A fleet of scripted workers: who samples what, who learns, and what becomes of it all when workers are lost."""

import asyncio
import random
import re
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from configs.errors import DataError, ResourceError
from launch import ledger, scoring, shift
from launch.fleet import Fleet, WorkerLostError
from launch.idle import Learn, Rest, TakeOver, Task, decide
from launch.ledger import IdleReport, Ledger
from launch.scoring import Scoring
from launch.shift import sample
from rollout.types import Activity, Partial, Prompt, Rollout, Sampling, SpecStats

Key = tuple[str, int]
SAMPLING = Sampling(num_samples=2, max_new_tokens=100, stop_token_ids=(), seed=0, step=0)
NOTHING = SpecStats(forwards=0, proposed=0, accepted=0)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"p{number}", token_ids=[1], answer="") for number in range(count)]


def keys(count: int) -> set[Key]:
    return {(f"p{number}", sample) for number in range(count) for sample in range(SAMPLING.num_samples)}


class Scripted:
    """A worker that finishes a sequence, of as many tokens as it has, when it is told to."""

    def __init__(self) -> None:
        self.sequences: dict[Key, Partial] = {}
        self.orders: asyncio.Queue[Key | Exception | None] = asyncio.Queue()  # None: look again
        self.sampling = asyncio.Event()
        self.is_learning = asyncio.Event()
        self.away: dict[int, asyncio.Future[float]] = {}
        self.scored: list[Key] = []
        self.may_score = asyncio.Event()
        self.may_score.set()
        self.closed = 0
        self.dead: Exception | None = None

    def check(self) -> None:
        if self.dead is not None:
            raise self.dead

    def kill(self) -> None:
        self.dead = WorkerLostError("killed")
        self.orders.put_nowait(self.dead)
        for turn in self.away.values():
            if not turn.done():
                turn.set_exception(self.dead)

    def finish(self, *wanted: Key) -> None:
        for key in wanted:
            self.orders.put_nowait(key)

    def finish_all(self) -> None:
        self.finish(*self.sequences)

    async def generate(
        self, given: Sequence[Prompt], sampling: Sampling, partials: Sequence[Partial]
    ) -> AsyncGenerator[Rollout]:
        self.check()
        assert not self.sequences, "one generate at a time"
        new = [Partial(p, s, [], [], [], NOTHING) for p in given for s in range(sampling.num_samples)]
        self.sequences = {(each.prompt.id, each.sample): each for each in (*partials, *new)}
        self.sampling.set()
        try:
            while self.sequences:
                order = await self.orders.get()
                if isinstance(order, Exception):
                    raise order
                if order not in self.sequences:
                    continue
                done = self.sequences.pop(order)
                tokens = [*done.token_ids, 7]
                yield Rollout(*order, tokens, [0.0] * len(tokens), [(0, len(tokens))], "stop", NOTHING)
        finally:
            self.closed += 1
            self.sampling.clear()
            self.sequences = {}

    def grow(self, tokens: int) -> None:
        """Sample so many tokens of everything."""
        for key, each in self.sequences.items():
            said = [*each.token_ids, *[5] * tokens]
            self.sequences[key] = Partial(each.prompt, each.sample, said, [0.0] * len(said), [], NOTHING)

    async def surrender(self, count: int) -> list[Partial]:
        self.check()
        chosen = sorted(self.sequences, key=lambda key: len(self.sequences[key].token_ids))[:count]
        self.orders.put_nowait(None)
        return [self.sequences.pop(key) for key in chosen]

    async def adopt(self, partials: Sequence[Partial]) -> bool:
        self.check()
        if not self.sequences:
            return False
        self.sequences |= {(each.prompt.id, each.sample): each for each in partials}
        return True

    async def progress(self) -> dict[Key, int]:
        self.check()
        return {key: len(each.token_ids) for key, each in self.sequences.items()}

    async def activity(self) -> Activity:
        self.check()
        return Activity(step=0, running=len(self.sequences))

    async def learn(self, turn: int) -> float:
        self.check()
        assert not self.sequences, "it samples and learns at once"
        ended = self.away.setdefault(turn, asyncio.get_running_loop().create_future())
        self.is_learning.set()
        try:
            return await ended
        finally:
            self.is_learning.clear()

    async def score(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> dict[Key, list[float]]:
        self.check()
        assert not self.sequences and not self.is_learning.is_set(), "it does two things at once"
        await self.may_score.wait()
        self.check()
        keys = [(prompt.id, rollout.sample) for prompt, rollout in pairs]
        self.scored += keys
        return {key: [-1.0] for key in keys}

    async def call_away(self, turn: int) -> None:
        self.check()
        ended = self.away.setdefault(turn, asyncio.get_running_loop().create_future())
        if not ended.done():
            ended.set_result(0.001)


class Advice:
    """A decide that says what it is told to, and learns or rests after that."""

    def __init__(self, *tasks: Task) -> None:
        self.tasks = list(tasks)

    def __call__(self, busy: Sequence[Any], costs: Any, *, can_learn: bool, can_score: bool) -> Task:
        known = {load.worker for load in busy}
        if self.tasks and isinstance(task := self.tasks[0], TakeOver) and task.source not in known:
            return Rest()
        return self.tasks.pop(0) if self.tasks else Learn() if can_learn else Rest()


class Call:
    """A generate call under way: what has arrived of it."""

    def __init__(self, fleet: Fleet, number: int, sampling: Sampling = SAMPLING) -> None:
        self.arrived: list[Rollout] = []
        self.changed = asyncio.Condition()
        self.task = asyncio.create_task(self.collect(fleet, number, sampling))

    async def collect(self, fleet: Fleet, number: int, sampling: Sampling) -> None:
        async with aclosing(sample(fleet, prompts(number), sampling)) as rollouts:
            async for rollout in rollouts:
                self.arrived.append(rollout)

    @property
    def keys(self) -> list[Key]:
        return [(rollout.prompt_id, rollout.sample) for rollout in self.arrived]


class Clock:
    """Time that passes where everybody waits, and a microsecond whenever somebody looks."""

    seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-6
        return self.seconds


CLOCK = Clock()


class Skipping(selectors.DefaultSelector):
    """Waits for nothing: the time that would have passed has passed at once."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "everybody waits for ever"
            CLOCK.seconds += max(0.0, timeout)
        return found


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop by that clock: however busy the machine is, nobody is late."""

    def __init__(self) -> None:
        super().__init__(Skipping())

    def time(self) -> float:
        return CLOCK()


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured goes by the same clock."""
    for module in (shift, ledger, scoring):
        monkeypatch.setattr(module, "perf_counter", CLOCK)


def skipping(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run without waiting."""
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(main)


async def until(true: Callable[[], bool]) -> None:
    """Let everything else run until so."""
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    assert true()


def make(count: int, *tasks: Task, learns: bool = True) -> tuple[list[Scripted], Fleet]:
    workers = [Scripted() for _ in range(count)]
    return workers, Fleet(workers, slots=64, learns=learns, decide=Advice(*tasks))


def ends(call: Call) -> Any:
    return asyncio.wait_for(call.task, 10)


def test_prompts_are_spread_and_every_rollout_arrives_once() -> None:
    async def run() -> None:
        workers, fleet = make(2, learns=False)
        call = Call(fleet, 5)
        await until(lambda: all(worker.sequences for worker in workers))
        assert {key[0] for key in workers[0].sequences} == {"p0", "p2", "p4"}
        for worker in workers:
            worker.finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(5))

    skipping(run())


def test_a_freed_worker_goes_on_with_what_it_takes_over() -> None:
    async def run() -> None:
        workers, fleet = make(2, TakeOver(source=0, count=1))
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[0].grow(3)
        workers[1].finish_all()
        await until(lambda: bool(workers[1].sequences) and workers[1].closed == 1)
        assert len(workers[0].sequences) == len(workers[1].sequences) == 1
        assert [len(each.token_ids) for each in workers[1].sequences.values()] == [3]
        for worker in workers:
            worker.finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(2))
        assert fleet.report.num_moved == 1 and fleet.report.sampled_s > 0

    skipping(run())


def test_a_freed_worker_learns_until_the_last_rollout_is_there() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        workers[0].finish_all()
        await ends(call)
        assert not workers[1].is_learning.is_set()
        assert 0 < fleet.report.learned_s <= fleet.report.idle_s

    skipping(run())


def test_workers_are_heard_while_they_sample_and_once_more_at_the_end() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 2)
        await until(lambda: len(fleet.heard) == 2)
        assert [each.running for each in fleet.activity()] == [2, 2]
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        await asyncio.sleep(3.0)
        assert [each.running for each in fleet.activity()] == [2, 0], "who has ended is not drawn on"
        workers[0].finish_all()
        await ends(call)
        assert [each.running for each in fleet.activity()] == [0, 0]
        (lesson,) = fleet.activity()[1].spans
        assert lesson.kind == "drafter" and lesson.end - lesson.begin == pytest.approx(0.001, abs=1e-5)

    skipping(run())


def test_a_worker_is_asked_often_at_first_and_twice_a_second_later() -> None:
    async def run() -> None:
        workers, fleet = make(1)
        asked: list[float] = []
        clock = asyncio.get_running_loop().time
        answer = workers[0].activity

        async def activity() -> Activity:
            asked.append(clock() - begun)
            return await answer()

        workers[0].activity = activity  # type: ignore[method-assign]
        begun = clock()
        call = Call(fleet, 1)
        await asyncio.sleep(22.0)
        assert len([at for at in asked if at <= 0.5]) >= 8, "a call may be over by then"
        assert 38 <= len([at for at in asked if at > 2.0]) <= 41
        workers[0].finish_all()
        await ends(call)

    skipping(run())


def test_an_idle_worker_scores_what_is_finished_before_it_learns() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        fleet.scores = True
        fleet.decide = decide
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        first = list(workers[1].sequences)
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        assert sorted(workers[1].scored) == sorted(first)
        workers[0].finish_all()
        await ends(call)
        assert fleet.references == {key: [-1.0] for key in first}, "the rest is left to training"
        assert 0 < fleet.report.scored_s <= fleet.report.idle_s

    skipping(run())


def test_a_worker_lost_while_it_scores_costs_its_scores_alone() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        fleet.scores, fleet.decide = True, decide
        workers[1].may_score.clear()
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await until(lambda: workers[1].closed == 1 and not workers[1].sequences)
        workers[1].kill()
        workers[1].may_score.set()
        await until(lambda: 1 in fleet.lost)
        workers[0].finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(2)) and fleet.references == {}

    skipping(run())


def test_scores_that_come_late_are_not_taken_for_the_next_calls() -> None:
    """Its rollouts have the same names, and other tokens."""

    async def run() -> None:
        workers, fleet = make(1)
        fleet.scores = True
        given = {prompt.id: prompt for prompt in prompts(1)}

        def scoring() -> Scoring:
            return Scoring(fleet, SAMPLING, given, Ledger(), lambda number, error: None)

        late = scoring()
        late.add(Rollout("p0", 0, [7], [0.0], [(0, 1)], "stop", NOTHING))
        workers[0].may_score.clear()
        late.begin(0)
        task = late.under_way[0]
        await asyncio.sleep(0)
        scoring()
        references = fleet.references
        workers[0].may_score.set()
        await task
        assert workers[0].scored == [("p0", 0)]
        assert fleet.references is references and not references

    skipping(run())


def test_a_score_that_fails_is_left_to_training(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        workers, fleet = make(2)
        fleet.scores, fleet.decide = True, decide

        async def fails(pairs: Sequence[tuple[Prompt, Rollout]]) -> dict[Key, list[float]]:
            raise RuntimeError("out of memory")

        workers[1].score = fails  # type: ignore[method-assign]
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        workers[0].finish_all()
        await ends(call)
        assert fleet.references == {} and not fleet.lost

    skipping(run())
    assert caplog.text.count("scores no rollouts") == 1


def test_evaluations_are_not_scored() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        fleet.scores, fleet.decide = True, decide
        call = Call(fleet, 2, replace(SAMPLING, temperature=0.0))
        await until(lambda: all(worker.sequences for worker in workers))
        for worker in workers[::-1]:
            worker.finish_all()
        await ends(call)
        assert not workers[0].scored and not workers[1].scored

    skipping(run())


def test_a_learner_is_called_away_to_take_over() -> None:
    async def run() -> None:
        workers, fleet = make(2, Learn(), TakeOver(source=0, count=1))
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        await until(lambda: bool(workers[1].sequences))
        assert not workers[1].is_learning.is_set()
        for worker in workers:
            worker.finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(2))

    skipping(run())


def test_a_worker_without_prompts_is_idle_from_the_start() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 1)
        await until(workers[1].is_learning.is_set)
        workers[0].finish_all()
        await ends(call)
        assert fleet.report.idle_s == pytest.approx(fleet.report.seconds)

    skipping(run())


def test_nobody_learns_while_others_evaluate() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 1, replace(SAMPLING, temperature=0.0))
        await until(lambda: bool(workers[0].sequences))
        workers[0].finish_all()
        await ends(call)
        assert fleet.num_turns == 0 and fleet.report.idle_s > 0

    skipping(run())


def test_what_a_lost_worker_owed_is_sampled_by_an_idle_one() -> None:
    async def run() -> None:
        workers, fleet = make(3)
        call = Call(fleet, 3)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[2].finish_all()
        await until(workers[2].is_learning.is_set)
        workers[1].finish(("p1", 0))
        workers[1].kill()
        await until(lambda: bool(workers[2].sequences))
        assert not workers[2].is_learning.is_set()
        assert set(workers[2].sequences) <= {("p1", 0), ("p1", 1)}
        for worker in (workers[0], workers[2]):
            worker.finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(3))
        assert list(fleet.lost) == [1]

    skipping(run())


def test_what_a_lost_worker_owed_is_adopted_where_nobody_is_idle() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].kill()
        await until(lambda: set(workers[0].sequences) == keys(2))
        workers[0].finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(2))

    skipping(run())


def test_a_worker_killed_while_it_learns_harms_no_rollout_and_the_next_step_does_without_it() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        workers[1].kill()
        await until(lambda: 1 in fleet.lost)
        workers[0].finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(2))
        second = Call(fleet, 2)
        await until(lambda: set(workers[0].sequences) == keys(2))
        workers[0].finish_all()
        await ends(second)
        assert sorted(second.keys) == sorted(keys(2))

    skipping(run())


@pytest.mark.parametrize("victim", [0, 1], ids=["the one that gives", "the one that takes"])
def test_a_worker_lost_during_a_takeover_costs_no_rollout(victim: int) -> None:
    async def run() -> None:
        workers, fleet = make(2, TakeOver(source=0, count=1))
        surrender = workers[0].surrender

        async def surrender_and_die(count: int) -> list[Partial]:
            partials = await surrender(count)
            workers[victim].kill()
            workers[0].check()
            return partials

        workers[0].surrender = surrender_and_die  # type: ignore[method-assign]
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        survivor = workers[1 - victim]
        await until(lambda: set(survivor.sequences) == {("p0", 0), ("p0", 1)})
        survivor.finish_all()
        await ends(call)
        assert sorted(call.keys) == sorted(keys(2))

    skipping(run())


def test_without_workers_a_step_ends_with_a_reason() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        for worker in workers:
            worker.kill()
        with pytest.raises(ResourceError, match="no worker is left"):
            await ends(call)
        with pytest.raises(ResourceError, match="no worker is left"):
            await ends(Call(fleet, 2))

    skipping(run())


def test_a_learner_that_fails_is_not_asked_again_and_rollouts_go_on(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        workers, fleet = make(2)
        turns: list[int] = []

        async def learn(turn: int) -> float:
            turns.append(turn)
            raise RuntimeError("out of memory")

        workers[1].learn = learn  # type: ignore[method-assign]
        call = Call(fleet, 1)
        await until(lambda: bool(turns) and bool(workers[0].sequences))
        workers[0].finish_all()
        await ends(call)
        assert len(turns) == 1 and not fleet.lost
        assert "out of memory" in caplog.text

    skipping(run())


def test_a_workers_error_ends_the_call_and_everything_under_way() -> None:
    async def run() -> None:
        workers, fleet = make(3)
        call = Call(fleet, 3)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[2].finish_all()
        await until(workers[2].is_learning.is_set)
        workers[1].orders.put_nowait(DataError("bad row"))
        with pytest.raises(DataError, match="bad row"):
            await ends(call)
        assert [worker.closed for worker in workers] == [1, 1, 1]
        assert not workers[2].is_learning.is_set()

    skipping(run())


def test_a_call_left_early_leaves_nothing_under_way() -> None:
    async def run() -> None:
        workers, fleet = make(3)
        rollouts = sample(fleet, prompts(2), SAMPLING)
        first = asyncio.ensure_future(anext(rollouts))
        await until(lambda: bool(workers[0].sequences) and workers[2].is_learning.is_set())
        workers[0].finish(("p0", 0))
        await first
        await rollouts.aclose()
        assert [worker.closed for worker in workers] == [1, 1, 0]
        assert not workers[2].is_learning.is_set()

    skipping(run())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is found out soon."""
    for name in ("DISMISS_S", "COMPILE_S", "WATCH_S"):
        monkeypatch.setattr(shift, name, 0.2)


async def silence(*_: Any) -> Any:
    """An answer that never comes."""
    await asyncio.Event().wait()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("tasks", [(), (TakeOver(source=0, count=1),)], ids=["progress", "surrender"])
def test_a_worker_that_hangs_is_named_and_another_samples_what_it_owed(
    tasks: tuple[Task, ...],
) -> None:
    async def run() -> None:
        workers, fleet = make(2, *tasks)
        call = "surrender" if tasks else "progress"
        setattr(workers[0], call, silence)
        under_way = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[0].grow(3)
        workers[1].finish_all()
        while 0 not in fleet.lost or not workers[1].sequences:
            await asyncio.sleep(0.01)
        assert re.search(f"worker 0 .* {call} for 0.2 s", str(fleet.lost[0]))
        workers[1].finish_all()
        await ends(under_way)
        assert sorted(under_way.keys) == sorted(keys(2))
        assert workers[0].closed == 1  # the stream of the one that hangs was given up

    skipping(run())


@pytest.mark.usefixtures("hasty")
def test_a_call_whose_workers_all_hang_ends_with_a_reason() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        for worker in workers:
            worker.progress = silence  # type: ignore[method-assign]
        with pytest.raises(ResourceError, match="no worker is left.* worker 0 .*progress"):
            await ends(Call(fleet, 2))

    skipping(run())


@pytest.mark.usefixtures("hasty")
def test_a_learner_that_hangs_keeps_no_rollout_waiting() -> None:
    async def run() -> None:
        workers, fleet = make(2)
        workers[1].call_away = silence  # type: ignore[method-assign, assignment]
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await until(workers[1].is_learning.is_set)
        workers[0].finish_all()
        await ends(call)
        assert "worker 1" in str(fleet.lost[1]) and "call_away" in str(fleet.lost[1])

    skipping(run())


def test_a_worker_that_still_compiles_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "DISMISS_S", 0.05)

    async def run() -> None:
        workers, fleet = make(2, learns=False)
        compiled = asyncio.Event()
        progress = workers[0].progress

        async def answer() -> dict[Key, int]:
            await compiled.wait()
            return await progress()

        workers[0].progress = answer  # type: ignore[method-assign]
        call = Call(fleet, 2)
        await until(lambda: all(worker.sequences for worker in workers))
        workers[1].finish_all()
        await asyncio.sleep(0.2)
        compiled.set()
        workers[0].finish_all()
        await ends(call)
        assert not fleet.lost

    skipping(run())


@pytest.mark.parametrize("seed", range(20))
def test_every_rollout_arrives_once_whatever_happens(seed: int) -> None:
    """Random finishes, takeovers and deaths; the first worker is spared."""

    async def run() -> None:
        source = random.Random(seed)
        workers = [Scripted() for _ in range(4)]

        def advise(busy: Sequence[Any], costs: Any, *, can_learn: bool, can_score: bool) -> Task:
            if busy and source.random() < 0.5:
                return TakeOver(source.choice(busy).worker, source.randrange(1, 3))
            return Learn() if can_learn else Rest()

        fleet = Fleet(workers, slots=64, learns=True, decide=advise)
        call = Call(fleet, 9)
        await until(lambda: all(worker.sequences for worker in workers))
        while not call.task.done():
            worker = source.choice(workers)
            if worker.sequences and source.random() < 0.7:
                worker.finish(source.choice(list(worker.sequences)))
            elif worker is not workers[0] and source.random() < 0.01:
                worker.kill()
            for _ in range(source.randrange(6)):
                await asyncio.sleep(0)
        await ends(call)
        assert sorted(call.keys) == sorted(keys(9))
        assert all(not worker.sequences for worker in workers if worker.dead is None)

    skipping(run())


def test_no_idle_time_is_all_used() -> None:
    assert IdleReport().used == 1
    report = IdleReport(seconds=20, idle_s=10, sampled_s=3, learned_s=5, scored_s=1, num_moved=2)
    assert report.used == 0.9
    assert report.figures() == {
        "idle_seconds": 10,
        "idle_used_share": 0.9,
        "sequences_moved": 2,
        "learned_seconds": 5,
        "scored_seconds": 1,
    }

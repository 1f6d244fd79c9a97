"""One step's rollouts: who samples what, what the idle do meanwhile, and what becomes of what a lost worker owed."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from time import perf_counter, time

from launch.fleet import Fleet, WorkerLostError, silent
from launch.forecast import spread
from launch.hearing import Hearing
from launch.idle import Learn, Rest, Score, TakeOver
from launch.ledger import Ledger
from launch.pace import Key, Look
from launch.scoring import Scoring
from rollout.types import Partial, Prompt, Rollout, Sampling, Span, SpecStats

TICK_S = 0.5  # between looks at those that still sample, while somebody is idle
FIRST_TICK_S = 0.1  # until the second look, which first tells a rate
WATCH_S = 30.0  # between looks while nobody is idle: only they tell a long rollout from a worker that hangs
DISMISS_S = 60.0  # for a call to be answered, and for streams and learning to end after the last rollout
COMPILE_S = 900.0  # for the same until a worker's first rollout: it compiles and captures, and hears nothing meanwhile

log = logging.getLogger(__name__)


async def sample(fleet: Fleet, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
    """Engine.generate over a fleet: prompts go to the workers alive by how long answers are expected to get.

    Rollouts of all workers as they finish; whoever is done early takes over, learns or rests, and fleet.report tells
    at the end. Raises ResourceError once no worker is left.
    """
    shift = Shift(fleet, sampling)
    try:
        shift.begin(prompts)
        while shift.owner or not shift.arrived.empty():
            item = await shift.arrived.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        await shift.dismiss()
        fleet.report = shift.ledger.report()


class Shift:
    """One generate call of a fleet: who samples what, who learns, what has arrived."""

    def __init__(self, fleet: Fleet, sampling: Sampling) -> None:
        self.fleet = fleet
        self.sampling = sampling
        self.arrived: asyncio.Queue[Rollout | Exception] = asyncio.Queue()
        self.owner: dict[Key, int] = {}  # of every rollout that has not arrived
        self._prompts: dict[str, Prompt] = {}
        self._lengths: dict[Key, int] = {}  # of what has arrived
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._learning: dict[int, tuple[int, asyncio.Task[None]]] = {}  # the turn, and what awaits its end
        self._learned_out: set[int] = set()  # workers that found nothing more to learn, or failed to
        self._looks: dict[int, Look] = {}
        self._looked_s = perf_counter()
        self._moves: dict[int, Look] = {}  # by new owner: when sequences were asked for, and how long they were
        self._changed = asyncio.Event()
        self._director: asyncio.Task[None] | None = None
        self._hearing = Hearing(fleet)
        self.ledger = Ledger()
        self._scoring = Scoring(fleet, sampling, self._prompts, self.ledger, self._scored)

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Spread the prompts over the workers. Raises ResourceError where none is left."""
        alive = self.fleet.alive
        if not alive:
            raise self.fleet.nobody()
        self._prompts.update({prompt.id: prompt for prompt in prompts})
        for number, share in spread(prompts, self.fleet.lengths.expected(prompts), alive).items():
            keys = [(prompt.id, sample) for prompt in share for sample in range(self.sampling.num_samples)]
            self.owner |= dict.fromkeys(keys, number)
            if share:
                self._start(number, share, ())
            else:
                self.ledger.freed[number] = self.ledger.begun
        self.fleet.learned = {}
        self._director = asyncio.create_task(self._direct())
        self._hearing.begin(self._streams)

    async def dismiss(self) -> None:
        """End everything that is under way, before its result is known where rollouts are still owed."""
        if not self.owner:  # else it is done again
            self.fleet.lengths.learn(self._prompts, self._lengths)
        if self._director is not None:
            self._director.cancel()
            await asyncio.wait({self._director})
        streams = list(self._streams.items())
        for _, stream in streams:
            if self.owner:
                stream.cancel()
        await asyncio.gather(*map(self._recall, [*self._learning, *self._scoring.under_way]), self._wait(streams))
        await self._hearing.end()

    def _start(self, number: int, prompts: Sequence[Prompt], partials: Sequence[Partial]) -> None:
        assert number not in self._streams and number not in self._learning
        self._streams[number] = asyncio.create_task(self._stream(number, prompts, partials))

    async def _stream(self, number: int, prompts: Sequence[Prompt], partials: Sequence[Partial]) -> None:
        """Take what a worker samples, to the end."""
        begun = perf_counter()
        try:
            async with aclosing(self.fleet.members[number].generate(prompts, self.sampling, partials)) as rollouts:
                async for rollout in rollouts:
                    self.fleet.warm.add(number)
                    self._arrive(rollout)
        except WorkerLostError as error:
            self._lose(number, error)
        except Exception as error:
            self.arrived.put_nowait(error)
        finally:
            for known in (self._streams, self._looks, self._moves):
                known.pop(number, None)
            self.ledger.streamed(number, begun, lost=number in self.fleet.lost)
            self._changed.set()

    def _arrive(self, rollout: Rollout) -> None:
        # one that was on its way when its worker was lost is sampled twice, and is the same
        if self.owner.pop((rollout.prompt_id, rollout.sample), None) is not None:
            self.fleet.pace.finished(len(rollout.token_ids))
            self._lengths[rollout.prompt_id, rollout.sample] = len(rollout.token_ids)
            self.arrived.put_nowait(rollout)
            self.ledger.arrived()
            self._scoring.add(rollout)

    async def _direct(self) -> None:
        """Give the idle something to do, whenever somebody becomes idle and at every tick while somebody is.

        No stream has a limit of its own, for a rollout may be long: whoever does not answer how far it is, is lost.
        """
        try:
            while True:
                await self._assign()
                tick = WATCH_S
                if self._idle():
                    tick = FIRST_TICK_S if self.fleet.pace.costs() is None else TICK_S
                with suppress(TimeoutError):
                    # not wait_for: before Python 3.12 it loses a cancellation that comes with the event
                    async with asyncio.timeout(tick):
                        await self._changed.wait()
                self._changed.clear()
        except Exception as error:
            self.arrived.put_nowait(error)

    def _idle(self) -> list[int]:
        """Workers alive that sample nothing."""
        return [number for number in self.fleet.alive if number not in self._streams]

    async def _assign(self) -> None:
        """Decide for every idle worker; what lost workers owe goes first."""
        idle = self._idle()
        orphans = [key for key, number in self.owner.items() if number in self.fleet.lost]
        if orphans and not self.fleet.alive:
            raise self.fleet.nobody()
        if orphans:
            await self._rehome([self._unbegun(key) for key in orphans], idle)
            idle = self._idle()
        if self._streams and (idle or perf_counter() - self._looked_s >= WATCH_S):
            await self._look()
            for number in idle:
                await self._assign_one(number)

    async def _rehome(self, partials: Sequence[Partial], idle: Sequence[int]) -> None:
        """Give what a lost worker owed to an idle one, or else add it to what the least loaded one samples."""
        if idle:
            await self._recall(idle[0])
            self._hand_over(idle[0], partials)
            return
        owed = Counter(self.owner.values())
        number = min(self._streams, key=lambda other: owed[other])
        try:
            async with self._answer(number, "adopt"):
                adopted = await self.fleet.members[number].adopt(partials)
        except WorkerLostError as error:
            self._lose(number, error)
            return
        if adopted:
            self.owner |= {_key(partial): number for partial in partials}

    async def _assign_one(self, number: int) -> None:
        if number in self._scoring.under_way:
            return
        # what is greedy is an evaluation: the policy may have been updated since the features were made
        can_learn = self.fleet.learns and number not in self._learned_out and self.sampling.temperature > 0
        can_score = self._scoring.is_due(is_learning=number in self._learning)
        known = self._looks | self._moves
        busy = [
            self.fleet.pace.load(other, known[other].lengths, limit=self.sampling.max_new_tokens)
            for other in self._streams
            if other in known
        ]
        match self.fleet.decide(busy, self.fleet.pace.costs(), can_learn=can_learn, can_score=can_score):
            case TakeOver(source, count):
                await self._take_over(number, source, count)
            case Score():
                await self._recall(number)
                if number not in self.fleet.lost:
                    self._scoring.begin(number)
            case Learn():
                if number not in self._learning and number not in self.fleet.lost:
                    turn = self.fleet.num_turns = self.fleet.num_turns + 1
                    self._learning[number] = turn, asyncio.create_task(self._learn(number, turn))
            case Rest():
                pass

    async def _look(self) -> None:
        """See how far those are that sample."""
        self._looked_s = perf_counter()
        await asyncio.gather(*map(self._look_at, list(self._streams)))

    async def _look_at(self, number: int) -> None:
        try:
            async with self._answer(number, "progress"):
                lengths = await self.fleet.members[number].progress()
        except WorkerLostError as error:
            self._lose(number, error)
            return
        if number not in self._streams or not lengths:
            return  # it was done meanwhile, or has not begun
        look = Look(perf_counter(), lengths)
        if number in self._looks:
            self.fleet.pace.observe(self._looks[number], look)
        elif number in self._moves:
            self.fleet.pace.moved(self._moves.pop(number), look)
        self._looks[number] = look

    async def _take_over(self, number: int, source: int, count: int) -> None:
        """Continue another worker's sequences on this one, if it still has any."""
        begun = perf_counter()
        await self._recall(number)
        if number in self.fleet.lost:
            return
        try:
            async with self._answer(source, "surrender"):
                partials = await self.fleet.members[source].surrender(count)
        except WorkerLostError as error:
            self._lose(source, error)
            return
        if not partials:
            return
        self.ledger.num_moved += len(partials)
        self._hand_over(number, partials)
        taken = {_key(partial): len(partial.token_ids) for partial in partials}
        self._moves[number] = Look(begun, taken)
        if source in self._looks:
            left = {key: length for key, length in self._looks[source].lengths.items() if key not in taken}
            self._looks[source] = Look(self._looks[source].at_s, left)

    def _hand_over(self, number: int, partials: Sequence[Partial]) -> None:
        """These are the worker's now. Should it have been lost just now, they are sampled anew by another."""
        self.owner |= {_key(partial): number for partial in partials}
        if number in self.fleet.lost:
            self._changed.set()
        else:
            self._start(number, (), partials)

    def _unbegun(self, key: Key) -> Partial:
        """A rollout from its start."""
        prompt_id, sample = key
        nothing = SpecStats(forwards=0, proposed=0, accepted=0)
        return Partial(self._prompts[prompt_id], sample, token_ids=[], logprobs=[], version_spans=[], spec=nothing)

    async def _learn(self, number: int, turn: int) -> None:
        """Await the end of a turn of learning. Whatever befalls it, rollouts go on."""
        begun = perf_counter()
        try:
            trained_s = await self.fleet.members[number].learn(turn)
            self.ledger.learned(begun, trained_s)
            since = time() - (perf_counter() - begun)
            self.fleet.learned.setdefault(number, []).append(Span("drafter", since, since + trained_s))
        except WorkerLostError as error:
            self.fleet.lose(number, error)
        except Exception as error:
            log.warning("worker %d trains the drafter no more in this step: %r", self.fleet.number(number), error)
        # not called away: it has nothing to learn, or cannot
        if self._learning.pop(number, None) is not None:
            self._learned_out.add(number)
            self._changed.set()

    def _scored(self, number: int, lost: WorkerLostError | None) -> None:
        """A worker is done with what it scored, or lost."""
        if lost is not None:
            self._lose(number, lost)
        self._changed.set()

    async def _recall(self, number: int) -> None:
        """Call a worker away from learning, or wait for what it scores, if that is what it does."""
        if number in self._scoring.under_way:
            await self._wait([(number, self._scoring.under_way[number])])
        if number not in self._learning:
            return
        turn, learning = self._learning.pop(number)
        try:
            async with self._answer(number, "call_away"):
                await self.fleet.members[number].call_away(turn)
        except WorkerLostError as error:
            self._lose(number, error)
            learning.cancel()
        await self._wait([(number, learning)])

    async def _wait(self, tasks: Iterable[tuple[int, asyncio.Task[None]]]) -> None:
        """Until these workers' tasks are over; one that takes too long is given up, and its worker with it."""
        numbers = {task: number for number, task in tasks}
        if not numbers:
            return
        _, late = await asyncio.wait(numbers, timeout=DISMISS_S)
        for task in late:
            self.fleet.lose(numbers[task], silent([self.fleet.number(numbers[task])], "end", DISMISS_S))
            task.cancel()

    @asynccontextmanager
    async def _answer(self, number: int, call: str) -> AsyncGenerator[None]:
        """A worker's answer is awaited inside. Raises WorkerLostError, which names both, where it takes too long."""
        is_cold = number in self._streams and number not in self.fleet.warm
        limit_s = COMPILE_S if is_cold else DISMISS_S
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired():
                raise  # the worker's own
            raise silent([self.fleet.number(number)], call, limit_s) from error

    def _lose(self, number: int, error: WorkerLostError) -> None:
        """Give a worker up, and its stream with it: that of one that hangs would never end."""
        self.fleet.lose(number, error)
        if self.fleet.needs_all:
            self.arrived.put_nowait(error)
        stream = self._streams.pop(number, None)
        if stream is not None and stream is not asyncio.current_task():
            stream.cancel()
        self._changed.set()


def _key(partial: Partial) -> Key:
    return partial.prompt.id, partial.sample

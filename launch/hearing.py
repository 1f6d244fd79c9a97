"""Workers are asked what they do while they sample, and nobody waits for the answers."""

import asyncio
from collections.abc import Collection, Iterable
from contextlib import suppress

from launch.fleet import Fleet
from rl.recorder import sooner

HEAR_S = 0.5  # between two questions to a worker, but in the first seconds
LAST_WORD_S = 0.2  # for the answers once all is sampled; what comes later is heard of in the next step


class Hearing:
    """What the workers of a fleet say during one call goes to fleet.heard."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self, sampling: Collection[int]) -> None:
        """Ask those that sample, whoever they are at the time, again and again, and once more when they have ended."""
        self._task = asyncio.create_task(self._hear(sampling))

    async def end(self) -> None:
        """Ask all a last time, and hear what is said at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._ask(self._fleet.alive)
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=LAST_WORD_S)

    async def _hear(self, sampling: Collection[int]) -> None:
        clock = asyncio.get_running_loop().time
        begun, owing = clock(), set[int]()
        while True:
            now = set(sampling)
            owing = now | (owing - self._ask(now | owing))
            await asyncio.sleep(sooner(HEAR_S, clock() - begun))

    def _ask(self, numbers: Iterable[int]) -> set[int]:
        """Ask those that owe no answer; who they are."""
        free = {number for number in numbers if number not in self._asked or self._asked[number].done()}
        self._asked |= {number: asyncio.create_task(self._listen(number)) for number in free}
        return free

    async def _listen(self, number: int) -> None:
        with suppress(Exception):  # whoever gives it something to do finds out
            self._fleet.heard[number] = await self._fleet.members[number].activity()

"""The workers of a run, as those who give them work see them.

No worker waits for another: whoever is lost costs what only it knew. Its rollouts are sampled again elsewhere, the
same tokens (DESIGN.md, idea 2); what its drafter had learned since the workers last agreed is gone.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Protocol

from configs.errors import ResourceError
from launch.forecast import Lengths
from launch.idle import Decide, decide
from launch.ledger import IdleReport
from launch.noted import waiting_for
from launch.pace import Key, Pace
from rollout.types import Activity, Partial, Prompt, Rollout, Sampling, Span

log = logging.getLogger(__name__)


class WorkerLostError(ResourceError):
    """A worker is gone, with all that it held."""


def silent(numbers: Sequence[int], call: str, limit_s: float) -> WorkerLostError:
    """What is said of workers that are alive, as far as anyone knows, and do not answer a call."""
    who = f"worker {numbers[0]} has" if len(numbers) == 1 else f"workers {', '.join(map(str, numbers))} have"
    error = WorkerLostError(f"{who} not answered {call} for {limit_s:g} s; resume the run")
    waiting_for(error, f"{', '.join(f'worker {number}' for number in numbers)} for {call}")
    return error


class Member(Protocol):
    """One worker as the fleet sees it. Everything raises WorkerLostError once the worker is gone."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, partials: Sequence[Partial]
    ) -> AsyncGenerator[Rollout]:
        """NativeEngine.generate; closing it ends the worker's."""

    async def surrender(self, count: int) -> list[Partial]:
        """NativeEngine.surrender: at most so many of its sequences, which it forgets."""

    async def adopt(self, partials: Sequence[Partial]) -> bool:
        """NativeEngine.adopt; False where it samples nothing to which they could be added."""

    async def progress(self) -> dict[Key, int]:
        """Response tokens so far of its unfinished sequences."""

    async def activity(self) -> Activity:
        """NativeEngine.activity."""

    async def learn(self, turn: int) -> float:
        """Train the drafter until called away from this turn, or until there is nothing to learn; seconds trained."""

    async def score(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> dict[Key, list[float]]:
        """The reference policy's log-probs of finished rollouts."""

    async def call_away(self, turn: int) -> None:
        """End the learning of this turn, also where it has not begun."""


class Fleet:
    """Workers, who of them is lost, and how fast they are.

    slots: sequences a worker runs at a time. learns: whether workers have a drafter to train. decide: what an idle
    worker does; other than launch.idle.decide only to measure it. first: of how many workers, that only train, the
    run's numbers come before these. team: workers that are one member, which the first of them speaks for.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        slots: int,
        learns: bool,
        decide: Decide = decide,
        first: int = 0,
        team: int = 1,
    ) -> None:
        self.members = members
        self.first = first
        self.team = team
        self.lost: dict[int, WorkerLostError] = {}
        self.warm: set[int] = set()  # those that have finished a rollout, hence have compiled what sampling takes
        self.pace = Pace(slots=slots)
        self.lengths = Lengths()
        self.learns = learns
        self.scores = False  # whether workers have a reference policy that each can ask alone
        self.references: dict[Key, list[float]] = {}  # of rollouts of the last call, what was scored meanwhile
        self.needs_all = False  # whether a call ends as soon as one worker is lost: it trains with the others
        self.decide = decide
        self.report = IdleReport()  # of the last call
        self.num_turns = 0  # of learning
        self.heard: dict[int, Activity] = {}  # what workers do, as they last said
        self.learned: dict[int, list[Span]] = {}  # when they trained the drafter during the last call

    @property
    def alive(self) -> list[int]:
        """Numbers of the workers that are not lost."""
        return [number for number in range(len(self.members)) if number not in self.lost]

    def activity(self) -> list[Activity]:
        """What every worker does, as far as has been heard; nothing of those that are lost."""
        return [self._activity(number) for number in range(len(self.members))]

    def _activity(self, number: int) -> Activity:
        activity = self.heard.get(number, Activity())
        if number in self.lost:
            activity = replace(activity, running=0, waiting=0)
        spans = sorted((*activity.spans, *self.learned.get(number, ())), key=lambda span: span.begin)
        return replace(activity, spans=tuple(spans))

    def number(self, member: int) -> int:
        """A member's number among all workers of the run, which is what errors call it; a team's is its first one's."""
        return self.first + member * self.team

    def nobody(self) -> WorkerLostError:
        """What is said where no worker is left."""
        error = next(iter(self.lost.values()))
        said = str(error).removesuffix("; resume the run")
        gone = WorkerLostError(f"no worker is left that samples; the first to be lost: {said}; resume the run")
        gone.__cause__ = error
        return gone

    def lose(self, number: int, error: WorkerLostError) -> None:
        """A worker is gone for good."""
        if number not in self.lost:
            self.lost[number] = error
            said = str(error).removesuffix("; resume the run")
            nobody_takes_over = self.needs_all or len(self.lost) == len(self.members)
            log.warning("%s%s", said, "" if nobody_takes_over else "; the others sample what it owed")

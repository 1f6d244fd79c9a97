"""Whether workers live: each is asked again and again, by a thread here and answered by one of its own there.

A worker that computes answers; one that was stopped, or whose node is gone, does not, and is killed after a while. So
whoever waits for it, with whatever patience, hears at once that it is lost.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

ASK_S = 1.0  # between two questions
FIRST_S = 0.05  # between two looks for first answers: who dies soon after it was built is to be named
FAILED_S = 5.0  # for others to fail alike, and to say so to whoever waits for them
GROUP = "pulse"  # of an actor's methods that have a thread of their own: Ray's concurrency group

log = logging.getLogger(__name__)

# By actor id, as Ray's errors name them; of the process, as Ray's own state is.
_known: dict[str, tuple[str, "Life"]] = {}
_silent: dict[str, str] = {}
_ended_with: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Life:
    """A worker's answer."""

    actor: str
    host: str
    pid: int
    failed: str = ""  # what went wrong in it, where nobody waits who could be told


def life(failed: str = "") -> Life:
    """What a worker answers."""
    return Life(ray.get_runtime_context().get_actor_id(), socket.gethostname(), os.getpid(), failed)


def who(actor: str | None) -> tuple[str, Life]:
    """A worker's name and what it last answered, by its actor id."""
    if actor not in _known:
        return "a worker", Life(actor or "", host="unknown", pid=0)
    return _known[actor]


def silence(actor: str | None) -> str | None:
    """Why a worker was killed, if it was, or died, if that ended its team."""
    return _silent.get(actor or "")


def first_gone(actor: str | None) -> str | None:
    """The actor with which this one was ended, or itself."""
    return _ended_with.get(actor or "", actor)


def death(error: Exception) -> str:
    """What Ray's error says of an actor that is gone."""
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "cannot be reached"
    reason = str(error).strip().splitlines()[-1].partition(" Worker exit type")[0].rstrip(".")
    return f"died ({reason}); it may have run out of memory"


class Pulse:
    """Watches workers, numbered as given, until stopped. Their class has `alive`, which returns life(), in GROUP.

    teams: numbers of workers that cannot do without one another: with one of them the others are killed.
    """

    def __init__(self, workers: Sequence[Any], *, silence_s: float, teams: Sequence[Sequence[int]] = ()) -> None:
        self._workers = workers
        self._silence_s = silence_s
        self._team_of = {number: team for team in teams for number in team}
        self._names = {number: f"worker {number}" for number in range(len(workers))}
        for index, team in enumerate(teams):
            self._names |= {number: f"worker {number}, rank {rank} of team {index}" for rank, number in enumerate(team)}
        self._heard: dict[int, tuple[float, Life]] = {}  # by worker, when and what it last answered
        self._watched = set(range(len(workers)))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        """A worker's time runs from its first answer: until then it is being built, which has a limit of its own."""
        asked: dict[int, Any] = {}
        heard, watched = self._heard, self._watched
        failed: dict[int, float] = {}  # by worker, when it first said so
        while watched:
            for number in watched - asked.keys():
                asked[number] = self._workers[number].alive.remote()
            answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)
            for number, ref in list(asked.items()):
                if ref not in answered:
                    continue
                del asked[number]
                try:
                    life: Life = ray.get(ref)
                except ray.exceptions.RayError as error:  # it is gone, as whoever waits for it hears too
                    watched.discard(number)
                    self._end_team(number, death(error))
                    continue
                heard[number] = time.monotonic(), life
                _known[life.actor] = self._names[number], life
                if life.failed:
                    failed.setdefault(number, time.monotonic())
            for number in list(watched & heard.keys()):
                (last_s, life), now = heard[number], time.monotonic()
                why = None
                if now - last_s > self._silence_s:
                    why = f"showed no sign of life for {self._silence_s:g} s"
                elif now - failed.get(number, now) > FAILED_S:
                    why = f"failed ({life.failed})"
                if why is not None and number in watched:  # not ended with its team meanwhile
                    self._kill(number, why)
                    self._end_team(number, why)
            if self._over.wait(ASK_S if watched <= heard.keys() else FIRST_S):
                return

    def _kill(self, number: int, why: str) -> None:
        """End a worker that has answered before."""
        _, life = self._heard[number]
        self._watched.discard(number)
        log.warning("%s (process %d on %s) is killed: it %s", self._names[number], life.pid, life.host, why)
        _silent[life.actor] = why
        ray.kill(self._workers[number])

    def _end_team(self, number: int, why: str) -> None:
        """A worker is gone: those that cannot do without it would wait for it, on a GPU for ever."""
        if number not in self._team_of or number not in self._heard:
            return  # one that was being built is heard of by whoever waits for all
        _, life = self._heard[number]
        _silent[life.actor] = why
        for other in self._team_of[number]:
            if other in self._watched and other in self._heard:
                _ended_with[self._heard[other][1].actor] = life.actor
                self._kill(other, f"was of a team with {self._names[number]}, which {why}")

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
GROUP = "pulse"  # of an actor's methods that have a thread of their own: Ray's concurrency group

log = logging.getLogger(__name__)

# By actor id, as Ray's errors name them; of the process, as Ray's own state is.
_known: dict[str, tuple[int, "Life"]] = {}
_silent: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Life:
    """A worker's answer."""

    actor: str
    host: str
    pid: int


def life() -> Life:
    """What a worker answers."""
    return Life(ray.get_runtime_context().get_actor_id(), socket.gethostname(), os.getpid())


def who(actor: str | None) -> tuple[str, Life]:
    """A worker's name and what it last answered, by its actor id."""
    if actor not in _known:
        return "a worker", Life(actor or "", host="unknown", pid=0)
    number, life = _known[actor]
    return f"worker {number}", life


def silence(actor: str | None) -> str | None:
    """Why a worker was killed, if it was for its silence."""
    return _silent.get(actor or "")


class Pulse:
    """Watches workers, numbered as given, until stopped. Their class has `alive`, which returns life(), in GROUP."""

    def __init__(self, workers: Sequence[Any], *, silence_s: float) -> None:
        self._workers = workers
        self._silence_s = silence_s
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
        heard: dict[int, tuple[float, Life]] = {}
        watched = set(range(len(self._workers)))
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
                except ray.exceptions.RayError:  # it is gone, as whoever waits for it hears too
                    watched.discard(number)
                    continue
                heard[number] = time.monotonic(), life
                _known[life.actor] = number, life
            for number in list(watched & heard.keys()):
                last_s, life = heard[number]
                if time.monotonic() - last_s > self._silence_s:
                    watched.discard(number)
                    why = _silent[life.actor] = f"showed no sign of life for {self._silence_s:g} s"
                    log.warning("worker %d (process %d on %s) is killed: it %s", number, life.pid, life.host, why)
                    ray.kill(self._workers[number])
            if self._over.wait(ASK_S):
                return

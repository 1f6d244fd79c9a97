"""The policy's way from the workers that train it to those that sample from it, where these are not the same.

The driver says when; the weights go from the first trainer to all engines at once (rollout/transfer.py).
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray

from configs.errors import PacelineError, PreflightError
from launch.adapters import gather, get
from launch.fleet import Fleet, WorkerLostError, silent
from rollout.transfer import Transfer

# Seconds for one bucket, and for all to join the group; then whoever waits gives up, and says for whom it waited.
BUCKET_S = 120.0
# Of a whole transfer, in which engines find no time to answer anything else.
TRANSFER_S = 1800.0

log = logging.getLogger(__name__)


class Trained(Protocol):
    """A trainer that tells whether the policy has changed."""

    changes: int


class Delivery:
    """Sends what the trainers have to every engine alive, once for every change.

    trainers, engines: worker actors on this kind of device. fleet: of the engines, or of teams of them, one after the
    other. bucket_bytes: that travel at a time.
    """

    def __init__(
        self,
        trainers: Sequence[Any],
        engines: Sequence[Any],
        fleet: Fleet,
        trained: Trained,
        *,
        device: str,
        bucket_bytes: int,
    ) -> None:
        self._trainers = trainers
        self._engines = engines
        self._fleet = fleet
        self._trained = trained
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._sent = trained.changes
        self._linked: list[int] = []  # members of the fleet whose engines are in the present group
        self.last: Transfer | None = None

    def bring(self, version: int) -> int:
        """Have all engines alive hold the present policy under this version; the bytes sent, 0 where they do already.

        An engine that is lost on the way is done without. Raises ResourceError where no engine is left, or the trainers
        cannot send; no engine serves anything then.
        """
        if self._sent == self._trained.changes:
            return 0
        while True:
            alive = self._fleet.alive
            if not alive:
                raise self._fleet.nobody()
            try:
                if alive != self._linked:
                    self._link(alive)
                self.last = self._transfer(version)
            except PacelineError:
                self._linked = []  # whoever is still in it may wait for what will not come
                if self._fleet.alive == alive:
                    raise
                continue  # some engine was lost, and with it the group: the others form a new one
            self._sent = self._trained.changes
            return self.last.num_bytes

    def _link(self, alive: Sequence[int]) -> None:
        """Join the first trainer and these engines into a group. Raises PreflightError where their policies differ."""
        first = self._trainers[0]
        (own,) = gather({0: first.layout.remote()}, "layout", limit_s=BUCKET_S)
        engines = self._engines_of(alive)
        layouts = {number: engine.layout.remote() for number, engine in engines.items()}
        for number, other in self._answers(layouts, "layout").items():
            if other != own:
                name = f"worker {self._fleet.first + number}"
                raise PreflightError(f"{name} has other parameters than the trainers; load the same model")
        (meet,) = gather({0: first.listen.remote()}, "listen", limit_s=BUCKET_S)
        world = len(engines) + 1
        joining = first.join.remote(meet, 0, world, self._device, BUCKET_S)
        refs = {
            number: engine.join.remote(meet, rank, world, self._device, BUCKET_S)
            for rank, (number, engine) in enumerate(engines.items(), 1)
        }
        self._answers(refs, "join")
        gather({0: joining}, "join", limit_s=BUCKET_S)
        self._linked = list(alive)

    def _transfer(self, version: int) -> Transfer:
        sending = {rank: each.send.remote(version, self._bucket_bytes) for rank, each in enumerate(self._trainers)}
        engines = self._engines_of(self._linked)
        receiving = {number: each.receive.remote(version, self._bucket_bytes) for number, each in engines.items()}
        lost = set(self._fleet.lost)
        try:
            self._answers(receiving, "receive", limit_s=TRANSFER_S)
        except PacelineError:
            if lost == set(self._fleet.lost):  # then whoever sends may know why
                gather(sending, "send", limit_s=BUCKET_S)
            raise
        sent: Transfer = gather(sending, "send", limit_s=BUCKET_S)[0]
        return sent

    def _engines_of(self, members: Sequence[int]) -> dict[int, Any]:
        """The engines of these members of the fleet, by their numbers among all engines."""
        size = self._fleet.team
        return {n: self._engines[n] for member in members for n in range(member * size, (member + 1) * size)}

    def _answers(self, refs: Mapping[int, Any], method: str, *, limit_s: float = 2 * BUCKET_S) -> dict[int, Any]:
        """Every engine's answer. Raises the first error once all have ended; those that are lost are, then."""
        deadline_s = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        errors: list[PacelineError] = []
        for number, ref in refs.items():
            try:
                if not ray.wait([ref], timeout=max(0.0, deadline_s - time.monotonic()))[0]:
                    raise silent([self._fleet.first + number], method, limit_s)
                answers[number] = get(ref)
            except WorkerLostError as error:
                self._fleet.lose(number // self._fleet.team, error)
                errors.insert(0, error)
            except PacelineError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

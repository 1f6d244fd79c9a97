"""What every worker trains a copy of and drafts by: the mean of what they learned, and the same for all."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from drafter.report import Replica, Standing
from launch.actors import Copied
from launch.adapters import LESSON_S, on_alive, survivors
from launch.fleet import Fleet

log = logging.getLogger(__name__)


class Replicas:
    """Every worker's copy of the drafter, or of the gates. No worker waits for another, and one that is lost costs what
    only it knew."""

    def __init__(self, copied: Copied, workers: Sequence[Any], fleet: Fleet) -> None:
        self.copied: Copied = copied
        self.workers = workers
        self.fleet = fleet

    def agree(self) -> None:
        """Put the mean of what workers learned since the last time into all of them."""
        deltas = {}
        learned = {}
        for number in self.fleet.alive:
            # what was learned stays in the object store: the driver only hears whether there is anything
            delta = self.workers[number].delta.options(num_returns=2)
            learned[number], deltas[number] = delta.remote(self.copied)
        told = survivors(learned, self.fleet, "delta", limit_s=LESSON_S)
        given = [deltas[number] for number, any_ in told.items() if any_]
        if given:
            on_alive(self.workers, self.fleet, "apply_deltas", self.copied, *given, limit_s=LESSON_S)

    def reconcile(self, standings: Mapping[int, Standing]) -> tuple[dict[int, Standing], str]:
        """Where workers serve different ones, have all serve what most of them do, the first one's of equals.

        Where they do not afterwards, all give up: what is sampled would be the same, but what is measured of drafts
        would be of no one copy. Returns what those that are left serve then, and why they gave up, "" if they did not.
        """
        if len(set(standings.values())) <= 1:
            return dict(standings), ""
        (wanted, _), *_ = Counter(standings.values()).most_common(1)
        source = next(number for number, standing in standings.items() if standing == wanted)
        told, given_by = self.told(standings), f"worker {self.fleet.number(source)}'s"
        log.warning("workers serve different %s, and are given %s: %s", self._name, given_by, told)
        asked = {source: self.workers[source].replica.remote(self.copied)}
        given: dict[int, Replica] = survivors(asked, self.fleet, "replica", limit_s=LESSON_S)
        became: dict[int, Standing] = {}
        if given:
            became = on_alive(self.workers, self.fleet, "become", self.copied, given[source], limit_s=LESSON_S)
            standings, told = became, self.told(became)
        if len(set(became.values())) == 1:
            return became, ""
        reason = f"workers serve different {self._name} ({told}), also after they were given {given_by}"
        log.warning("%s: %s", GIVEN_UP[self.copied], reason)
        return on_alive(self.workers, self.fleet, "give_up", self.copied, reason, limit_s=LESSON_S), reason

    def told(self, standings: Mapping[int, Standing]) -> str:
        """Who serves what, in words."""
        served = {self.fleet.number(member): f"v{version} {digest}" for member, (version, digest) in standings.items()}
        return ", ".join(f"worker {number}: {what}" for number, what in served.items())

    @property
    def _name(self) -> str:
        return {"drafter": "drafters", "gates": "gates"}[self.copied]


GIVEN_UP: dict[Copied, str] = {
    "drafter": "no worker drafts with a learned head any more",
    "gates": "gates learn no more, and each worker drafts by its own",
}

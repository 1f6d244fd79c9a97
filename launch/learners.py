"""A Learner over every worker's: what one learns all have, and all draft with the same head or with none."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from drafter.publish import pooled
from drafter.report import DrafterReport, LearnStats, Replica, Standing
from launch.adapters import LESSON_S, TRAIN_S, gather, on_alive, on_all, survivors
from launch.fleet import Fleet
from launch.shift import DISMISS_S

POLL_S = 0.02  # how soon learning ends after it was told to

log = logging.getLogger(__name__)


class RayLearner:
    """A Learner over every worker's: each trains its own copy of the drafter, and they agree on the mean of what they
    learned. What a lost worker had learned since they agreed last is not in it; nothing here ends a run.
    """

    def __init__(self, workers: Sequence[Any], fleet: Fleet) -> None:
        self.workers = workers
        self.fleet = fleet
        self._keeper = 0  # the worker whose learner is saved: one that learns, while any does

    def begin(self, counts: torch.Tensor) -> None:
        """Learner.begin: all choose the same vocabulary."""
        on_alive(self.workers, self.fleet, "begin_learning", counts, limit_s=LESSON_S)

    def learn(self, *, budget_s: float, until: Callable[[], bool]) -> LearnStats:
        """Learner.learn on all workers at once: the steps of all, the time of the longest.

        They are called away DISMISS_S after the budget at the latest, when a worker that hangs is found out.
        """
        self.fleet.num_turns += 1
        turn = self.fleet.num_turns
        refs = {number: self.workers[number].learn.remote(turn, budget_s) for number in self.fleet.alive}
        waiting = list(refs.values())
        deadline_s = time.monotonic() + budget_s + DISMISS_S
        while waiting and not until() and time.monotonic() < deadline_s:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        on_alive(self.workers, self.fleet, "call_away", turn, limit_s=DISMISS_S)
        stats: list[LearnStats] = list(survivors(refs, self.fleet, "learn", limit_s=LESSON_S).values())
        return LearnStats(
            num_steps=sum(each.num_steps for each in stats),
            seconds=max((each.seconds for each in stats), default=0.0),
            step_s=max((each.step_s for each in stats), default=0.0),
        )

    def settle(self, version: int) -> DrafterReport:
        """Agree on the mean of what was learned; judge it on all workers' features; publish it on all, or on none."""
        self.agree()
        judged = on_alive(self.workers, self.fleet, "judge", version, limit_s=LESSON_S)
        judgements = [each for each in judged.values() if each is not None]
        judgement = pooled(judgements) if judgements else None
        reports: dict[int, DrafterReport] = on_alive(self.workers, self.fleet, "conclude", judgement, limit_s=LESSON_S)
        if len({report.standing for report in reports.values()}) > 1:
            reports = self.reconcile(reports)
        if not reports:
            raise self.fleet.nobody()
        self._keeper = next((number for number, report in reports.items() if not report.off), next(iter(reports)))
        return merged(list(reports.values()))

    def agree(self) -> None:
        """Put the mean of what workers learned since the last time into all of them."""
        deltas = {}
        learned = {}
        for number in self.fleet.alive:
            # what was learned stays in the object store: the driver only hears whether there is anything
            learned[number], deltas[number] = self.workers[number].delta.options(num_returns=2).remote()
        told = survivors(learned, self.fleet, "delta", limit_s=LESSON_S)
        given = [deltas[number] for number, any_ in told.items() if any_]
        if given:
            on_alive(self.workers, self.fleet, "apply_deltas", *given, limit_s=LESSON_S)

    def reconcile(self, reports: dict[int, DrafterReport]) -> dict[int, DrafterReport]:
        """Workers serve different heads: have all serve what most of them do, the first one's of equals.

        Where they do not afterwards, none drafts any more: what is sampled would be the same, but what is measured of
        drafts would be of no one head. Returns their reports as they stand then, of those that are left.
        """
        counts = Counter(report.standing for report in reports.values())
        (wanted, _), *_ = counts.most_common(1)
        source = next(number for number, report in reports.items() if report.standing == wanted)
        given_by = f"worker {self.fleet.number(source)}'s"
        log.warning("workers serve different drafters, and are given %s: %s", given_by, self.told(reports))
        asked = {source: self.workers[source].replica.remote()}
        given: dict[int, Replica] = survivors(asked, self.fleet, "replica", limit_s=LESSON_S)
        standings: dict[int, Standing] = {}
        if given:
            standings = on_alive(self.workers, self.fleet, "become", given[source], limit_s=LESSON_S)
            reports = {number: standing_at(reports[number], each) for number, each in standings.items()}
        if len(set(standings.values())) == 1:
            return reports
        reason = f"workers serve different drafters ({self.told(reports)}), also after they were given {given_by}"
        log.warning("no worker drafts with a learned head any more: %s", reason)
        withdrawn = on_alive(self.workers, self.fleet, "give_up", reason, limit_s=LESSON_S)
        return {number: replace(standing_at(reports[number], each), off=reason) for number, each in withdrawn.items()}

    def told(self, reports: dict[int, DrafterReport]) -> str:
        """Who serves what, in words."""
        heads = {self.fleet.number(member): f"v{each.version} {each.checksum}" for member, each in reports.items()}
        return ", ".join(f"worker {number}: {head}" for number, head in heads.items())

    def save(self, folder: Path) -> float:
        """Learner.save of one worker, on storage that its node shares with the driver."""
        ref = self.workers[self._keeper].save_drafter.remote(folder.absolute())
        return float(gather({self.fleet.number(self._keeper): ref}, "save_drafter", limit_s=TRAIN_S)[0])

    def saved(self) -> None:
        """Learner.saved."""
        ref = self.workers[self._keeper].drafter_saved.remote()
        gather({self.fleet.number(self._keeper): ref}, "drafter_saved", limit_s=TRAIN_S)

    def load(self, folder: Path) -> None:
        """Learner.load on all workers, from the same folder."""
        on_all(self.workers, self.fleet, "load_drafter", folder.absolute(), limit_s=TRAIN_S)


def merged(reports: Sequence[DrafterReport]) -> DrafterReport:
    """Workers' reports as one: steps, tokens and seconds in all, losses by steps. They serve the same head."""
    first = reports[0]
    assert len({each.standing for each in reports}) == 1, "workers serve different drafters"
    learned = [each for each in reports if each.num_steps]
    steps = sum(each.num_steps for each in learned)
    return replace(
        first,
        num_steps=steps,
        loss=sum(each.loss * each.num_steps for each in learned) / steps if steps else first.loss,
        train_accept_length=(
            sum(each.train_accept_length * each.num_steps for each in learned) / steps
            if steps
            else first.train_accept_length
        ),
        buffer_tokens=sum(each.buffer_tokens for each in reports),
        seconds=sum(each.seconds for each in reports),
        off=first.off if all(each.off for each in reports) else "",
    )


def standing_at(report: DrafterReport, standing: Standing) -> DrafterReport:
    """The report, of a worker that now serves this."""
    version, checksum = standing
    return replace(report, version=version, checksum=checksum)

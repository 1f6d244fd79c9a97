"""A Learner over every worker's: what one learns all have, and all draft with the same head or with none."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from drafter.publish import pooled
from drafter.report import DrafterReport, LearnStats, Standing
from launch.adapters import LESSON_S, TRAIN_S, gather, on_alive, on_all, survivors
from launch.fleet import Fleet
from launch.replicas import Replicas
from launch.shift import DISMISS_S

POLL_S = 0.02  # how soon learning ends after it was told to


class RayLearner:
    """A Learner over every worker's: each trains its own copy of the drafter, and they agree on the mean of what they
    learned. What a lost worker had learned since they agreed last is not in it; nothing here ends a run.
    """

    def __init__(self, workers: Sequence[Any], fleet: Fleet) -> None:
        self.workers = workers
        self.fleet = fleet
        self._replicas = Replicas("drafter", workers, fleet)
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
        standings, off = self._replicas.reconcile({number: report.standing for number, report in reports.items()})
        reports = {number: standing_at(reports[number], each, off) for number, each in standings.items()}
        if not reports:
            raise self.fleet.nobody()
        self._keeper = next((number for number, report in reports.items() if not report.off), next(iter(reports)))
        return merged(list(reports.values()))

    def agree(self) -> None:
        """Put the mean of what workers learned since the last time into all of them."""
        self._replicas.agree()

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


def standing_at(report: DrafterReport, standing: Standing, off: str) -> DrafterReport:
    """The report, of a worker that now serves this. off: why it gave up, "" if it did not."""
    version, checksum = standing
    return replace(report, version=version, checksum=checksum, off=off or report.off)

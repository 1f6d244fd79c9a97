"""The gates' lessons over every worker's: what one learns all have, and all draft by the same gates."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from drafter.gate_learner import GateJudgement, pooled
from drafter.report import Standing
from launch.adapters import LESSON_S, TRAIN_S, gather, on_alive, on_all
from launch.fleet import Fleet
from launch.replicas import Replicas
from rl.gate_lessons import Learned, gate_record


class RayGateLessons:
    """A rl.types.TeachesGates over every worker's GateLessons: each learns from what it sampled itself, and they agree
    on the mean of what they learned. What a lost worker had learned since they agreed last is not in it.
    """

    def __init__(self, workers: Sequence[Any], fleet: Fleet) -> None:
        self.workers = workers
        self.fleet = fleet
        self._replicas = Replicas("gates", workers, fleet)

    def take(self) -> dict[str, Any]:
        """TeachesGates.take: all workers learn at once, judge on what each held out, and publish, or none does."""
        begun = perf_counter()
        learned: dict[int, Learned] = on_alive(self.workers, self.fleet, "learn_gates", limit_s=LESSON_S)
        self._replicas.agree()
        judged: dict[int, GateJudgement | None] = on_alive(self.workers, self.fleet, "judge_gates", limit_s=LESSON_S)
        judgements = [each for each in judged.values() if each is not None]
        judgement = pooled(judgements) if judgements else None
        concluded: dict[int, Standing] = on_alive(
            self.workers, self.fleet, "conclude_gates", judgement, limit_s=LESSON_S
        )
        standings, _ = self._replicas.reconcile(concluded)
        if not standings:
            raise self.fleet.nobody()
        version, _ = next(iter(standings.values()))
        return gate_record(list(learned.values()), judgement, version) | {"gate_s": perf_counter() - begun}

    def save(self, folder: Path, *, base_model: str) -> None:
        """GateLessons.save of one worker, on storage that its node shares with the driver."""
        if not self.fleet.alive:
            raise self.fleet.nobody()
        number = self.fleet.alive[0]
        ref = self.workers[number].save_gates.remote(folder.absolute(), base_model)
        gather({self.fleet.number(number): ref}, "save_gates", limit_s=TRAIN_S)

    def load(self, folder: Path) -> None:
        """GateLessons.load on all workers, from the same folder."""
        on_all(self.workers, self.fleet, "load_gates", folder.absolute(), limit_s=TRAIN_S)

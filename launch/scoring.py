"""Finished rollouts are scored by idle workers: their log-probs under the reference policy, which training needs.

What nobody got to, training computes; what was scored it need not.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import perf_counter

from launch.fleet import Fleet, WorkerLostError
from launch.ledger import Ledger
from rollout.types import Prompt, Rollout, Sampling

SCORED_TOKENS = 4096  # of responses that are scored together, at most: a moment, in which nobody is called away

log = logging.getLogger(__name__)


class Scoring:
    """What of one call waits to be scored, and who is at it. fleet.references has what was.

    over: called with a worker, and with how it was lost, when it is done.
    """

    def __init__(
        self,
        fleet: Fleet,
        sampling: Sampling,
        prompts: Mapping[str, Prompt],
        ledger: Ledger,
        over: Callable[[int, WorkerLostError | None], None],
    ) -> None:
        self.under_way: dict[int, asyncio.Task[None]] = {}
        self._fleet = fleet
        self._prompts = prompts
        self._ledger = ledger
        self._over = over
        self._waiting: list[Rollout] = []
        # what is greedy is an evaluation, which nobody trains on
        self._is_wanted = fleet.scores and sampling.temperature > 0
        # this call's own: what comes late is of no use to the next, whose rollouts have the same names
        self._references = fleet.references = {}

    def add(self, rollout: Rollout) -> None:
        """This one is finished."""
        if self._is_wanted:
            self._waiting.append(rollout)

    def is_due(self, *, is_learning: bool) -> bool:
        """Whether an idle worker should score now: it is called away from learning for much alone."""
        least = SCORED_TOKENS if is_learning else 1
        return self._is_wanted and sum(len(rollout.token_ids) for rollout in self._waiting) >= least

    def begin(self, number: int) -> None:
        """Have a worker, which does nothing else, score what comes next."""
        self.under_way[number] = asyncio.create_task(self._score(number, self._take()))

    def _take(self) -> list[Rollout]:
        taken = [self._waiting.pop(0)]
        tokens = len(taken[0].token_ids)
        while self._waiting and (tokens := tokens + len(self._waiting[0].token_ids)) <= SCORED_TOKENS:
            taken.append(self._waiting.pop(0))
        return taken

    async def _score(self, number: int, rollouts: list[Rollout]) -> None:
        """Whatever befalls it, rollouts go on."""
        begun = perf_counter()
        pairs = [(self._prompts[rollout.prompt_id], rollout) for rollout in rollouts]
        lost: WorkerLostError | None = None
        try:
            scores = await self._fleet.members[number].score(pairs)
            self._references.update(scores)
            self._ledger.scored(begun)
        except WorkerLostError as error:
            lost = error
        except Exception as error:
            self._is_wanted = False
            log.warning("worker %d scores no rollouts, nor does another in this step: %r", number, error)
        finally:
            del self.under_way[number]
        self._over(number, lost)

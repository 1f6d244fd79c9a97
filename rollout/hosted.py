"""Cycles planned, drafted and verified on the host: every sequence forwards just the tokens it has, none is padded.

For processors that pay by the token, and for what cannot run resident (rollout/resident.py).
"""

import time
from collections import abc

import torch
from transformers import PreTrainedModel

from drafter.types import OFF, Drafter, DraftState, Strategy
from rollout.activity import Tally
from rollout.model import PagedCache
from rollout.runner import Drawn, draw
from rollout.scheduler import Scheduler, Work
from rollout.sequence import Sequence
from rollout.speculate import verify
from rollout.strategy import Chooser, CycleReport
from rollout.types import Sampling


class HostedCycles:
    """Draft, forward, verify and commit, each cycle complete before the next is planned."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        scheduler: Scheduler,
        sampling: Sampling,
        *,
        drafter: Drafter | None,
        chooser: Chooser,
        tally: Tally,
        block_size: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._scheduler = scheduler
        self._sampling = sampling
        self._stop = frozenset(sampling.stop_token_ids)
        self._drafter = drafter
        self._chooser = chooser
        self._tally = tally
        self._block_size = block_size

    @property
    def in_flight(self) -> bool:
        """Whether a cycle's results are still to come; here never."""
        return False

    @torch.inference_mode()
    def step(self, version: int) -> list[Sequence]:
        """One cycle; the sequences that became complete."""
        start = time.perf_counter()
        works = self._scheduler.plan()
        sampled = [work for work in works if work.samples]
        strategy = self._draft(sampled)
        self._tally.cycle(strategy if sampled else None, prefills=any(work.num_tokens > 1 for work in works))
        drawn = draw(self._model, self._cache, works, self._sampling, block_size=self._block_size)
        paths = [
            verify(work.draft.token_ids, work.draft.parents, target.token_ids)
            for work, target in zip(works, drawn, strict=True)
        ]
        self._move_accepted(works, paths)
        finished = []
        committed = 0
        for work, target, path in zip(works, drawn, paths, strict=True):
            sequence = work.sequence
            if not work.samples:
                self._scheduler.advance(sequence, sequence.num_cached + work.num_tokens)
                continue
            length = len(sequence.tokens)
            committed += self._commit(work, target, path, version, strategy.source)
            if sequence.finish is None:
                self._scheduler.advance(sequence, length + len(path))
            else:
                self._scheduler.finish(sequence)
                finished.append(sequence)
        self._tally.tokens += committed
        if len(sampled) == len(works):  # a cycle that also computes prompts says nothing about a strategy
            self._report(strategy, sampled, paths, committed, time.perf_counter() - start)
        return finished

    def admit(self, sequences: abc.Iterable[Sequence]) -> None:
        """Sequences the scheduler will plan; the drafter hears what those have said that were begun elsewhere."""
        if self._drafter is None:
            return
        for sequence in sequences:
            if sequence.logprobs:
                key = (sequence.prompt.id, sequence.sample)
                self._drafter.begin(*key, sequence.prompt.token_ids)
                self._drafter.extend(*key, sequence.tokens[len(sequence.prompt.token_ids) :])

    def dismiss(self, sequences: abc.Iterable[Sequence]) -> None:
        """Sequences that the scheduler dropped: let the drafter keep what it has seen of them."""
        if self._drafter is None:
            return
        for sequence in sequences:
            if sequence.logprobs:
                self._drafter.finish(sequence.prompt.id, sequence.sample)

    def drain(self) -> list[Sequence]:
        """Read what is in flight: nothing."""
        return []

    def vacate(self) -> None:
        """Take all sequences off the device: what the scheduler preempted holds nothing here."""

    def close(self) -> None:
        """Let the drafter keep what it has seen of sequences that will not be finished."""
        self.dismiss((*self._scheduler.running, *self._scheduler.waiting))

    def _draft(self, sampled: abc.Sequence[Work]) -> Strategy:
        """Attach a draft to every work that samples in this cycle; how it was chosen."""
        if self._drafter is None or not sampled:
            return OFF
        states = []
        for work in sampled:
            sequence = work.sequence
            if not sequence.logprobs:
                self._drafter.begin(sequence.prompt.id, sequence.sample, sequence.prompt.token_ids)
            states.append(
                DraftState(
                    prompt_id=sequence.prompt.id,
                    sample=sequence.sample,
                    token_ids=sequence.tokens,
                    max_tokens=sequence.num_remaining,
                )
            )
        strategy = self._chooser.choose(batch=len(sampled), context=_mean_context(sampled))
        if strategy.source != "off":
            drafts = self._drafter.propose(states, strategy)
            for work, draft in zip(sampled, drafts, strict=True):
                self._scheduler.attach(work, draft, max_nodes=strategy.num_verify)
        return strategy

    def _commit(self, work: Work, target: Drawn, path: list[int], version: int, source: str) -> int:
        """Append what the target sampled along the accepted path, and tell the drafter; return how many tokens."""
        sequence = work.sequence
        rows = [0, *(node + 1 for node in path)]
        count = sequence.commit(
            [target.token_ids[row] for row in rows],
            [target.logprobs[row] for row in rows],
            stop_token_ids=self._stop,
            version=version,
        )
        sequence.count_forward(_by_depth([work]), min(len(path), count), source, count=count)
        if self._drafter is not None:
            self._drafter.extend(sequence.prompt.id, sequence.sample, sequence.tokens[-count:])
            if sequence.finish is not None:
                self._drafter.finish(sequence.prompt.id, sequence.sample)
        return count

    def _move_accepted(self, works: abc.Sequence[Work], paths: abc.Sequence[list[int]]) -> None:
        """Bring the accepted nodes' keys and values to the slots of the tokens they have become."""
        sources: list[int] = []
        targets: list[int] = []
        for work, path in zip(works, paths, strict=True):
            length = len(work.sequence.tokens)
            for place, node in enumerate(path):
                if place != node:
                    sources.append(work.sequence.slot(length + node))
                    targets.append(work.sequence.slot(length + place))
        if sources:
            device = self._cache.storage.device
            self._cache.move(torch.tensor(sources, device=device), torch.tensor(targets, device=device))

    def _report(
        self,
        strategy: Strategy,
        works: abc.Sequence[Work],
        paths: abc.Sequence[list[int]],
        committed: int,
        seconds: float,
    ) -> None:
        proposed = _by_depth(works)
        accepted = [sum(len(path) > level for path in paths) for level in range(len(proposed))]
        self._chooser.observe(
            CycleReport(
                strategy=strategy,
                batch=len(works),
                bucket=len(works),
                context=_mean_context(works),
                seconds=seconds,
                committed=committed,
                proposed_by_depth=proposed,
                accepted_by_depth=accepted,
                rows_with_draft=sum(bool(work.depths) for work in works),
            )
        )


def _by_depth(works: abc.Sequence[Work]) -> list[int]:
    """Drafted nodes d + 1 levels below the pending tokens."""
    depths = [depth for work in works for depth in work.depths]
    return [depths.count(level) for level in range(1, max(depths, default=0) + 1)]


def _mean_context(works: abc.Sequence[Work]) -> float:
    return sum(work.sequence.num_cached for work in works) / max(len(works), 1)

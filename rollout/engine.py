"""The engine: sequences in, cycles of draft, verify and commit, rollouts out."""

import asyncio
import gc
import time
from collections import abc
from typing import Any, Literal, Protocol

from transformers import PretrainedConfig, PreTrainedModel

from configs.faults import hit
from configs.schema import RolloutConfig
from drafter.types import Drafter, FeatureReader, FollowsTemperature, ResidentDrafter
from kernels.sample import noise_key
from rollout.activity import Tally
from rollout.collectives import ranks_of
from rollout.graphs import GraphPool
from rollout.hosted import HostedCycles
from rollout.model import PagedCache, context_length
from rollout.prompts import check_prompts
from rollout.resident import ResidentCycles
from rollout.scheduler import Scheduler
from rollout.sequence import Sequence
from rollout.sparse import SparseAttention
from rollout.strategy import Chooser
from rollout.transfer import Weights
from rollout.types import Activity, Partial, Prompt, Rollout, SampledUnder, Sampling
from rollout.workspace import Workspace

NEVER = 1 << 30


class Cycles(Protocol):
    """Advances the scheduler's sequences, one cycle a step. HostedCycles and ResidentCycles."""

    @property
    def in_flight(self) -> bool:
        """Whether finished sequences may still come after the scheduler has none left."""

    def admit(self, sequences: abc.Collection[Sequence]) -> None:
        """These are added to the scheduler."""

    def dismiss(self, sequences: abc.Collection[Sequence]) -> None:
        """These were dropped from the scheduler, nothing being in flight: another engine goes on with them."""

    def step(self, version: int) -> list[Sequence]:
        """One cycle; the sequences found complete."""

    def drain(self) -> list[Sequence]:
        """Know every token that was sampled; the sequences found complete."""

    def vacate(self) -> None:
        """Hold nothing for any sequence: the scheduler has preempted them all."""

    def close(self) -> None:
        """Nothing will be stepped any more; sequences still unfinished are dropped."""


class NativeEngine:
    """Samples rollouts from a policy whose weights it shares with whoever trains it.

    cycles: "resident" keeps the sequences' state on the device, with a ResidentDrafter; "hosted" plans each cycle on
    the host, with a Drafter. "auto" is resident on a GPU, and wherever drafter or reader ask for it. drafter None, or a
    strategy whose source is "off", decodes token by token. What is sampled is the same.
    reader: is given the hidden states of what is committed, by resident cycles. sparse: the policy's sparse attention,
    which a drafter that drafts with the policy is lent; cycles are resident then. weights: where no trainer updates the
    policy in place, who answers for the version its parameters hold.
    One generate at a time. The KV cache is allocated by the first one and grows when a later one can use more, up to
    what the device could afford when the first one asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        drafter: Drafter | ResidentDrafter | None,
        chooser: Chooser,
        rollout: RolloutConfig,
        cycles: Literal["auto", "hosted", "resident"] = "auto",
        reader: FeatureReader | None = None,
        sparse: SparseAttention | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.version = 0
        self.weights = weights
        self.sparse = sparse
        self.ranks = ranks_of(model)  # that share the policy
        # called before every cycle, and whether there is to be one: those ranks agree here
        self.agree: abc.Callable[[], bool] = lambda: True
        self._model = model
        self._drafter = drafter
        self._chooser = chooser
        self._config = rollout
        on_device = model.device.type == "cuda" or isinstance(drafter, ResidentDrafter) or bool(reader or sparse)
        self._resident = cycles == "resident" or (cycles == "auto" and on_device)
        assert self._resident or not (reader or sparse), "hosted cycles keep no hidden states, and attend to everything"
        self._reader = reader
        self._workspace = Workspace(
            model,
            rollout,
            drafter=drafter,
            reader=reader,
            sparse=sparse,
            max_nodes=max(1, chooser.max_num_verify),
        )
        self._scheduler: Scheduler | None = None
        self._running: Cycles | None = None
        self._sampling: Sampling | None = None  # of the call under way
        self._under: SampledUnder = "dense"  # what the cache was written under
        self._finished: list[Sequence] = []  # found out between two cycles, not yet handed on
        self._tally = Tally()

    async def generate(
        self, prompts: abc.Sequence[Prompt], sampling: Sampling, *, partials: abc.Sequence[Partial] = ()
    ) -> abc.AsyncGenerator[Rollout, None]:
        """num_samples rollouts of every prompt, and one of every partial, each as it finishes.

        partials: given up by an engine under the same sampling, whose policy weighs the same as this one's; they start
        first. What is sampled is what would have been there.
        Raises DataError where a prompt is empty, given twice or too long for the model, and ResourceError where the
        KV cache cannot hold it, or the policy is not whole (StaleWeightsError).
        """
        assert self._scheduler is None, "one generate at a time"
        assert sampling.under == "dense" or self.sparse is not None, "there is no selector to sample under"
        if not prompts and not partials:
            return
        if self.weights is not None:
            self.weights.require(self.version)
        check_prompts(prompts, sampling, context=context_length(self._model.config))
        sequences = self._taken_up(partials, sampling)
        sequences += [self._sequence(prompt, n, sampling) for prompt in prompts for n in range(sampling.num_samples)]
        assert len({(s.prompt.id, s.sample) for s in sequences}) == len(sequences), "a sample is asked for twice"
        if self._tally.is_over or self._tally.step != sampling.step:  # else it is the same step's next generate
            self._tally = Tally(sampling.step)
        if sampling.under != self._under:
            self._workspace.pool.forget()  # what is cached is another forward's
            self._under = sampling.under
        self._queue(sequences, sampling)  # may refuse the policy: nothing is under way before
        was_training = self._model.training
        self._model.eval()
        thresholds = gc.get_threshold()
        # a full collection walks all of torch and transformers, 0.1 s in which no cycle is launched
        gc.set_threshold(thresholds[0], thresholds[1], NEVER)
        try:
            while self.agree() and ((running := self._unfinished_cycles()) or self._finished):
                finished, self._finished = self._finished, []
                if running is not None:
                    hit("rollout.cycle")
                    begun = time.time()
                    self._refresh_copy()
                    finished += running.step(self.version)
                    self._tally.spent(begun, time.time())
                for sequence in finished:
                    yield sequence.rollout()
                await asyncio.sleep(0)
        finally:
            # also where the caller leaves early: nothing may stay behind
            if thresholds[2] != NEVER:  # set by another engine that is still at work, or was when this one began
                gc.set_threshold(*thresholds)
            assert self._running is not None and self._scheduler is not None
            self._running.close()
            self._tally.preempted += self._scheduler.num_preempted
            self._scheduler.clear()
            self._scheduler = self._running = self._sampling = None
            self._finished = []
            self._model.train(was_training)

    @property
    def is_generating(self) -> bool:
        """Whether a generate is under way, to which partial rollouts can be added; else another one may begin."""
        return self._scheduler is not None

    def progress(self) -> dict[tuple[str, int], int]:
        """Response tokens so far of every unfinished sequence, by prompt id and sample; {} without a generate."""
        if self._scheduler is None:
            return {}
        sequences = (*self._scheduler.running, *self._scheduler.waiting)
        return {(s.prompt.id, s.sample): len(s.tokens) - len(s.prompt.token_ids) for s in sequences}

    def activity(self) -> list[Activity]:
        """What this engine does, and has done in the generates of the step it sampled last; one record."""
        scheduler = self._scheduler
        return [
            self._tally.activity(
                running=len(scheduler.running) if scheduler else 0,
                waiting=len(scheduler.waiting) if scheduler else 0,
                preempted=scheduler.num_preempted if scheduler else 0,
                is_generating=scheduler is not None,
            )
        ]

    def references(self) -> dict[tuple[str, int], list[float]]:
        """Nothing: nobody is idle while this samples."""
        return {}

    def figures(self) -> dict[str, Any]:
        """Nothing: nobody waits for another here, and no weights move."""
        return {}

    def surrender(self, count: int) -> list[Partial]:
        """Give up to count unfinished sequences away, those that may still become longest first, waiting ones before.

        Between the cycles of a generate, which then goes on without them; there is nothing to give without one. What
        is in flight is waited for, and kept.
        """
        if self._scheduler is None or self._running is None:
            return []
        self._finished += self._running.drain()
        scheduler = self._scheduler
        latest_first = [*reversed(scheduler.waiting), *reversed(scheduler.running)]
        given = sorted(latest_first, key=lambda sequence: -sequence.num_remaining)[:count]
        for sequence in given:
            scheduler.drop(sequence)
        self._running.dismiss(given)
        return [sequence.partial() for sequence in given]

    def adopt(self, partials: abc.Sequence[Partial]) -> None:
        """Go on with these in the generate under way; they were begun under the same sampling.

        Raises as generate does; what is under way goes on then.
        """
        assert self._scheduler is not None and self._running is not None and self._sampling is not None
        scheduler, running = self._scheduler, self._running
        sequences = self._taken_up(partials, self._sampling)
        if not sequences:
            return
        if self._workspace.has_room(max(sequence.max_length for sequence in sequences), on_rows=self._resident):
            running.admit(sequences)
            for sequence in sequences:
                scheduler.add(sequence)
            return
        # too long for the cache or the rows there are: all begin anew from what they have said, over larger ones
        self._finished += running.drain()
        scheduler.preempt_all()
        running.vacate()
        self._queue([*scheduler.waiting, *sequences], self._sampling)

    @property
    def graphs(self) -> GraphPool:
        """The CUDA graphs held now, and what was captured lately."""
        return self._workspace.graphs

    @property
    def graph_bytes(self) -> int:
        """Device memory of the CUDA graphs held now."""
        return self._workspace.graphs.num_bytes

    def update(self, version: int) -> int:
        """The weights hold this version now: recompute what running sequences have cached, find nothing older.

        Returns the bytes moved for it. Raises StaleWeightsError where they are not to be had.
        """
        num_bytes = 0 if self.weights is None else self.weights.take(version)
        if self._scheduler is not None and self._running is not None:
            assert self._workspace.is_current(), "parameters moved away under running sequences"
            self._finished += self._running.drain()
            self._scheduler.preempt_all()
            self._running.vacate()
        else:
            self._tally.is_over = True  # an evaluation that follows another has the same step's number
        self.version = version
        self._workspace.pool.forget()
        self._chooser.policy_changed()
        return num_bytes

    @property
    def model_config(self) -> PretrainedConfig:
        """The policy's."""
        return self._model.config

    def gates_changed(self) -> None:
        """The selector's gates were updated in place, no sequence running: nothing that they described is found."""
        assert self._scheduler is None, "sequences are being sampled"
        self._workspace.pool.forget()
        self._chooser.drafter_changed("sparse")

    def release(self) -> None:
        """Give the memory of the KV cache and of all graphs back; the next generate makes them again, as large."""
        assert self._scheduler is None, "sequences are being sampled"
        self._workspace.release()

    def state_dict(self) -> dict[str, Any]:
        """The drafter's state, and the cache's size and bound: from other free memory, they could change the batches.

        JSON-able with default=list.
        """
        return {
            "kv_blocks": self._workspace.kv_blocks,
            "max_kv_blocks": self._workspace.max_kv_blocks,
            "drafter": {} if self._drafter is None else self._drafter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. A configured rollout.kv_tokens goes before the saved cache size."""
        if not self._config.kv_tokens:
            self._workspace.kv_blocks = state["kv_blocks"]
            self._workspace.max_kv_blocks = state["max_kv_blocks"]
        if self._drafter is not None and state["drafter"]:
            self._drafter.load_state_dict(state["drafter"])

    def _unfinished_cycles(self) -> Cycles | None:
        """The cycles of the call under way while there is something left to step; adopting may exchange them."""
        scheduler, running = self._scheduler, self._running
        assert scheduler is not None and running is not None
        return running if scheduler.running or scheduler.waiting or running.in_flight else None

    def _queue(self, sequences: abc.Sequence[Sequence], sampling: Sampling) -> None:
        """Be ready to run these sequences, first come first served, and no others. Raises ResourceError."""
        longest = max(sequence.max_length for sequence in sequences)
        cache = self._workspace.provide_cache(longest, len(sequences))
        scheduler = Scheduler(
            self._workspace.pool, max_running=self._config.max_running, prefill_tokens=self._config.prefill_tokens
        )
        running = self._cycles(cache, scheduler, sampling, longest)
        running.admit(sequences)
        for sequence in sequences:
            scheduler.add(sequence)
        if self._scheduler is not None:
            self._tally.preempted += self._scheduler.num_preempted
        self._scheduler, self._running, self._sampling = scheduler, running, sampling

    def _cycles(self, cache: PagedCache, scheduler: Scheduler, sampling: Sampling, longest: int) -> Cycles:
        """What runs the cycles of one call."""
        block_size = self._config.block_size
        if not self._resident:
            assert not isinstance(self._drafter, ResidentDrafter)
            return HostedCycles(
                self._model,
                cache,
                scheduler,
                sampling,
                drafter=self._drafter,
                chooser=self._chooser,
                tally=self._tally,
                block_size=block_size,
            )
        for part in (self._drafter, self._reader):
            if isinstance(part, FollowsTemperature):
                part.set_temperature(sampling.temperature)
        decoder, residency = self._workspace.provide_rows(longest)
        return ResidentCycles(
            decoder,
            cache,
            scheduler,
            sampling,
            residency=residency,
            graphs=self._workspace.graphs,
            chooser=self._chooser,
            tally=self._tally,
            block_size=block_size,
            sparse=self.sparse,
        )

    def _refresh_copy(self) -> None:
        """Let the weights that drafts read, where they are a copy, be those of the present version."""
        scheduler = self._scheduler
        if self.sparse is not None and self.sparse.lowbit is not None and scheduler is not None:
            texts = (sequence.tokens for sequence in (*scheduler.running, *scheduler.waiting))
            self.sparse.lowbit.refresh(self.version, texts)

    def _sequence(self, prompt: Prompt, sample: int, sampling: Sampling) -> Sequence:
        return Sequence(
            prompt=prompt,
            sample=sample,
            noise_key=noise_key(seed=sampling.seed, step=sampling.step, prompt_id=prompt.id, sample=sample),
            max_length=len(prompt.token_ids) + sampling.max_new_tokens,
            block_size=self._config.block_size,
            sampled_under=sampling.under,
        )

    def _taken_up(self, partials: abc.Sequence[Partial], sampling: Sampling) -> list[Sequence]:
        """A sequence of each partial response. Raises DataError as check_prompts does."""
        unique = {partial.prompt.id: partial.prompt for partial in partials}
        check_prompts(list(unique.values()), sampling, context=context_length(self._model.config))
        sequences = [self._sequence(partial.prompt, partial.sample, sampling) for partial in partials]
        for sequence, partial in zip(sequences, partials, strict=True):
            sequence.take_up(partial)
        return sequences

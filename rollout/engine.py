"""The engine: sequences in, cycles of draft, verify and commit, rollouts out."""

import asyncio
from collections import abc
from typing import Any

import torch
from transformers import PreTrainedModel

from configs.errors import DataError, ResourceError
from configs.schema import RolloutConfig
from drafter.types import Drafter, DraftState, Strategy
from kernels.sample import noise_key
from rollout.blocks import BlockPool
from rollout.memory import cache_budget
from rollout.model import PagedCache, bytes_per_block, context_length
from rollout.runner import Drawn, draw
from rollout.scheduler import Scheduler, Work
from rollout.sequence import Sequence
from rollout.speculate import verify
from rollout.types import Prompt, Rollout, Sampling


class NativeEngine:
    """Samples rollouts from a policy whose weights it shares with whoever trains it.

    drafter None, or a strategy whose source is "off", decodes token by token; what is sampled is the same.
    One generate at a time. The KV cache is allocated by the first one and grows when a later one can use more, up to
    what the device could afford when the first one asked.
    """

    def __init__(
        self, model: PreTrainedModel, *, drafter: Drafter | None, strategy: Strategy, rollout: RolloutConfig
    ) -> None:
        self.version = 0
        self._model = model
        self._drafter = drafter
        self._strategy = strategy
        self._config = rollout
        self._kv_blocks = rollout.kv_tokens // rollout.block_size
        self._max_kv_blocks = 0  # 0: not measured yet
        self._cache: PagedCache | None = None
        self._pool = BlockPool(0, rollout.block_size)
        self._scheduler: Scheduler | None = None

    async def generate(self, prompts: abc.Sequence[Prompt], sampling: Sampling) -> abc.AsyncGenerator[Rollout, None]:
        """num_samples rollouts of every prompt, each as it finishes.

        Raises DataError where a prompt is empty, given twice or too long for the model, and ResourceError where the
        KV cache cannot hold it.
        """
        assert self._scheduler is None, "one generate at a time"
        if not prompts:
            return
        self._check(prompts, sampling)
        self._provide_cache(prompts, sampling)
        scheduler = Scheduler(
            self._pool, max_running=self._config.max_running, prefill_tokens=self._config.prefill_tokens
        )
        for prompt in prompts:
            for sample in range(sampling.num_samples):
                scheduler.add(self._sequence(prompt, sample, sampling))
        self._scheduler = scheduler
        was_training = self._model.training
        self._model.eval()
        try:
            while scheduler.running or scheduler.waiting:
                for rollout in self._cycle(scheduler, sampling):
                    yield rollout
                await asyncio.sleep(0)
        finally:
            # also where the caller leaves early: nothing may stay behind
            self._abandon(scheduler)
            self._scheduler = None
            self._model.train(was_training)

    def update(self, version: int) -> None:
        """The weights hold this version now: recompute what running sequences have cached, find nothing older."""
        self.version = version
        if self._scheduler is not None:
            self._scheduler.preempt_all()
        self._pool.forget()

    def state_dict(self) -> dict[str, Any]:
        """The drafter's state, and the cache's size and bound: from other free memory, they could change the batches.

        JSON-able with default=list.
        """
        return {
            "kv_blocks": self._kv_blocks,
            "max_kv_blocks": self._max_kv_blocks,
            "drafter": {} if self._drafter is None else self._drafter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. A configured rollout.kv_tokens goes before the saved cache size."""
        if not self._config.kv_tokens:
            self._kv_blocks = state["kv_blocks"]
            self._max_kv_blocks = state["max_kv_blocks"]
        if self._drafter is not None and state["drafter"]:
            self._drafter.load_state_dict(state["drafter"])

    @torch.inference_mode()
    def _cycle(self, scheduler: Scheduler, sampling: Sampling) -> list[Rollout]:
        """Plan, draft, forward, verify and commit once; the rollouts that became complete."""
        assert self._cache is not None
        works = scheduler.plan()
        self._draft(scheduler, works)
        drawn = draw(self._model, self._cache, works, sampling, block_size=self._config.block_size)
        paths = [
            verify(work.draft.token_ids, work.draft.parents, target.token_ids)
            for work, target in zip(works, drawn, strict=True)
        ]
        self._move_accepted(works, paths)
        stop = frozenset(sampling.stop_token_ids)
        finished = []
        for work, target, path in zip(works, drawn, paths, strict=True):
            sequence = work.sequence
            if not work.samples:
                scheduler.advance(sequence, sequence.num_cached + work.num_tokens)
                continue
            length = len(sequence.tokens)
            self._commit(work, target, path, stop)
            if sequence.finish is None:
                scheduler.advance(sequence, length + len(path))
            else:
                scheduler.finish(sequence)
                finished.append(sequence.rollout())
        return finished

    def _draft(self, scheduler: Scheduler, works: abc.Sequence[Work]) -> None:
        """Attach a draft to every work that samples in this cycle."""
        if self._drafter is None:
            return
        drafting = [work for work in works if work.samples]
        states = []
        for work in drafting:
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
        if self._strategy.source == "off" or not states:
            return
        drafts = self._drafter.propose(states, self._strategy)
        for work, draft in zip(drafting, drafts, strict=True):
            scheduler.attach(work, draft, max_nodes=self._strategy.num_verify)

    def _commit(self, work: Work, target: Drawn, path: list[int], stop: frozenset[int]) -> None:
        """Append what the target sampled along the accepted path, and tell the drafter."""
        sequence = work.sequence
        rows = [0, *(node + 1 for node in path)]
        count = sequence.commit(
            [target.token_ids[row] for row in rows],
            [target.logprobs[row] for row in rows],
            stop_token_ids=stop,
            version=self.version,
        )
        sequence.count_forward(work.depths, min(len(path), count))
        if self._drafter is not None:
            self._drafter.extend(sequence.prompt.id, sequence.sample, sequence.tokens[-count:])
            if sequence.finish is not None:
                self._drafter.finish(sequence.prompt.id, sequence.sample)

    def _move_accepted(self, works: abc.Sequence[Work], paths: abc.Sequence[list[int]]) -> None:
        """Bring the accepted nodes' keys and values to the slots of the tokens they have become."""
        assert self._cache is not None
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

    def _abandon(self, scheduler: Scheduler) -> None:
        """Drop what is still in flight. The drafter keeps what it has seen."""
        if self._drafter is not None:
            for sequence in (*scheduler.running, *scheduler.waiting):
                if sequence.logprobs:
                    self._drafter.finish(sequence.prompt.id, sequence.sample)
        scheduler.clear()

    def _sequence(self, prompt: Prompt, sample: int, sampling: Sampling) -> Sequence:
        return Sequence(
            prompt=prompt,
            sample=sample,
            noise_key=noise_key(seed=sampling.seed, step=sampling.step, prompt_id=prompt.id, sample=sample),
            max_length=len(prompt.token_ids) + sampling.max_new_tokens,
            block_size=self._config.block_size,
        )

    def _check(self, prompts: abc.Sequence[Prompt], sampling: Sampling) -> None:
        """Raise DataError for a prompt that cannot be rolled out, before anything starts."""
        context = context_length(self._model.config)
        seen: set[str] = set()
        for prompt in prompts:
            if prompt.id in seen:
                raise DataError(f"prompt {prompt.id!r} is given twice in one step; give each prompt an id of its own")
            seen.add(prompt.id)
            if not prompt.token_ids:
                raise DataError(f"prompt {prompt.id!r} has no tokens; remove it from the data")
            length = len(prompt.token_ids) + sampling.max_new_tokens
            if length > context:
                raise DataError(
                    f"prompt {prompt.id!r}: {len(prompt.token_ids)} tokens and max_new_tokens={sampling.max_new_tokens}"
                    f" exceed the model's context of {context}; lower rollout.max_new_tokens or data.max_prompt_tokens"
                )

    def _provide_cache(self, prompts: abc.Sequence[Prompt], sampling: Sampling) -> None:
        """Allocate the KV cache, or a larger one where these prompts can use it. Raises ResourceError."""
        block_size = self._config.block_size
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
        blocks_each = -(-longest // block_size)
        if not self._config.kv_tokens:
            num_running = min(self._config.max_running, len(prompts) * sampling.num_samples)
            # once: a run that was resumed would measure another number at another time
            self._max_kv_blocks = self._max_kv_blocks or self._affordable_blocks()
            self._kv_blocks = max(self._kv_blocks, min(num_running * blocks_each, self._max_kv_blocks))
        if blocks_each > self._kv_blocks:
            raise ResourceError(
                f"the KV cache holds {self._kv_blocks * block_size} tokens and the longest sequence needs"
                f" {blocks_each * block_size}; set rollout.kv_tokens={blocks_each * block_size} or more"
            )
        if self._pool.num_blocks == self._kv_blocks:
            return
        self._cache = None  # before the new one is allocated beside it
        try:
            self._cache = PagedCache(
                self._model.config,
                num_blocks=self._kv_blocks,
                block_size=block_size,
                device=str(self._model.device),
                dtype=self._model.dtype,
            )
        except RuntimeError as error:
            gigabytes = self._kv_blocks * self._bytes_per_block() / 1e9
            raise ResourceError(
                f"no memory for a KV cache of {self._kv_blocks * block_size} tokens ({gigabytes:.1f} GB);"
                f" set a smaller rollout.kv_tokens"
            ) from error
        self._pool = BlockPool(self._kv_blocks, block_size)

    def _bytes_per_block(self) -> int:
        return bytes_per_block(self._model.config, self._config.block_size, self._model.dtype)

    def _affordable_blocks(self) -> int:
        """Blocks that the device's memory has room for beside everything else."""
        return cache_budget(str(self._model.device)) // self._bytes_per_block()

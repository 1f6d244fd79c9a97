"""Which tokens of which sequences are forwarded in the next cycle, and who holds which blocks for it."""

from collections import deque
from dataclasses import dataclass, field

from drafter.types import EMPTY, Draft
from rollout.blocks import BlockPool
from rollout.sequence import Sequence
from rollout.speculate import depths, prune


@dataclass(slots=True)
class Work:
    """A sequence's share of one cycle: its next num_tokens uncached tokens, then the nodes of its draft.

    depths: levels of the draft's nodes below the pending token.
    """

    sequence: Sequence
    num_tokens: int
    draft: Draft = EMPTY
    depths: list[int] = field(default_factory=list)

    @property
    def samples(self) -> bool:
        """Whether the cycle reaches the pending token, so that its successor is sampled."""
        return self.num_tokens == self.sequence.num_uncached


class Scheduler:
    """Continuous batching, first come first served, over a pool of blocks.

    Between cycles a running sequence owns exactly the blocks of its cached tokens, or those planned ahead for it too,
    and a waiting one owns none. When blocks run out, drafts that are attached go first and then the sequence admitted
    last, back to the head of the queue; so the oldest always advances. Decisions depend on nothing but the calls made:
    equal inputs, equal schedules.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, prefill_tokens: int) -> None:
        assert max_running > 0 and prefill_tokens > 0
        self._pool = pool
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preempted = 0  # for want of blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has seen that the whole pool can hold it at its longest."""
        assert len(sequence.block_table) <= self._pool.num_blocks
        self.waiting.append(sequence)

    def fits(self, ahead: int) -> bool:
        """Whether every running sequence can have blocks for its present tokens and ahead more: plan preempts none."""
        size = self._pool.block_size
        lacking = 0
        for sequence in self.running:
            missing = min(len(sequence.tokens) + ahead, sequence.max_length) - sequence.num_blocks * size
            if missing > 0:
                lacking += -(-missing // size)
        return lacking <= self._pool.num_free

    def holds(self, sequence: Sequence, ahead: int) -> bool:
        """Whether a sequence has blocks for its present tokens and ahead more."""
        return sequence.num_blocks >= self._num_blocks_ahead(sequence, ahead)

    def plan(self, *, ahead: int = 0) -> list[Work]:
        """Reserve blocks for the next cycle's tokens and say which they are; drafts are still empty.

        ahead: tokens past its present ones for which a decoding sequence gets blocks too, up to its longest: what
        cycles that are not planned one by one may write.
        """
        works: list[Work] = []
        budget = self._prefill_tokens
        preempted = False
        # by index: preemption shortens the list from its far end
        index = 0
        size = self._pool.block_size
        while index < len(self.running):
            sequence = self.running[index]
            length = len(sequence.tokens)
            if sequence.num_cached == length - 1 and sequence.num_blocks * size >= min(
                length + ahead, sequence.max_length
            ):
                works.append(Work(sequence, 1))  # most of them, most of the time
                index += 1
                continue
            num_tokens, budget = _chunk(sequence, budget)
            until = sequence.num_cached + num_tokens
            if sequence.num_uncached == 1:
                until = min(until + ahead, sequence.max_length)
            while not self._fits(sequence, until):
                self.preempt()
                self.num_preempted += 1
                preempted = True
                if index == len(self.running):
                    return works
            if num_tokens:
                self._reserve(sequence, until)
                works.append(Work(sequence, num_tokens))
            index += 1
        if not preempted:
            works += self._admit(budget, ahead)
        assert works or not (self.running or self.waiting), "a cycle that advances nothing"
        return works

    def attach(self, work: Work, draft: Draft, *, max_nodes: int) -> None:
        """Give a planned work the part of a draft that can be useful and for which there are blocks."""
        sequence = work.sequence
        length = len(sequence.tokens)
        free_blocks = min(self._pool.num_free, len(sequence.block_table) - sequence.num_blocks)
        room = (sequence.num_blocks + free_blocks) * self._pool.block_size - length
        # a node r levels down is followed by token r + 1: the last level worth verifying leaves room for one more
        work.draft = prune(draft, max_depth=sequence.num_remaining - 1, max_nodes=min(max_nodes, room))
        work.depths = depths(work.draft.parents)
        self._reserve(sequence, length + len(work.draft.token_ids))

    def advance(self, sequence: Sequence, num_cached: int) -> None:
        """The first num_cached tokens are cached now: make their full blocks findable, return the blocks past them."""
        self.extend(sequence, num_cached)
        self._truncate(sequence, self._pool.num_blocks_for(num_cached))

    def extend(self, sequence: Sequence, num_cached: int) -> None:
        """The first num_cached tokens are cached now: make their full blocks findable, keep those reserved ahead."""
        full_before = sequence.num_cached // self._pool.block_size
        sequence.num_cached = num_cached
        full = num_cached // self._pool.block_size
        if full > full_before:
            hashes = sequence.block_hashes(full)
            for index in range(full_before, full):
                self._pool.register(int(sequence.block_table[index]), hashes[index])

    def finish(self, sequence: Sequence) -> None:
        """A running sequence is complete: its blocks are free."""
        self.running.remove(sequence)
        self._truncate(sequence, 0)

    def drop(self, sequence: Sequence) -> None:
        """A sequence, running or waiting, will not be finished here: its blocks are free."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._truncate(sequence, 0)
        sequence.num_cached = 0

    def preempt(self) -> None:
        """Send the sequence admitted last back to the head of the queue; it will find or recompute its cache."""
        sequence = self.running.pop()
        self._truncate(sequence, 0)
        sequence.num_cached = 0
        self.waiting.appendleft(sequence)

    def preempt_all(self) -> None:
        """Send every running sequence back, in order: what is cached no longer holds."""
        while self.running:
            self.preempt()

    def clear(self) -> None:
        """Drop all sequences and return their blocks."""
        self.preempt_all()
        self.waiting.clear()

    def _admit(self, budget: int, ahead: int) -> list[Work]:
        """Start waiting sequences while there is room for all of their present tokens, and as many ahead as for others.

        A sibling of a sequence that is still computing their shared blocks waits until it can share them; sequences
        of other prompts may pass it.
        """
        if not self.waiting or len(self.running) >= self._max_running or budget <= 0:
            return []
        works: list[Work] = []
        passed: list[Sequence] = []
        prefilling = {s.prompt.id for s in self.running if s.num_cached < s.num_shared}
        promised = sum(self._num_lacking(s, ahead) for s in self.running)
        while self.waiting and len(self.running) < self._max_running and budget > 0:
            sequence = self.waiting.popleft()
            if sequence.prompt.id in prefilling:
                passed.append(sequence)
                continue
            if not self._start(sequence, promised, ahead):
                self.waiting.appendleft(sequence)
                break
            num_tokens, budget = _chunk(sequence, budget)
            if num_tokens:
                self._reserve(sequence, sequence.num_cached + num_tokens)
                works.append(Work(sequence, num_tokens))
            promised += self._num_lacking(sequence, ahead)
            if sequence.num_cached < sequence.num_shared:
                prefilling.add(sequence.prompt.id)
        self.waiting.extendleft(reversed(passed))
        return works

    def _start(self, sequence: Sequence, promised: int, ahead: int) -> bool:
        """Run a sequence on top of the blocks already known, unless the promised blocks leave too few for the rest."""
        pool = self._pool
        known = pool.match(sequence.block_hashes((len(sequence.tokens) - 1) // pool.block_size))
        if self._num_blocks_ahead(sequence, ahead) - len(known) > pool.num_free - promised and self.running:
            pool.release(known)
            return False
        sequence.block_table[: len(known)] = known
        sequence.num_blocks = len(known)
        sequence.num_cached = len(known) * pool.block_size
        self.running.append(sequence)
        return True

    def _num_lacking(self, sequence: Sequence, ahead: int) -> int:
        """Blocks for its present tokens and ahead more, and one to grow: with less it would soon be preempted."""
        return max(0, self._num_blocks_ahead(sequence, ahead) - sequence.num_blocks + 1)

    def _num_blocks_ahead(self, sequence: Sequence, ahead: int) -> int:
        return self._pool.num_blocks_for(min(len(sequence.tokens) + ahead, sequence.max_length))

    def _fits(self, sequence: Sequence, num_tokens: int) -> bool:
        return self._pool.num_blocks_for(num_tokens) - sequence.num_blocks <= self._pool.num_free

    def _reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Own blocks for the first num_tokens tokens."""
        held, wanted = sequence.num_blocks, self._pool.num_blocks_for(num_tokens)
        if wanted > held:
            sequence.block_table[held:wanted] = self._pool.allocate(wanted - held)
            sequence.num_blocks = wanted

    def _truncate(self, sequence: Sequence, num_blocks: int) -> None:
        """Give back the blocks past the first num_blocks."""
        if num_blocks < sequence.num_blocks:
            self._pool.release(sequence.block_table[num_blocks : sequence.num_blocks].tolist())
            sequence.num_blocks = num_blocks


def _chunk(sequence: Sequence, budget: int) -> tuple[int, int]:
    """How many of its uncached tokens a sequence forwards in this cycle, and what is left of the prefill budget."""
    if sequence.num_uncached == 1:
        return 1, budget
    num_tokens = min(sequence.num_uncached, budget)
    return num_tokens, budget - num_tokens

"""The scheduler, driven without a model: what a cycle would write is tracked slot by slot."""

import random
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drafter.types import Draft
from rollout.blocks import BlockPool
from rollout.scheduler import Scheduler, Work
from rollout.sequence import Sequence

BLOCK_SIZE = 4
MakeSequence = Callable[..., Sequence]


class CacheOfHistories:
    """A KV cache whose entries are the tokens they would be computed from, so that a wrong one can be seen."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[int, ...]] = {}

    def slot(self, sequence: Sequence, index: int) -> int:
        assert index // BLOCK_SIZE < sequence.num_blocks, "a token outside the blocks owned"
        return int(sequence.block_table[index // BLOCK_SIZE]) * BLOCK_SIZE + index % BLOCK_SIZE

    def forward(self, work: Work) -> None:
        sequence = work.sequence
        for index in range(sequence.num_cached):
            assert self.entries[self.slot(sequence, index)] == tuple(sequence.tokens[: index + 1])
        for index in range(sequence.num_cached, sequence.num_cached + work.num_tokens):
            self.entries[self.slot(sequence, index)] = tuple(sequence.tokens[: index + 1])
        for node in range(len(work.draft.token_ids)):
            self.entries[self.slot(sequence, len(sequence.tokens) + node)] = ("draft",)  # type: ignore[assignment]

    def accept(self, sequence: Sequence, length: int, count: int) -> None:
        for index in range(length, length + count):
            self.entries[self.slot(sequence, index)] = tuple(sequence.tokens[: index + 1])


def drive(scheduler: Scheduler, pool: BlockPool, choices: random.Random, *, max_cycles: int) -> list[Sequence]:
    """Run cycles with chain drafts of random length and random acceptance until all sequences finish."""
    cache = CacheOfHistories()
    finished: list[Sequence] = []
    for _ in range(max_cycles):
        if not (scheduler.running or scheduler.waiting):
            return finished
        works = scheduler.plan()
        for work in works:
            if work.samples:
                size = choices.randint(0, 6)
                draft = Draft(token_ids=[99] * size, parents=list(range(-1, size - 1)))
                scheduler.attach(work, draft, max_nodes=choices.randint(0, 6))
        assert_every_block_is_accounted_for(scheduler, pool)
        for work in works:
            cache.forward(work)
        for work in works:
            sequence, length = work.sequence, len(work.sequence.tokens)
            if not work.samples:
                scheduler.advance(sequence, sequence.num_cached + work.num_tokens)
                continue
            accepted = choices.randint(0, len(work.draft.token_ids))
            # few different tokens: equal continuations of siblings must be told apart from different ones
            new = [choices.randint(0, 1) for _ in range(accepted + 1)]
            sequence.commit(new, [0.0] * len(new), stop_token_ids=frozenset(), version=0)
            if sequence.finish:
                scheduler.finish(sequence)
                finished.append(sequence)
            else:
                cache.accept(sequence, length, accepted)
                scheduler.advance(sequence, length + accepted)
        assert_every_block_is_accounted_for(scheduler, pool)
        assert all(s.num_blocks == pool.num_blocks_for(s.num_cached) for s in scheduler.running)
    raise AssertionError(
        f"{len(scheduler.running)} running, {len(scheduler.waiting)} waiting after {max_cycles} cycles"
    )


def assert_every_block_is_accounted_for(scheduler: Scheduler, pool: BlockPool) -> None:
    held = {int(block) for s in scheduler.running for block in s.block_table[: s.num_blocks]}
    assert pool.num_free + len(held) == pool.num_blocks
    assert all(s.num_blocks == 0 for s in scheduler.waiting)
    for sequence in scheduler.running:  # whoever writes into a block is its only owner
        writable = sequence.block_table[sequence.num_cached // BLOCK_SIZE : sequence.num_blocks]
        for block in writable.tolist():
            owners = sum(block in s.block_table[: s.num_blocks] for s in scheduler.running)
            assert owners == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt_lens=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    num_samples=st.integers(1, 4),
    max_new_tokens=st.integers(1, 12),
    spare_blocks=st.integers(0, 12),
    max_running=st.integers(1, 8),
    prefill_tokens=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_every_sequence_finishes_on_intact_caches_and_returns_its_blocks(
    make_sequence: MakeSequence,
    prompt_lens: list[int],
    num_samples: int,
    max_new_tokens: int,
    spare_blocks: int,
    max_running: int,
    prefill_tokens: int,
    seed: int,
) -> None:
    longest = max(prompt_lens) + max_new_tokens
    pool = BlockPool(-(-longest // BLOCK_SIZE) + spare_blocks, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_running=max_running, prefill_tokens=prefill_tokens)
    for number, prompt_len in enumerate(prompt_lens):
        for sample in range(num_samples):
            # prompts share their beginnings across ids too
            tokens = [7] * (prompt_len // 2) + [number] * (prompt_len - prompt_len // 2)
            scheduler.add(make_sequence(str(number), tokens, sample=sample, max_new_tokens=max_new_tokens))
    # one sequence at a time, recomputed a token a cycle after each new token, is the slowest that may happen
    bound = len(prompt_lens) * num_samples * (longest + max_new_tokens * longest)
    finished = drive(scheduler, pool, random.Random(seed), max_cycles=bound)
    assert len(finished) == len(prompt_lens) * num_samples
    assert pool.num_free == pool.num_blocks


def test_equal_inputs_give_equal_schedules(make_sequence: MakeSequence) -> None:
    def schedule() -> list[tuple[str, int]]:
        pool = BlockPool(9, BLOCK_SIZE)
        scheduler = Scheduler(pool, max_running=3, prefill_tokens=7)
        for number in range(5):
            scheduler.add(make_sequence(str(number), [number] * 9))
        seen: list[tuple[str, int]] = []
        while scheduler.running or scheduler.waiting:
            for work in scheduler.plan():
                seen.append((work.sequence.prompt.id, work.num_tokens))
                if not work.samples:
                    scheduler.advance(work.sequence, work.sequence.num_cached + work.num_tokens)
                    continue
                length = len(work.sequence.tokens)
                work.sequence.commit([1], [0.0], stop_token_ids=frozenset(), version=0)
                if work.sequence.finish:
                    scheduler.finish(work.sequence)
                else:
                    scheduler.advance(work.sequence, length)
        return seen

    assert schedule() == schedule()


def test_siblings_wait_for_their_prompt_and_then_share_its_full_blocks(make_sequence: MakeSequence) -> None:
    pool = BlockPool(40, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_running=8, prefill_tokens=64)
    for prompt_id in ("a", "b"):
        for sample in range(3):
            scheduler.add(make_sequence(prompt_id, [ord(prompt_id)] * 10, sample=sample))
    first = scheduler.plan()
    assert [(work.sequence.prompt.id, work.sequence.sample) for work in first] == [("a", 0), ("b", 0)]
    for work in first:
        work.sequence.commit([1], [0.0], stop_token_ids=frozenset(), version=0)
        scheduler.advance(work.sequence, 10)
    second = scheduler.plan()
    assert len(second) == 6
    assert all(work.num_tokens == 2 for work in second[2:]), "8 of 10 prompt tokens are shared"
    tables = [work.sequence.block_table[:2].tolist() for work in second if work.sequence.prompt.id == "a"]
    assert tables[0] == tables[1] == tables[2]


def test_the_sequence_admitted_last_is_preempted_and_comes_back_first(make_sequence: MakeSequence) -> None:
    pool = BlockPool(5, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_running=2, prefill_tokens=64)
    for name in ("old", "young", "queued"):
        scheduler.add(make_sequence(name, [ord(name[0])] * 4, max_new_tokens=12))
    preempted = False
    for _ in range(12):
        works = scheduler.plan()
        assert works[0].sequence.prompt.id == "old"
        if scheduler.waiting[0].prompt.id == "young":
            preempted = True
            break
        for work in works:
            length = len(work.sequence.tokens)
            work.sequence.commit([1], [0.0], stop_token_ids=frozenset(), version=0)
            scheduler.advance(work.sequence, length)
    assert preempted and [s.prompt.id for s in scheduler.waiting] == ["young", "queued"]


def test_drafts_are_cut_to_the_free_blocks_and_to_what_can_still_be_taken(make_sequence: MakeSequence) -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_running=1, prefill_tokens=64)
    scheduler.add(make_sequence("a", [1, 2, 3], max_new_tokens=5))
    (work,) = scheduler.plan()
    wide = Draft(token_ids=list(range(9)), parents=[-1] * 9)
    scheduler.attach(work, wide, max_nodes=9)
    assert len(work.draft.token_ids) == 5, "two blocks hold eight tokens, three of them the prompt's"
    work.sequence.commit([1, 1, 1, 1], [0.0] * 4, stop_token_ids=frozenset(), version=0)
    scheduler.advance(work.sequence, 6)
    (work,) = scheduler.plan()
    scheduler.attach(work, wide, max_nodes=9)
    assert work.draft.token_ids == [], "the one token left to take needs no draft"


def test_a_long_prompt_is_forwarded_in_chunks_beside_decoding_sequences(make_sequence: MakeSequence) -> None:
    pool = BlockPool(20, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_running=4, prefill_tokens=4)
    scheduler.add(make_sequence("short", [1, 2]))
    scheduler.add(make_sequence("long", list(range(10))))
    (first, second) = scheduler.plan()
    assert (first.num_tokens, first.samples, second.num_tokens, second.samples) == (2, True, 2, False)
    first.sequence.commit([3], [0.0], stop_token_ids=frozenset(), version=0)
    scheduler.advance(first.sequence, 2)
    scheduler.advance(second.sequence, 2)
    assert [work.num_tokens for work in scheduler.plan()] == [1, 4]


def test_none_is_admitted_whom_the_blocks_ahead_would_send_back(make_sequence: MakeSequence) -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_running=4, prefill_tokens=64)
    for name in ("first", "second"):
        scheduler.add(make_sequence(name, list(range(9)), max_new_tokens=20))
    ahead = 8
    scheduler.plan(ahead=ahead)
    assert [sequence.prompt.id for sequence in scheduler.running] == ["first"]  # 9 and 8 tokens each: 5 blocks, not 3
    scheduler.advance(scheduler.running[0], 8)
    for _ in range(3):
        scheduler.plan(ahead=ahead)
        assert len(scheduler.running) == 1
    assert scheduler.fits(ahead)

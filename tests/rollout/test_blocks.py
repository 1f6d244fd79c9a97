"""The block pool: ownership under random operations, and finding prefixes again."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rollout.blocks import ROOT, BlockPool, chain_hash

BLOCK_SIZE = 4


def chain(tokens: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        hashes.append(chain_hash(hashes[-1] if hashes else ROOT, tokens[start : start + BLOCK_SIZE]))
    return hashes


class PoolMachine(RuleBasedStateMachine):
    """Random holders allocate, share, register and release; the model is a list of what each holds."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, BLOCK_SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what a holder wrote into a block it allocated

    @rule(target=holders, count=st.integers(0, 4), tag=st.integers(0, 2))
    def allocate(self, count: int, tag: int) -> list[int]:
        """A holder writes the start of the tag-th text into fresh blocks."""
        count = min(count, self.pool.num_free)
        blocks = self.pool.allocate(count)
        owned = {block for holder in self.held for block in holder}
        assert not owned & set(blocks) and len(set(blocks)) == count
        for block, content in zip(blocks, chain([tag] * BLOCK_SIZE * count), strict=True):
            self.content[block] = content
            self.pool.register(block, content)
        self.held.append(blocks)
        return blocks

    @rule(target=holders, tag=st.integers(0, 2), count=st.integers(0, 4))
    def share(self, tag: int, count: int) -> list[int]:
        """A holder that wants the tag-th text finds only blocks in which it is written."""
        hashes = chain([tag] * BLOCK_SIZE * count)
        blocks = self.pool.match(hashes)
        assert [self.content[block] for block in blocks] == hashes[: len(blocks)]
        self.held.append(blocks)
        return blocks

    @rule(blocks=consumes(holders))
    def release(self, blocks: list[int]) -> None:
        self.held.remove(blocks)
        self.pool.release(blocks)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert all(self.pool.match(chain([tag] * BLOCK_SIZE)) == [] for tag in range(3))

    @invariant()
    def every_block_is_free_or_owned(self) -> None:
        owned = {block for holder in self.held for block in holder}
        assert self.pool.num_free + len(owned) == self.pool.num_blocks


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_chain_hash_depends_on_everything_before_the_block() -> None:
    same_last_block = chain([1, 2, 3, 4, 9, 9, 9, 9])[1], chain([1, 2, 3, 5, 9, 9, 9, 9])[1]
    assert same_last_block[0] != same_last_block[1]


def test_a_released_prefix_is_found_until_its_blocks_are_needed() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    hashes = chain(list(range(12)))
    blocks = pool.allocate(3)
    for block, content in zip(blocks, hashes, strict=True):
        pool.register(block, content)
    pool.release(blocks)
    pool.release(pool.allocate(1))
    assert pool.match(hashes) == blocks[:2], "the end of the chain is evicted before its start"


def test_content_is_not_found_after_forget() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    hashes = chain(list(range(4)))
    owned, released = pool.allocate(2)
    pool.register(owned, hashes[0])
    pool.release([released])
    pool.forget()
    assert pool.match(hashes) == []
    pool.release([owned])
    assert pool.num_free == 2

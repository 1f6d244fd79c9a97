"""Who owns which block of the paged KV cache, and which blocks already hold a given prefix."""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

ROOT = b""  # parent hash of a sequence's first block


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Identity of a full block: its tokens and, through the parent's hash, all tokens before them."""
    return blake2b(parent + np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference counts and contents of num_blocks blocks of block_size tokens each.

    A block is owned (count > 0), free but still findable by the hash of its content, or blank. Allocation takes blank
    blocks first and then evicts the findable one that was released longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._findable: OrderedDict[int, None] = OrderedDict()  # free blocks with a hash, longest released first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks an allocation may take."""
        return len(self._blank) + len(self._findable)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Own count blocks whose content is undefined. The caller has seen that num_free suffices."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._findable.popitem(last=False)
                self._drop_hash(block)
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block, given in the order of the sequence they hold."""
        # last first: a chain is found from its start, so its end is the part to evict early
        for block in reversed(blocks):
            assert self._owners[block] > 0, f"block {block} released by nobody"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if block in self._hash_of:
                    self._findable[block] = None
                else:
                    self._blank.append(block)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Own the blocks of the longest known prefix of a chain."""
        blocks = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            if self._owners[block] == 0:
                del self._findable[block]
            self._owners[block] += 1
            blocks.append(block)
        return blocks

    def register(self, block: int, content: bytes) -> None:
        """Make an owned, full block findable. Where another block has this content already, that one stays."""
        assert self._owners[block] > 0, f"block {block} registered while free"
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def forget(self) -> None:
        """Let no content be found any more: the weights that made it have changed."""
        self._block_of.clear()
        self._hash_of.clear()
        self._blank.extend(self._findable)
        self._findable.clear()

    def _drop_hash(self, block: int) -> None:
        del self._block_of[self._hash_of.pop(block)]

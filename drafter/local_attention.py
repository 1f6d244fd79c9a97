"""Attention of the training-time test: packed windows, a sliding window, and keys that one chain alone may see.

The packed positions are cut into blocks; a block's queries attend to their own block and as many before it as the
sliding window reaches. So the work grows with the number of positions alone, whatever the mixture of lengths.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from kernels.attention import SDPA_KERNELS

BLOCK = 128  # positions of one block

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LocalAttention:
    """Who may see whom among T packed positions. starts [T] int64: where the window each belongs to begins; longest:
    positions of the longest window at most; window: positions a query sees, itself included."""

    starts: torch.Tensor
    longest: int
    window: int

    def __call__(
        self, query: torch.Tensor, shared: KeyValue, own: list[KeyValue], *, ahead: int, lag: int
    ) -> torch.Tensor:
        """Query t attends to the shared keys up to t - lag, and to each t-th own key.

        It stands ahead positions after t, which is how far the sliding window moves on; the own keys stand in between.
        Shapes: query [T, Hq, D]; keys and values [T, Hkv, D] each. Returns [T, Hq, D].
        """
        num_tokens, num_heads = query.shape[:2]
        keys, values = (
            torch.cat([self._reach(one), *(self._blocks(other) for other in rest)], dim=2)
            for one, *rest in zip(shared, *own, strict=True)
        )
        groups = num_heads // keys.shape[1]
        # memory-efficient attention, the kernel that takes masks, has no grouped heads
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        mask = torch.cat([self._visible(ahead, lag), *[self._same] * len(own)], dim=2)
        with sdpa_kernel(SDPA_KERNELS):
            output = F.scaled_dot_product_attention(self._blocks(query), keys, values, attn_mask=mask[:, None])
        return output.transpose(1, 2).flatten(0, 1)[:num_tokens]

    @property
    def _lookback(self) -> int:
        """Blocks before its own that a query may see."""
        return -(-(min(self.window, self.longest) - 1) // BLOCK)

    @cached_property
    def _padded_starts(self) -> torch.Tensor:
        """starts, in whole blocks [blocks, BLOCK]; what pads them sees itself alone, for a softmax over nothing is
        not a number."""
        index = torch.arange(-(-len(self.starts) // BLOCK) * BLOCK, device=self.starts.device)
        index[: len(self.starts)] = self.starts
        return index.view(-1, BLOCK)

    @cached_property
    def _same(self) -> torch.Tensor:
        """A block's queries against their own keys, [blocks, BLOCK, BLOCK] bool."""
        eye = torch.eye(BLOCK, dtype=torch.bool, device=self.starts.device)
        return eye.expand(len(self._padded_starts), -1, -1)

    def _visible(self, ahead: int, lag: int) -> torch.Tensor:
        """Which shared keys each query sees, [blocks, BLOCK, (lookback + 1) BLOCK] bool."""
        starts = self._padded_starts[:, :, None]
        before = self._lookback * BLOCK
        first = torch.arange(len(starts), device=starts.device)[:, None, None] * BLOCK
        query = first + torch.arange(BLOCK, device=starts.device)[:, None]
        key = first + torch.arange(-before, BLOCK, device=starts.device)
        distance = query - key
        return (key >= starts) & (distance >= lag) & (distance + ahead < self.window)

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, D] as [blocks, heads, BLOCK, D]."""
        missing = self._padded_starts.numel() - len(x)
        return F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, BLOCK)).transpose(1, 2)

    def _reach(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, D] as what each block's queries may see, [blocks, heads, (lookback + 1) BLOCK, D]."""
        before = self._lookback * BLOCK
        missing = self._padded_starts.numel() - len(x)
        return F.pad(x, (0, 0, 0, 0, before, missing)).unfold(0, before + BLOCK, BLOCK).transpose(2, 3)

"""Sequences too long for one rank: several hold a stretch of the tokens each, and in attention a share of the heads.

Around attention every rank trades its tokens of all heads for all tokens of its heads, and back. All else of a
transformer is token by token. Source: DeepSpeed-Ulysses (arXiv 2309.14509), here over packed sequences of any lengths.
"""

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from configs.errors import PreflightError
from kernels.attention import PackedSequences, packed_attention
from rl.types import Batch


class Sharing:
    """The ranks that share every sequence of a batch, this one among them: each group of size that follow one another.

    Every rank of the default group makes one at the same time. size 1 shares nothing.
    """

    def __init__(self, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        assert world % size == 0, f"{size} of {world} ranks"
        self.size = size
        self.rank = rank % size
        self.number, self.count = rank // size, world // size  # of this group, and how many there are
        self.group: dist.ProcessGroup | None = None
        if size > 1:
            groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
            self.group = groups[self.number]

    def stretch(self, num_tokens: int) -> tuple[int, int]:
        """Where this rank's tokens begin, and how many they are, the last one's padded: equally many on every rank."""
        each = -(-num_tokens // self.size)
        return self.rank * each, each

    def targets(self, batch: Batch) -> torch.Tensor:
        """The response tokens that this rank's tokens predict, [R] int64: over all ranks, each of them once."""
        (found,) = batch.loss_mask.nonzero(as_tuple=True)
        begin, each = self.stretch(len(batch.token_ids))
        predicting = found - 1
        return found[(predicting >= begin) & (predicting < begin + each)]


def require_heads(config: PretrainedConfig, size: int) -> None:
    """Raise PreflightError where so many ranks cannot share a model's attention."""
    heads = config.get_text_config().num_attention_heads
    if heads % size:
        raise PreflightError(
            f"train.sequence_parallel={size} does not divide the model's {heads} attention heads; set a divisor"
        )


class Attend:
    """Attention as rollout.model.Attend: of tokens that this rank has, among those that all ranks of the group have.

    seqs: of all tokens of the batch.
    """

    def __init__(self, seqs: PackedSequences, num_tokens: int, sharing: Sharing) -> None:
        padded = sharing.stretch(num_tokens)[1] * sharing.size
        if padded > num_tokens:  # what pads the last rank's tokens is a sequence of its own
            cu_seqlens = torch.cat([seqs.cu_seqlens, seqs.cu_seqlens.new_tensor([padded])])
            seqs = PackedSequences(cu_seqlens, max(seqs.max_seqlen, padded - num_tokens))
        self._seqs = seqs
        self._sharing = sharing

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [1, Hq, t, D]; key, value [1, Hkv, t, D]. Returns [1, t, Hq, D]."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        size = self._sharing.size
        if copies := size // gcd(key.shape[1], size) - 1:  # fewer key heads than ranks: each query head's is there
            key, value = (x.repeat_interleave(copies + 1, dim=1) for x in (key, value))
        query, key, value = (tokens_of_own_heads(x, self._sharing) for x in (query, key, value))
        out = packed_attention(
            query, key, value, self._seqs, scale=scaling, sliding_window=sliding_window, softcap=softcap
        )
        return heads_of_own_tokens(out, self._sharing)[None]


def tokens_of_own_heads(x: torch.Tensor, sharing: Sharing) -> torch.Tensor:
    """From all heads of this rank's tokens, [t, H, D], to all tokens of its heads, [N t, H / N, D]."""
    tokens, heads, dim = x.shape
    pieces = x.reshape(tokens, sharing.size, heads // sharing.size, dim).transpose(0, 1)
    return _Exchange.apply(pieces.contiguous(), sharing.group).flatten(0, 1)


def heads_of_own_tokens(x: torch.Tensor, sharing: Sharing) -> torch.Tensor:
    """From all tokens of this rank's heads, [N t, h, D], to all heads of its tokens, [t, N h, D]."""
    pieces = _Exchange.apply(x.unflatten(0, (sharing.size, -1)).contiguous(), sharing.group)
    return pieces.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Piece i of every rank to rank i, in the order of ranks; so go the gradients. [N, ...]."""

    @staticmethod
    def forward(ctx: Any, pieces: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(pieces)
        dist.all_to_all_single(out, pieces, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, gradient.contiguous(), group=ctx.group)
        return out, None

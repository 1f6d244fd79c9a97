"""The policy as training runs it: a batch in, log-probs and entropies of its response tokens out."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from kernels.attention import PackedSequences
from kernels.logprob import selected_logprobs
from rl.types import Batch
from rl.ulysses import Attend, Sharing
from rollout.model import forward_packed


@dataclass(slots=True)
class Round:
    """One forward and backward pass of one rank.

    targets [R] int64: the response tokens it scores, all of the batch's or those of its share of every sequence.
    weight 0 makes it a filler: a rank that runs out of micro-batches still takes part in every reduction.
    old_logprobs [R]: of the policy before the step; None while the policy still is that one.
    """

    batch: Batch
    targets: torch.Tensor
    weight: float
    old_logprobs: torch.Tensor | None = None


class PackedPolicy(nn.Module):
    """The module that DeepSpeed trains. sharing: who else has a part of every sequence."""

    def __init__(self, policy: PreTrainedModel, sharing: Sharing) -> None:
        super().__init__()
        self.policy = policy
        self.sharing = sharing

    def forward(self, each: Round, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logprobs [R] and entropy [R], float32; only tokens that predict a target reach the vocabulary."""
        batch = each.batch
        seqs = PackedSequences(cu_seqlens=batch.cu_seqlens, max_seqlen=int(batch.cu_seqlens.diff().max()))
        if self.sharing.size == 1:
            logits = forward_packed(self.policy, batch.token_ids, batch.positions, seqs, each.targets - 1)
        else:
            total = len(batch.token_ids)
            begin, count = self.sharing.stretch(total)
            padding = (0, count * self.sharing.size - total)
            own = slice(begin, begin + count)
            token_ids, positions = (nn.functional.pad(x, padding)[own] for x in (batch.token_ids, batch.positions))
            attend = Attend(seqs, total, self.sharing)
            logits = forward_packed(self.policy, token_ids, positions, attend, each.targets - 1 - begin)
        return selected_logprobs(logits, batch.token_ids[each.targets], temperature=temperature)

"""From planned work to sampled tokens: arrays made on the host, a forward over the paged cache, one draw a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch

from configs.errors import DivergedError
from kernels.attention import PagedSequences, paged_sequences
from kernels.sample import sample
from rollout.model import PagedCache, forward_paged
from rollout.scheduler import Work
from rollout.speculate import ancestry, is_chain
from rollout.types import Sampling

NOT_FINITE = "the policy's logits are not finite; resume from the last checkpoint with a lower train.lr"
SHORT = 16  # new tokens of a sequence up to which attention pads all sequences together


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the target sampled after the pending token and after each draft node: [1 + M] each."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Packed:
    """The new tokens of B works, end to end: T tokens, S of which are sampled after.

    token_ids, positions [T] int64; select [S] int64; keys, sample_positions [S] int64: the noise of each draw.
    rows [B]: how many of the S belong to each work.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    seqs: PagedSequences
    select: torch.Tensor
    keys: torch.Tensor
    sample_positions: torch.Tensor
    rows: list[int]


def draw(
    model: torch.nn.Module, cache: PagedCache, works: Sequence[Work], sampling: Sampling, *, block_size: int
) -> list[Drawn]:
    """Forward the works' tokens and drafts, and sample after each row that may be committed.

    The cache is mutated. Works that do not reach their pending token draw nothing. In the order of the works. Raises
    DivergedError when the policy's logits are not finite.
    """
    drawn: list[Drawn] = [Drawn([], [])] * len(works)
    for group in group_by_length(works):
        members = [works[index] for index in group]
        packed = pack(members, block_size=block_size, device=cache.storage.device)
        logits = forward_paged(model, packed.token_ids, packed.positions, packed.seqs, cache, packed.select)
        if not sum(packed.rows):
            continue
        tokens, logprobs = sample(
            logits,
            packed.keys,
            packed.sample_positions,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        token_list, logprob_list = tokens.tolist(), logprobs.tolist()
        if not all(map(isfinite, logprob_list)):
            raise DivergedError(NOT_FINITE)
        start = 0
        for index, rows in zip(group, packed.rows, strict=True):
            drawn[index] = Drawn(token_list[start : start + rows], logprob_list[start : start + rows])
            start += rows
    return drawn


def group_by_length(works: Sequence[Work]) -> list[list[int]]:
    """Indices of works to forward together. Attention pads to the longest, so a group's lengths differ by at most 2x.

    Decoding and verifying works, and the short remainders of shared prompts, stay in one group.
    """
    groups: dict[int, list[int]] = {}
    for index, work in enumerate(works):
        num_new = work.num_tokens + len(work.draft.token_ids)
        groups.setdefault((max(num_new, SHORT) - 1).bit_length(), []).append(index)
    return [groups[size] for size in sorted(groups)]


def pack(works: Sequence[Work], *, block_size: int, device: torch.device) -> Packed:
    """Assemble one forward's inputs.

    Draft node j of a sequence of n tokens stands at slot index n + j and has position n - 1 + depth.
    """
    sequences = [work.sequence for work in works]
    token_ids: list[int] = []
    node_depths: list[int] = []
    for work in works:
        start = work.sequence.num_cached
        token_ids += work.sequence.tokens[start : start + work.num_tokens]
        token_ids += work.draft.token_ids
        node_depths += work.depths
    num_tokens = np.array([work.num_tokens for work in works])
    num_nodes = np.array([len(work.draft.token_ids) for work in works])
    context = np.array([sequence.num_cached for sequence in sequences])
    num_new = num_tokens + num_nodes
    cu_seqlens = np.concatenate([[0], num_new.cumsum()])

    owner = np.repeat(np.arange(len(works)), num_new)  # [T]: whose token
    place = np.arange(len(token_ids)) - cu_seqlens[owner]  # [T]: index among its sequence's new tokens
    index = context[owner] + place
    max_new = int(num_new.max())
    width = -(-(int(context.max()) + max_new) // block_size)
    tables = np.zeros((len(works), width), dtype=np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        held = sequence.block_table[:width]
        row[: len(held)] = held
    slots = tables[owner, index // block_size] * np.int64(block_size) + index % block_size

    positions = index.copy()
    is_node = place >= num_tokens[owner]
    positions[is_node] = (context + num_tokens - 1)[owner[is_node]] + np.array(node_depths, dtype=np.int64)
    samples = np.array([work.samples for work in works])
    select = np.flatnonzero(samples[owner] & (place >= num_tokens[owner] - 1))
    keys = np.array([sequence.noise_key for sequence in sequences], dtype=np.int64)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    trees = _trees(works, num_new)
    seqs = paged_sequences(
        cu_seqlens_q=on_device(cu_seqlens.astype(np.int32)),
        max_seqlen_q=max_new,
        context_lens=on_device(context.astype(np.int32)),
        max_context=int(context.max()),
        block_tables=on_device(tables),
        slots=on_device(slots),
        block_size=block_size,
        ancestors=None if trees is None else on_device(trees[0]),
        num_drafted=None if trees is None else on_device(trees[1]),
        positions=None if trees is None else on_device(positions),
    )
    return Packed(
        token_ids=on_device(np.array(token_ids, dtype=np.int64)),
        positions=on_device(positions),
        seqs=seqs,
        select=on_device(select),
        keys=on_device(keys[owner[select]]),
        sample_positions=on_device(positions[select] + 1),
        rows=np.where(samples, 1 + num_nodes, 0).tolist(),
    )


def _trees(works: Sequence[Work], num_new: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """ancestors [T] int64 and num_drafted [B] int32 as paged_sequences takes them; None where all drafts are chains.

    Chains among trees count as ordinary tokens: causal order says what they see. num_new [B]: tokens and nodes.
    """
    trees = [index for index, work in enumerate(works) if not is_chain(work.depths)]
    if not trees:
        return None
    num_drafted = np.zeros(len(works), dtype=np.int32)
    num_drafted[trees] = [len(works[index].draft.parents) for index in trees]
    parents = np.full((len(trees), num_drafted.max()), -1)
    for row, index in zip(parents, trees, strict=True):
        row[: num_drafted[index]] = works[index].draft.parents
    assert parents.shape[1] <= 63
    bits = ancestry(parents) @ (np.int64(1) << np.arange(parents.shape[1]))
    ancestors = np.zeros(num_new.sum(), dtype=np.int64)
    ends = num_new.cumsum()
    for masks, index in zip(bits, trees, strict=True):
        ancestors[ends[index] - num_drafted[index] : ends[index]] = masks[: num_drafted[index]]
    return ancestors, num_drafted

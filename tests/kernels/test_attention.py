"""Packed and paged attention against attention written out in float64, one query token at a time."""

from typing import Any

import pytest
import torch

from kernels.attention import PackedSequences, PagedSequences, packed_attention, paged_attention, paged_sequences
from kernels.cache import write_kv

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3
VARIANTS = [(None, None), (4, None), (None, 2.0), (5, 1.5)]  # sliding_window, softcap


def attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """One token's attention to the keys it sees. query [Hq, D]; keys, values [L, Hkv, D]. Returns [Hq, D] float64."""
    groups = HEADS // KV_HEADS
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hl,lhd->hd", torch.softmax(scores, dim=1), values)


def packed_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    outputs, start = [], 0
    for length in lengths:
        for index in range(length):
            seen = slice(start + (0 if window is None else max(0, index + 1 - window)), start + index + 1)
            outputs.append(attend_one(query[start + index], key[seen], value[seen], softcap))
        start += length
    return torch.stack(outputs)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize("lengths", [[1], [7, 1, 13], [4, 4]])
def test_packed_attention_and_its_gradients_equal_the_definition(
    lengths: list[int], window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    seqs = PackedSequences(cumulative(lengths), max(lengths))
    output = packed_attention(query, key, value, seqs, scale=SCALE, sliding_window=window, softcap=softcap)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = packed_reference(q, k, v, lengths, window, softcap)
    torch.testing.assert_close(output, wanted.float(), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (wanted * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_in_bfloat16_on_the_gpu_equals_the_definition(window: int | None) -> None:
    lengths = [7, 1, 130]
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, 64) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = inputs = [torch.randn(shape, **options) for shape in shapes]
    seqs = PackedSequences(cumulative(lengths).cuda(), max(lengths))
    output = packed_attention(query, key, value, seqs, scale=SCALE, sliding_window=window, softcap=None)
    q, k, v = exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    wanted = packed_reference(q, k, v, lengths, window, None)
    torch.testing.assert_close(output.cpu().double(), wanted, atol=3e-2, rtol=3e-2)
    weight = torch.randn_like(wanted)
    (output * weight.to(output)).sum().backward()
    (wanted * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, atol=1e-1, rtol=5e-2)


class PagedCase:
    """Sequences of a given context and number of new tokens, in shuffled blocks among others left untouched."""

    def __init__(self, contexts: list[int], news: list[int], *, block_size: int, device: str = "cpu") -> None:
        self.contexts, self.news, self.block_size = contexts, news, block_size
        torch.manual_seed(sum(contexts) + sum(news))
        widths = [-(-(c + n) // block_size) for c, n in zip(contexts, news, strict=True)]
        shuffled = torch.randperm(sum(widths) + 3).tolist()
        self.tables = torch.full((len(contexts), max(widths) + 1), -1, dtype=torch.int32)
        self.all_slots: list[torch.Tensor] = []
        for row, (width, context, new) in enumerate(zip(widths, contexts, news, strict=True)):
            blocks = torch.tensor([shuffled.pop() for _ in range(width)])
            self.tables[row, :width] = blocks
            index = torch.arange(context + new)
            self.all_slots.append(blocks[index // block_size] * block_size + index % block_size)
        shape = (sum(widths) + 3, block_size, KV_HEADS, DIM)
        self.caches = torch.randn(shape), torch.randn(shape)
        self.new_slots = torch.cat([s[c:] for s, c in zip(self.all_slots, contexts, strict=True)])
        total = sum(news)
        self.query, key, value = (torch.randn(total, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        write_kv(key, value, *self.caches, self.new_slots)

    def sequences(self, tree_mask: torch.Tensor | None = None) -> PagedSequences:
        return paged_sequences(
            cu_seqlens_q=cumulative(self.news),
            max_seqlen_q=max(self.news),
            context_lens=torch.tensor(self.contexts, dtype=torch.int32),
            max_context=max(self.contexts),
            block_tables=self.tables,
            slots=self.new_slots,
            block_size=self.block_size,
            tree_mask=tree_mask,
        )

    def reference(
        self, window: int | None, softcap: float | None, tree_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each new token attends to its context and to the new tokens on its path, within the window by position."""
        keys, values = (cache.flatten(0, 1) for cache in self.caches)
        outputs = []
        queries = iter(self.query)
        for row, (context, new) in enumerate(zip(self.contexts, self.news, strict=True)):
            for index in range(new):
                path = list(range(index + 1))
                if tree_mask is not None:
                    path = tree_mask[row, index, :new].nonzero().flatten().tolist()
                seen = [*range(context), *(context + node for node in path)][-(window or 10**6) :]
                slots = self.all_slots[row][seen]
                outputs.append(attend_one(next(queries), keys[slots], values[slots], softcap))
        return torch.stack(outputs)


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize(
    ("contexts", "news"),
    [([5, 0, 17], [1, 1, 1]), ([0, 0], [9, 9]), ([3, 0, 30, 8], [4, 7, 1, 2]), ([16], [16])],
    ids=["decode", "prefill", "ragged", "whole blocks"],
)
def test_paged_attention_equals_the_definition(
    contexts: list[int], news: list[int], window: int | None, softcap: float | None
) -> None:
    case = PagedCase(contexts, news, block_size=4)
    output = paged_attention(
        case.query, *case.caches, case.sequences(), scale=SCALE, sliding_window=window, softcap=softcap
    )
    torch.testing.assert_close(output, case.reference(window, softcap).float(), atol=1e-5, rtol=1e-5)


def tree_mask(parents: list[list[int]], width: int) -> torch.Tensor:
    """Ancestors-or-self of every node, [B, width, width]; rows of padding see nothing."""
    mask = torch.zeros(len(parents), width, width, dtype=torch.bool)
    for row, tree in enumerate(parents):
        for node, parent in enumerate(tree):
            if parent >= 0:
                mask[row, node] = mask[row, parent]
            mask[row, node, node] = True
    return mask


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
def test_a_tree_sees_its_paths_and_the_window_counts_depth(window: int | None, softcap: float | None) -> None:
    parents = [[-1, 0, 0, 1, 1, 2, 3], [-1, 0, 1], [-1]]
    case = PagedCase([6, 0, 11], [len(tree) for tree in parents], block_size=4)
    mask = tree_mask(parents, 7)
    output = paged_attention(
        case.query, *case.caches, case.sequences(mask), scale=SCALE, sliding_window=window, softcap=softcap
    )
    torch.testing.assert_close(output, case.reference(window, softcap, mask).float(), atol=1e-5, rtol=1e-5)


def test_a_chain_as_a_tree_equals_the_causal_mask() -> None:
    case = PagedCase([6, 2], [5, 5], block_size=4)
    mask = tree_mask([[-1, 0, 1, 2, 3]] * 2, 5)
    outputs = [
        paged_attention(case.query, *case.caches, seqs, scale=SCALE, sliding_window=3, softcap=None)
        for seqs in (case.sequences(), case.sequences(mask))
    ]
    assert torch.equal(outputs[0], outputs[1])


def test_slots_of_other_sequences_do_not_leak() -> None:
    case = PagedCase([5, 2], [2, 3], block_size=4)
    seqs = case.sequences()
    options: dict[str, Any] = {"scale": SCALE, "sliding_window": None, "softcap": None}
    before = paged_attention(case.query, *case.caches, seqs, **options)
    mine = torch.cat(case.all_slots)
    others = torch.ones(case.caches[0].shape[0] * 4, dtype=torch.bool)
    others[mine] = False
    for cache in case.caches:
        cache.view(-1, KV_HEADS, DIM)[others] = 1e4
    assert torch.equal(paged_attention(case.query, *case.caches, seqs, **options), before)

"""Paged attention, reference and kernel, against attention written out in float64, one query token at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.attention import PagedSequences, most_rows, paged_attention, paged_attention_reference, paged_sequences
from kernels.attention_plan import Launch, choose_launch
from kernels.cache import write_kv
from kernels.paged_attention import paged_attention_triton
from kernels.sparse_split import choose_sparse_launch

SCALE = 0.3
VARIANTS = [(None, None), (4, None), (None, 2.0), (5, 1.5)]  # sliding_window, softcap


@dataclass(frozen=True)
class Kernel:
    """One way to compute it, and what it is given."""

    attend: Callable[..., torch.Tensor]
    device: str
    dtype: torch.dtype
    tolerance: float


def interpreted(*args: Any, fold: bool, **options: Any) -> torch.Tensor:
    """The kernel in small steps, so that few keys are cut into several chunks and steps."""
    launch = Launch(block_m=16, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1, fold=fold)
    return paged_attention_triton(*args, launch=launch, min_chunk=16, **options)


def sliced(*args: Any, **options: Any) -> torch.Tensor:
    """Each step in two slices, which are merged at the end."""
    launch = Launch(block_m=16, block_n=32, num_warps=2, num_stages=2, programs_per_sm=1, fold=True, slices=2)
    return paged_attention_triton(*args, launch=launch, min_chunk=32, **options)


def folded(*args: Any, **options: Any) -> torch.Tensor:
    return interpreted(*args, fold=True, **options)


def combined(*args: Any, **options: Any) -> torch.Tensor:
    return interpreted(*args, fold=False, **options)


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
KERNELS = [
    pytest.param(Kernel(paged_attention_reference, "cpu", torch.float32, 1e-5), id="reference"),
    pytest.param(Kernel(folded, "cpu", torch.float32, 1e-5), id="folded", marks=on_cpu),
    pytest.param(Kernel(combined, "cpu", torch.float32, 1e-5), id="combined", marks=on_cpu),
    pytest.param(Kernel(sliced, "cpu", torch.float32, 1e-5), id="sliced", marks=on_cpu),
    pytest.param(Kernel(folded, "cuda", torch.float32, 1e-4), id="float32", marks=pytest.mark.gpu),
    pytest.param(Kernel(paged_attention, "cuda", torch.bfloat16, 3e-2), id="bfloat16", marks=pytest.mark.gpu),
]


def depths(parents: list[int]) -> list[int]:
    levels: list[int] = []
    for parent in parents:
        levels.append(0 if parent < 0 else levels[parent] + 1)
    return levels


def path(parents: list[int], node: int) -> list[int]:
    """A node and its ancestors, in order."""
    return ([] if parents[node] < 0 else path(parents, parents[node])) + [node]


class Case:
    """Sequences of a given context and number of new tokens, in shuffled blocks among others.

    The last len(parents[b]) new tokens of sequence b are a tree of drafts; without parents all are causal.
    """

    def __init__(
        self,
        kernel: Kernel,
        contexts: list[int],
        news: list[int],
        *,
        parents: list[list[int]] | None = None,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 8,
        block_size: int = 4,
    ) -> None:
        self.kernel, self.contexts, self.news, self.block_size = kernel, contexts, news, block_size
        self.parents = parents or [[] for _ in news]
        torch.manual_seed(sum(contexts) + sum(news))
        widths = [-(-(c + n) // block_size) for c, n in zip(contexts, news, strict=True)]
        shuffled = torch.randperm(sum(widths) + 3).tolist()
        # strided, as a cycle's tables are: the first columns of the whole table
        self.tables = torch.full((len(contexts), max(widths) + 5), -1, dtype=torch.int32)[:, : max(widths) + 1]
        slots: list[torch.Tensor] = []
        for row, (width, context, new) in enumerate(zip(widths, contexts, news, strict=True)):
            blocks = torch.tensor([shuffled.pop() for _ in range(width)])
            self.tables[row, :width] = blocks
            index = torch.arange(context + new)
            slots.append(blocks[index // block_size] * block_size + index % block_size)
        self.all_slots = slots
        self.new_slots = torch.cat([s[c:] for s, c in zip(slots, contexts, strict=True)])
        num_heads, num_kv_heads = heads
        options: dict[str, Any] = {"device": kernel.device, "dtype": kernel.dtype}
        shape = (sum(widths) + 3, block_size, num_kv_heads, head_dim)
        self.caches = torch.randn(shape).to(**options), torch.randn(shape).to(**options)
        total = sum(news)
        # as transformers hands it over: heads before tokens in memory
        self.query = torch.randn(num_heads, total, head_dim).to(**options).transpose(0, 1)
        key, value = (torch.randn(total, num_kv_heads, head_dim).to(**options) for _ in range(2))
        write_kv(key, value, *self.caches, self.new_slots.to(kernel.device))

    def sequences(self) -> PagedSequences:
        trees: dict[str, torch.Tensor] = {}
        if any(self.parents):
            ancestors, positions = [], []
            for context, new, tree in zip(self.contexts, self.news, self.parents, strict=True):
                ordinary = new - len(tree)
                ancestors += [0] * ordinary + [sum(1 << n for n in path(tree, node)) for node in range(len(tree))]
                positions += [context + index for index in range(ordinary)]
                positions += [context + ordinary + depth for depth in depths(tree)]
            trees["ancestors"], trees["positions"] = torch.tensor(ancestors), torch.tensor(positions)
            trees["num_drafted"] = torch.tensor([len(tree) for tree in self.parents], dtype=torch.int32)
        cu_seqlens = torch.tensor([0, *self.news]).cumsum(0).to(torch.int32)
        contexts = torch.tensor(self.contexts, dtype=torch.int32)
        device = self.kernel.device
        return paged_sequences(
            cu_seqlens_q=cu_seqlens.to(device),
            max_seqlen_q=max(self.news),
            context_lens=contexts.to(device),
            max_context=max(self.contexts) + (device == "cuda"),  # there it is a bound
            block_tables=self.tables.to(device),
            slots=self.new_slots.to(device),
            block_size=self.block_size,
            **{name: tensor.to(device) for name, tensor in trees.items()},
        )

    def output(self, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        result = self.kernel.attend(
            self.query, *self.caches, self.sequences(), scale=SCALE, sliding_window=window, softcap=softcap
        )
        return result.double().cpu()

    def wanted(self, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        """Each new token attends to the context and to the new tokens on its path, the last `window` of them."""
        keys, values = (cache.flatten(0, 1).double().cpu() for cache in self.caches)
        groups = self.query.shape[1] // keys.shape[1]
        outputs = []
        queries = iter(self.query.double().cpu())
        for row, (context, new) in enumerate(zip(self.contexts, self.news, strict=True)):
            ordinary = new - len(self.parents[row])
            for index in range(new):
                before = min(index + 1, ordinary)
                nodes = path(self.parents[row], index - ordinary) if index >= ordinary else []
                seen = [*range(context + before), *(context + ordinary + node for node in nodes)]
                slots = self.all_slots[row][seen[-(window or 10**6) :]]
                k, v = (x[slots].repeat_interleave(groups, dim=1) for x in (keys, values))
                scores = torch.einsum("hd,lhd->hl", next(queries), k) * SCALE
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                outputs.append(torch.einsum("hl,lhd->hd", torch.softmax(scores, dim=1), v))
        return torch.stack(outputs)

    def check(self, window: int | None = None, softcap: float | None = None) -> None:
        tolerance = self.kernel.tolerance
        torch.testing.assert_close(
            self.output(window, softcap), self.wanted(window, softcap), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize(
    ("contexts", "news"),
    [([5, 0, 67], [1, 1, 1]), ([0, 0], [9, 9]), ([3, 0, 30, 8], [4, 7, 1, 2]), ([16], [16])],
    ids=["decode", "prefill", "ragged", "whole blocks"],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_token_attends_to_its_past(
    kernel: Kernel, contexts: list[int], news: list[int], window: int | None, softcap: float | None
) -> None:
    Case(kernel, contexts, news).check(window, softcap)


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tree_sees_its_paths_and_the_window_counts_depth(
    kernel: Kernel, window: int | None, softcap: float | None
) -> None:
    parents = [[-1, 0, 0, 1, 1, 2, 3], [-1, -1, 0], [], [-1, 0]]
    Case(kernel, [6, 0, 37, 40], [8, 3, 2, 4], parents=parents).check(window, softcap)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tree_of_63_nodes_uses_every_bit(kernel: Kernel) -> None:
    Case(kernel, [9, 2], [64, 64], parents=[[-1, *range(62)], [-1, -1, *range(61)]], heads=(2, 1)).check()


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (10, 2), (7, 1), (16, 1), (4, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_number_of_query_heads_shares_a_key_head(kernel: Kernel, heads: tuple[int, int]) -> None:
    Case(kernel, [21, 50], [5, 2], heads=heads).check(window=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_launch_holds_all_query_heads_that_may_share_a_key_head(head_dim: int, dtype: torch.dtype) -> None:
    for groups in range(1, most_rows(head_dim, dtype) + 1):
        assert choose_launch(groups, head_dim, dtype, num_programs=1, max_keys=64).block_m >= groups
        assert choose_sparse_launch(groups, head_dim, dtype).block_m >= groups


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_dimensions_need_not_be_powers_of_two(kernel: Kernel, head_dim: int) -> None:
    Case(kernel, [21, 50], [1, 3], heads=(2, 1), head_dim=head_dim, block_size=16).check()


@pytest.mark.parametrize("kernel", KERNELS)
def test_unequal_contexts_beyond_one_wave_of_programs_are_all_read(kernel: Kernel) -> None:
    contexts = [300, 0, 17, 1, 90, 33, 5, 64, 2, 40]
    Case(kernel, contexts, [1] * 10, heads=(4, 2)).check()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_as_a_tree_equals_the_causal_mask(kernel: Kernel) -> None:
    chain = Case(kernel, [6, 2], [5, 5], parents=[[-1, 0, 1, 2, 3]] * 2)
    causal = Case(kernel, [6, 2], [5, 5])
    assert torch.equal(chain.output(window=3), causal.output(window=3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_of_other_sequences_do_not_leak(kernel: Kernel) -> None:
    case = Case(kernel, [5, 2], [2, 3])
    before = case.output()
    others = torch.ones(case.caches[0].shape[0] * case.block_size, dtype=torch.bool)
    others[torch.cat(case.all_slots)] = False
    for cache in case.caches:
        cache.flatten(0, 1)[others.to(cache.device)] = 1e4
    assert torch.equal(case.output(), before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_share_the_plan_of_a_forward(kernel: Kernel) -> None:
    case = Case(kernel, [60, 3], [1, 1])
    seqs = case.sequences()
    first, second = (
        kernel.attend(case.query, *case.caches, seqs, scale=SCALE, sliding_window=None, softcap=None) for _ in range(2)
    )
    assert torch.equal(first, second) and len(seqs.plans) == (kernel.attend is not paged_attention_reference)

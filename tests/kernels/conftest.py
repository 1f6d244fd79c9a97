"""Sequences in shuffled blocks of a paged cache, and who sees whom in them, one token at a time; kernels looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.attention import PagedSequences, paged_sequences


def path(parents: list[int], node: int) -> list[int]:
    """A node and its ancestors, in order."""
    return ([] if parents[node] < 0 else path(parents, parents[node])) + [node]


@dataclass(frozen=True)
class Paged:
    """Sequences of a given context and number of new tokens, among others' blocks; everything is in the cache.

    seen: for each new token, its row and the indices of the keys it attends to. slots: of each row's keys.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    seqs: PagedSequences
    seen: list[tuple[int, list[int]]]
    slots: list[torch.Tensor]

    @property
    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_cache, self.value_cache

    def scores(self, scale: float) -> list[torch.Tensor]:
        """Of each new token, [Hq, keys in its row] float64, -inf where it does not see."""
        keys = self.key_cache.flatten(0, 1).double().cpu()
        groups = self.query.shape[1] // keys.shape[1]
        scores = []
        for query, (row, seen) in zip(self.query.double().cpu(), self.seen, strict=True):
            key = keys[self.slots[row]].repeat_interleave(groups, dim=1)
            masked = torch.full((query.shape[0], len(key)), -torch.inf, dtype=torch.float64)
            masked[:, seen] = (torch.einsum("hd,lhd->hl", query, key) * scale)[:, seen]
            scores.append(masked)
        return scores


@pytest.fixture(scope="session")
def make_paged() -> Callable[..., Paged]:
    """Make a Paged; the last len(parents[b]) new tokens of sequence b are a tree of drafts, all others causal."""

    def make(
        contexts: list[int],
        news: list[int],
        *,
        parents: list[list[int]] | None = None,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 16,
        block_size: int = 16,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Paged:
        trees = parents or [[] for _ in news]
        generator = torch.Generator().manual_seed(sum(contexts) + sum(news))
        widths = [-(-(c + n) // block_size) for c, n in zip(contexts, news, strict=True)]
        shuffled = torch.randperm(sum(widths) + 3, generator=generator).tolist()
        # strided, as a cycle's tables are: the first columns of the whole table
        tables = torch.zeros((len(contexts), max(widths) + 5), dtype=torch.int32)[:, : max(widths) + 1]
        slots: list[torch.Tensor] = []
        seen: list[tuple[int, list[int]]] = []
        ancestors: list[int] = []
        positions: list[int] = []
        for row, (width, context, new, tree) in enumerate(zip(widths, contexts, news, trees, strict=True)):
            blocks = torch.tensor([shuffled.pop() for _ in range(width)])
            tables[row, :width] = blocks
            index = torch.arange(context + new)
            slots.append(blocks[index // block_size] * block_size + index % block_size)
            ordinary = new - len(tree)
            seen += [(row, list(range(context + i + 1))) for i in range(ordinary)]
            paths = [path(tree, node) for node in range(len(tree))]
            before = list(range(context + ordinary))
            seen += [(row, before + [context + ordinary + node for node in nodes]) for nodes in paths]
            ancestors += [0] * ordinary + [sum(1 << node for node in nodes) for nodes in paths]
            positions += list(range(context, context + ordinary))
            positions += [context + ordinary + len(nodes) - 1 for nodes in paths]
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (sum(widths) + 3, block_size, heads[1], head_dim)
        drafts: dict[str, torch.Tensor] = {}
        if any(trees):
            drafts["ancestors"] = torch.tensor(ancestors, device=device)
            drafts["positions"] = torch.tensor(positions, device=device)
            drafts["num_drafted"] = torch.tensor([len(tree) for tree in trees], dtype=torch.int32, device=device)
        seqs = paged_sequences(
            cu_seqlens_q=torch.tensor([0, *news]).cumsum(0).to(device, torch.int32),
            max_seqlen_q=max(news),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            max_context=max(contexts) + (device == "cuda"),  # there it is a bound
            block_tables=tables.to(device),
            slots=torch.cat([s[c:] for s, c in zip(slots, contexts, strict=True)]).to(device),
            block_size=block_size,
            **drafts,
        )
        return Paged(
            # as transformers hands it over: heads before tokens in memory
            query=torch.randn(heads[0], sum(news), head_dim, generator=generator).to(**options).transpose(0, 1),
            key_cache=torch.randn(shape, generator=generator).to(**options),
            value_cache=torch.randn(shape, generator=generator).to(**options),
            seqs=seqs,
            seen=seen,
            slots=slots,
        )

    return make


@pytest.fixture
def poisoned_new_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten is NaN."""

    new_empty = torch.Tensor.new_empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        tensor = new_empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


class Counted:
    """Stands for a kernel and notes its launches."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launched.append(self.name)


@pytest.fixture(scope="session")
def counted() -> type[Counted]:
    """What stands for a kernel: counted(name, launched)."""
    return Counted

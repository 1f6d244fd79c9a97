"""The head's steps between its products: Triton against the references, and the references against their words."""

from dataclasses import fields
from typing import Any

import pytest
import torch

import kernels.eagle_grow_triton
from kernels.attention import paged_attention_reference, paged_sequences
from kernels.cycle import Drafts, Rows, Texts
from kernels.eagle import (
    LOG2_E,
    Beams,
    Candidates,
    KvRings,
    catch_up_reference,
    grow_reference,
    join_inputs_reference,
    num_candidates,
    rank_reference,
)
from kernels.eagle_grow_triton import grow_triton, rank_triton
from kernels.eagle_triton import catch_up_triton, join_inputs_triton
from kernels.features import Rings
from kernels.linear import Norm
from kernels.paged_attention import paged_attention_triton
from kernels.sample import sample_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TEXTS, SLOTS, MAX_LENGTH, RING, HIDDEN, WINDOW = 8, 6, 120, 20, 8, 24


def random_state(seed: int) -> tuple[Texts, Rows, Rings, KvRings]:
    """Rows that draft and rows that cannot: inactive, without a slot, without a known position; rings of any past."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.int32).to(DEVICE)

    texts = Texts(
        integers(0, 50, NUM_TEXTS, MAX_LENGTH), integers(40, MAX_LENGTH, NUM_TEXTS), integers(0, 3, NUM_TEXTS)
    )
    slot_of = torch.full((NUM_TEXTS,), SLOTS, dtype=torch.int32)
    slot_of[torch.randperm(NUM_TEXTS, generator=random)[:SLOTS]] = torch.arange(SLOTS, dtype=torch.int32)
    slot_of = slot_of.to(DEVICE)
    newest = torch.zeros(SLOTS + 1, dtype=torch.int32, device=DEVICE)
    owned = slot_of < SLOTS
    newest[slot_of[owned].long()] = texts.lengths[owned] - 2
    starts = newest - integers(-1, 40, SLOTS + 1).clamp(max=39)
    states = torch.randn(SLOTS + 1, RING, 5 * HIDDEN, generator=random).to(DEVICE)
    rings = Rings(slot_of, starts, integers(1, 3, SLOTS + 1), states, integers(0, 3, SLOTS + 1, RING))
    digested = newest - integers(-1, 12, SLOTS + 1)
    origins = torch.maximum(digested - integers(0, 70, SLOTS + 1), torch.zeros_like(digested)).int()
    kv = KvRings(
        torch.zeros(2, (SLOTS + 1) * 7, 8, 2, 16, device=DEVICE), origins, digested, integers(1, 3, SLOTS + 1), WINDOW
    )
    text = torch.randperm(NUM_TEXTS, generator=random).int().to(DEVICE)
    rows = Rows(text, integers(0, 9, NUM_TEXTS).long(), text, (integers(0, 5, NUM_TEXTS) > 0).int(), text[:, None])
    return texts, rows, rings, kv


@pytest.mark.parametrize(("levels", "top_k"), [(1, 1), (1, 4), (5, 1), (3, 3), (8, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_steps_are_laid_out_alike(seed: int, levels: int, top_k: int) -> None:
    published = torch.tensor([int(seed < 2)], dtype=torch.int32, device=DEVICE)
    results, states = [], []
    for lay_out in (catch_up_reference, catch_up_triton):
        texts, rows, rings, kv = random_state(seed)
        shape = {"num_rows": 7, "num_positions": max(8, levels + 1), "levels": levels, "top_k": top_k}
        results.append(lay_out(texts, rows, rings, kv, published, **shape))
        states.append(kv)
    for field in fields(results[0]):
        ours, theirs = (getattr(result, field.name) for result in results)
        assert ours.tolist() == theirs.tolist(), field.name
    # nobody's state is anybody's guess
    for name in ("origins", "digested", "begun"):
        assert getattr(states[0], name)[:SLOTS].tolist() == getattr(states[1], name)[:SLOTS].tolist(), name
    assert results[0].drafting.any() == (seed < 2)
    assert (results[0].drafting == 0).any()


@pytest.mark.parametrize("taken", [None, [3, 3, 0, 4, 1, 2, 0]])
def test_inputs_are_joined_alike(taken: list[int] | None) -> None:
    random = torch.Generator().manual_seed(0)
    embedding, states = (torch.randn(n, 24, generator=random).to(DEVICE) for n in (11, 7))
    norms = [Norm(torch.randn(24, generator=random).to(DEVICE), 1e-5) for _ in range(2)]
    token_ids = torch.randint(0, 11, (7,), generator=random).to(DEVICE)
    rows = None if taken is None else torch.tensor(taken, device=DEVICE)
    both = [
        join(token_ids, embedding, states, rows, embed_norm=norms[0], state_norm=norms[1])
        for join in (join_inputs_reference, join_inputs_triton)
    ]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(theirs, ours)


def empty_candidates(num_rows: int, levels: int, top_k: int) -> Candidates:
    count = num_candidates(levels, top_k)
    shape: dict[str, Any] = {"size": (num_rows, count), "device": DEVICE}
    return Candidates(
        torch.full(fill_value=-(2**62), dtype=torch.int64, **shape),
        torch.full(fill_value=-5, dtype=torch.int32, **shape),
        torch.full(fill_value=-5, dtype=torch.int32, **shape),
    )


@pytest.mark.parametrize("noise", [1.0, 0.0])
@pytest.mark.parametrize(("vocab_size", "levels", "top_k"), [(9, 4, 1), (150, 3, 3), (100, 2, 6)])
def test_trees_grow_and_rank_alike(
    vocab_size: int, levels: int, top_k: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels.eagle_grow_triton, "TILE", 64)
    num_rows = 2
    random = torch.Generator().manual_seed(top_k)
    keys = torch.randint(-(2**62), 2**62, (num_rows + 1,), generator=random).to(DEVICE)
    vocabulary = torch.randperm(5000, generator=random)[:vocab_size].int().to(DEVICE)
    transform = torch.tensor([LOG2_E / 0.7, noise], device=DEVICE)
    tables = [empty_candidates(num_rows, levels, top_k) for _ in range(2)]
    beams: list[Beams | None] = [None, None]
    for level in range(levels):
        logits = torch.randn(num_rows * (top_k if level else 1), vocab_size, generator=random).to(DEVICE) * 2
        positions = torch.randint(0, 1000, (num_rows,), generator=random).to(DEVICE)
        for index, grow in enumerate((grow_reference, grow_triton)):
            beams[index] = grow(
                logits, keys, positions, vocabulary, transform, beams[index], tables[index], level=level, top_k=top_k
            )
        for name in ("token_ids", "rows", "numbers", "ancestors"):
            assert getattr(beams[0], name).tolist() == getattr(beams[1], name).tolist(), name
        assert beams[0] is not None and beams[1] is not None
        torch.testing.assert_close(beams[1].scores, beams[0].scores, atol=2e-5, rtol=1e-5)
        assert (beams[0].scores <= 0).all()
    assert tables[0].token_ids.tolist() == tables[1].token_ids.tolist()
    assert tables[0].parents.tolist() == tables[1].parents.tolist()
    drafting = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    for num_nodes in (1, 5, num_candidates(levels, top_k) + 2):
        drafts = []
        for table, ranked in zip(tables, (rank_reference, rank_triton), strict=True):
            ids, parents = torch.full((2, num_rows, num_nodes), -9, dtype=torch.int32, device=DEVICE)
            drafts.append(Drafts(ids, parents, torch.empty(num_rows, dtype=torch.int32, device=DEVICE)))
            ranked(table, drafting, drafts[-1])
        counts = drafts[0].num_nodes.tolist()
        assert (
            counts
            == drafts[1].num_nodes.tolist()
            == [min(num_nodes, num_candidates(levels, top_k)) * d for d in (1, 0)]
        )
        for row, count in enumerate(counts):
            for name in ("token_ids", "parents"):
                ours, theirs = (getattr(draft, name)[row, :count].tolist() for draft in drafts)
                assert ours == theirs, name
            parents_of_row = drafts[0].parents[row, :count].tolist()
            assert all(-1 <= parent < node for node, parent in enumerate(parents_of_row))
            pairs = list(zip(parents_of_row, drafts[0].token_ids[row, :count].tolist(), strict=True))
            assert len(set(pairs)) == count, "siblings carry different tokens"


def test_equal_scores_go_to_the_first_token_and_the_first_candidate() -> None:
    logits = torch.zeros(1, 1100, device=DEVICE)
    keys, positions = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    vocabulary = torch.arange(1100, dtype=torch.int32, device=DEVICE)
    transform = torch.tensor([LOG2_E, 0.0], device=DEVICE)
    for grow in (grow_reference, grow_triton):
        table = empty_candidates(1, 2, 2)
        beams = grow(logits, keys, positions, vocabulary, transform, None, table, level=0, top_k=2)
        assert beams.token_ids.tolist() == [0, 1]
        beams = grow(logits.repeat(2, 1), keys, positions, vocabulary, transform, beams, table, level=1, top_k=2)
        assert beams.numbers.tolist() == [2, 3]


@pytest.mark.parametrize("grow", [grow_reference, grow_triton])
def test_a_chain_takes_what_the_sampler_would_draw(grow) -> None:  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(5)
    logits = (torch.randn(6, 1400, generator=random) * 3).to(DEVICE)
    keys = torch.randint(-(2**62), 2**62, (6,), generator=random).to(DEVICE)
    positions = torch.randint(0, 1000, (6,), generator=random).to(DEVICE)
    vocabulary = torch.randperm(5000, generator=random)[:1400].sort().values.int().to(DEVICE)
    transform = torch.tensor([LOG2_E / 0.9, 1.0], device=DEVICE)
    beams = grow(logits, keys, positions, vocabulary, transform, None, empty_candidates(6, 1, 1), level=0, top_k=1)
    unfiltered: dict[str, Any] = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    drawn, _ = sample_reference(logits, keys, positions, token_ids=vocabulary, **unfiltered)
    assert beams.token_ids.tolist() == drawn.tolist()


@pytest.mark.parametrize("window", [None, 40])
def test_nodes_of_earlier_levels_are_seen_where_they_are_ancestors(window: int | None) -> None:
    """Levels of a tree attended one after the other give what the whole tree gives at once."""
    random = torch.Generator().manual_seed(1)
    context, top_k, levels, size = torch.tensor([37, 5], dtype=torch.int32), 3, 3, 8
    num_rows, num_nodes = 2, top_k * levels
    parents = torch.tensor([[-1, -1, -1, 0, 2, 0, 4, 4, 3], [-1, -1, -1, 1, 1, 1, 5, 3, 5]])
    ancestors = torch.zeros(num_rows, num_nodes, dtype=torch.int64)
    for node in range(num_nodes):
        ancestors[:, node] = 1 << node
        above = parents[:, node]
        ancestors[:, node] |= torch.where(above >= 0, ancestors.gather(1, above.clamp(min=0)[:, None])[:, 0], 0)
    tables = torch.randperm(16, generator=random).view(num_rows, 8).int()
    query = torch.randn(num_rows, num_nodes, 4, 16, generator=random)
    caches = torch.randn(2, 16, size, 2, 16, generator=random)
    depth = torch.arange(num_nodes) // top_k

    def attend(first: int, last: int, attention):  # type: ignore[no-untyped-def]
        count = last - first
        seqs = paged_sequences(
            cu_seqlens_q=(torch.arange(num_rows + 1, dtype=torch.int32) * count).to(DEVICE),
            max_seqlen_q=count,
            context_lens=(context + first).to(DEVICE),
            max_context=60,
            block_tables=tables.to(DEVICE),
            slots=torch.zeros(num_rows * count, dtype=torch.int64, device=DEVICE),
            block_size=size,
            ancestors=ancestors[:, first:last].flatten().to(DEVICE),
            num_drafted=torch.full((num_rows,), last, dtype=torch.int32, device=DEVICE),
            positions=(context[:, None] + depth[first:last]).long().flatten().to(DEVICE),
        )
        new = query[:, first:last].flatten(0, 1).to(DEVICE)
        key_cache, value_cache = caches.to(DEVICE)
        return attention(new, key_cache, value_cache, seqs, scale=0.25, sliding_window=window, softcap=None).view(
            num_rows, count, 4, 16
        )

    if DEVICE.type == "cpu":
        whole = attend(0, num_nodes, paged_attention_reference)
        attentions = [paged_attention_reference, paged_attention_triton]
    else:
        whole = attend(0, num_nodes, paged_attention_triton)
        attentions = [paged_attention_triton]
    for attention in attentions:
        for level in range(levels):
            first = level * top_k
            one = attend(first, first + top_k, attention)
            torch.testing.assert_close(one, whole[:, first : first + top_k], atol=1e-5, rtol=1e-4)

"""The two ends of a cycle on the device, against the engine's host code and against one another."""

from copy import deepcopy
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cycle import (
    MAX_NODES,
    RUNNING,
    CycleInputs,
    CycleResult,
    Drafts,
    Rows,
    Texts,
    commit,
    commit_reference,
    prepare,
    prepare_reference,
)
from kernels.cycle_triton import commit_triton, prepare_triton
from rollout.sequence import Sequence
from rollout.speculate import ancestry, depths, verify
from rollout.types import Prompt

BLOCK_SIZE, DUMMY_SLOT, MAX_LENGTH = 8, 9_999, 70
FINISH = {None: 0, "stop": 1, "length": 2}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")
BOTH = [commit_reference, pytest.param(commit_triton, marks=on_cpu)]
SHAPES = [(1, 0), (3, 0), (1, 1), (4, 5), (3, 15), (2, 16), (1, MAX_NODES)]

Case = tuple[Texts, Rows, Drafts | None, torch.Tensor, torch.Tensor, torch.Tensor]


def random_case(seed: int, num_rows: int, num_nodes: int) -> Case:
    """Rows of random texts and trees of a few tokens, so that sampled ones agree; some rows idle, full or padded."""
    rng = np.random.default_rng(seed)
    num_texts, vocab = num_rows + 3, 3
    lengths = rng.integers(1, MAX_LENGTH, num_texts)
    texts = Texts(
        tokens=ints(rng.integers(0, vocab, (num_texts, MAX_LENGTH))),
        lengths=ints(lengths),
        groups=ints(np.zeros(num_texts)),
    )
    text = rng.permutation(num_texts - 1)[:num_rows]
    active = rng.random(num_rows) < 0.8
    room = np.where(rng.random(num_rows) < 0.5, rng.integers(1, 4, num_rows), rng.integers(1, 80, num_rows))
    tables = np.stack([rng.permutation(200)[: -(-MAX_LENGTH // BLOCK_SIZE)] for _ in range(num_rows + 1)])
    spare = 1  # a cycle takes the first rows of more
    rows = Rows(
        text=ints([*np.where(active, text, num_texts - 1), 0]),
        keys=torch.from_numpy(rng.integers(-(2**62), 2**62, num_rows + spare)),
        max_lengths=ints([*np.minimum(lengths[text] + room, MAX_LENGTH), 0]),
        active=ints([*active, 1]),
        block_tables=ints(tables),
    )
    drafts = None
    if num_nodes:
        trees = [random_tree(rng, num_nodes, vocab) for _ in range(num_rows)]
        drafts = Drafts(
            token_ids=ints([token_ids for token_ids, _ in trees]),
            parents=ints([parents for _, parents in trees]),
            num_nodes=ints(rng.integers(0, num_nodes + 1, num_rows)),
        )
    num_tokens = num_rows * (1 + num_nodes)
    sampled = torch.from_numpy(rng.integers(0, vocab, num_tokens))
    logprobs = torch.from_numpy(rng.normal(size=num_tokens).astype(np.float32))
    stop_ids = ints(rng.permutation(vocab + 20)[: rng.integers(0, 10)])
    return texts, rows, drafts, sampled, logprobs, stop_ids


def random_tree(rng: np.random.Generator, num_nodes: int, vocab: int) -> tuple[list[int], list[int]]:
    """Tokens and parents; siblings carry different tokens."""
    token_ids: list[int] = []
    parents: list[int] = []
    taken: set[tuple[int, int]] = set()
    while len(parents) < num_nodes:
        parent = int(rng.integers(max(-1, len(parents) - 4), len(parents)))
        token = int(rng.integers(0, vocab))
        if (parent, token) not in taken:
            taken.add((parent, token))
            parents.append(parent)
            token_ids.append(token)
    return token_ids, parents


def ints(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def cycle(case: Case, *, prepared: Any = prepare, committed: Any = commit) -> tuple[Case, CycleInputs, CycleResult]:
    """Both ends on a copy of the case; returns the case as they left it."""
    case = deepcopy(case)
    texts, rows, drafts, sampled, logprobs, stop_ids = case
    num_rows = rows.text.shape[0] - 1
    inputs = prepared(texts, rows, drafts, num_rows=num_rows, block_size=BLOCK_SIZE, dummy_slot=DUMMY_SLOT)
    result = committed(
        texts, rows, drafts, inputs, sampled, logprobs, num_rows=num_rows, block_size=BLOCK_SIZE, stop_ids=stop_ids
    )
    return case, inputs, result


def host_sequence(texts: Texts, rows: Rows, row: int) -> Sequence:
    """The row's text as the engine's host code keeps it, as if its prompt were all it has."""
    text = int(rows.text[row])
    token_ids = texts.tokens[text, : texts.lengths[text]].tolist()
    sequence = Sequence(
        prompt=Prompt(id="", token_ids=token_ids, answer=""),
        sample=0,
        noise_key=0,
        max_length=int(rows.max_lengths[row]),
        block_size=BLOCK_SIZE,
    )
    sequence.block_table = rows.block_tables[row].numpy()
    return sequence


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES))
def test_a_cycle_does_what_the_host_does(seed: int, shape: tuple[int, int]) -> None:
    num_rows, num_nodes = shape
    case = random_case(seed, num_rows, num_nodes)
    texts, rows, drafts, sampled, logprobs, stop_ids = case
    (after, rows_after, *_), inputs, result = cycle(case)
    per_row = {field.name: getattr(inputs, field.name).view(num_rows, -1) for field in fields(inputs)}
    for row in range(num_rows):
        got = {name: values[row].tolist() for name, values in per_row.items()}
        sequence = host_sequence(texts, rows, row)
        length = len(sequence.tokens)
        targets = sampled.view(num_rows, -1)[row].tolist()
        assert got["keys"] == [int(rows.keys[row])] * (1 + num_nodes)
        assert got["sample_positions"] == [position + 1 for position in got["positions"]]
        assert got["num_drafted"] == [num_nodes]
        own_bits = [0] + [1 << node for node in range(num_nodes)]
        if not rows.active[row]:
            assert got["token_ids"] == got["positions"] == [0] * (1 + num_nodes)
            assert got["slots"] == [DUMMY_SLOT] * (1 + num_nodes)
            assert got["ancestors"] == own_bits
            assert got["context_lens"] == got["num_valid"] == [0]
            assert not result.host[row].any()
            assert (result.src_slots[row] == -1).all() and (result.dst_slots[row] == -1).all()
            continue

        token_ids: list[int] = []
        parents: list[int] = []
        if drafts is not None:
            num_valid = min(int(drafts.num_nodes[row]), sequence.num_remaining)
            token_ids = drafts.token_ids[row, :num_valid].tolist()
            parents = drafts.parents[row, :num_valid].tolist()
        num_valid, num_padding = len(parents), num_nodes - len(parents)
        levels = depths(parents)
        assert got["num_valid"] == [num_valid]
        assert got["context_lens"] == [length - 1]
        assert got["token_ids"] == [sequence.tokens[-1], *token_ids, *[0] * num_padding]
        assert got["positions"] == [length - 1, *(length - 1 + level for level in levels), *[0] * num_padding]
        slots = [sequence.slot(length - 1 + index) for index in range(1 + num_valid)]
        assert got["slots"] == slots + [DUMMY_SLOT] * num_padding
        attends = ancestry(np.array([parents], dtype=np.int64).reshape(1, -1))[0]
        bits = [sum(1 << int(node) for node in np.flatnonzero(seen)) for seen in attends]
        assert got["ancestors"] == [0, *bits, *own_bits[1 + num_valid :]]

        path = verify(token_ids, parents, targets)
        columns = [0, *(node + 1 for node in path)]
        row_logprobs = logprobs.view(num_rows, -1)[row]
        count = sequence.commit(
            [targets[column] for column in columns],
            row_logprobs[columns].tolist(),
            stop_token_ids=frozenset(stop_ids.tolist()),
            version=0,
        )
        text = int(rows.text[row])
        assert after.tokens[text, : after.lengths[text]].tolist() == sequence.tokens
        assert int(result.counts[row]) == count
        assert int(result.finish[row]) == FINISH[sequence.finish]
        assert bool(rows_after.active[row]) == (int(result.finish[row]) == RUNNING)
        padding = [0] * (1 + num_nodes - count)
        assert result.token_ids[row].tolist() == sequence.tokens[length:] + padding
        assert result.logprobs[row].tolist() == sequence.logprobs + padding
        assert int(result.accepted[row]) == min(len(path), count)
        assert result.path[row, :count].tolist() == columns[:count]
        assert 0 <= int(result.path[row].min()) <= int(result.path[row].max()) <= num_nodes
        assert result.proposed_by_depth[row].tolist() == [levels.count(1 + depth) for depth in range(1 + num_nodes)]
        if sequence.finish is None:
            expected = [
                (sequence.slot(length + node), sequence.slot(length + place)) if node != place else (-1, -1)
                for place, node in enumerate(path)
            ] + [(-1, -1)] * (num_nodes - len(path))
            assert list(zip(result.src_slots[row].tolist(), result.dst_slots[row].tolist(), strict=True)) == expected
    untouched = torch.ones(len(texts.lengths), dtype=torch.bool)
    untouched[rows.text[:num_rows][rows.active[:num_rows] == 1].long()] = False
    assert torch.equal(after.tokens[untouched], texts.tokens[untouched])
    assert torch.equal(after.lengths[untouched], texts.lengths[untouched])
    assert int(rows_after.active[num_rows]) == 1


@on_cpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_do_what_their_references_do(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty_tensors(monkeypatch)
    for seed in range(3):
        case = random_case(seed, *shape)
        expected = cycle(case, prepared=prepare_reference, committed=commit_reference)
        got = cycle(case, prepared=prepare_triton, committed=commit_triton)
        for tensor, reference in zip(tensors(got), tensors(expected), strict=True):
            assert tensor.dtype == reference.dtype
            assert torch.equal(tensor, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (256, 16)])
def test_the_compiled_kernels_do_what_their_references_do(shape: tuple[int, int]) -> None:
    for seed in range(5):
        case = random_case(seed, *shape)
        expected = cycle(case, prepared=prepare_reference, committed=commit_reference)
        got = cycle(to_device(case, "cuda"))
        for tensor, reference in zip(tensors(got), tensors(expected), strict=True):
            assert torch.equal(tensor.cpu(), reference)


@pytest.mark.parametrize("committed", BOTH)
def test_a_logprob_that_is_not_a_number_reaches_the_host(committed: Any) -> None:
    case = random_case(0, 4, 5)
    case[4].fill_(torch.nan)
    _, _, result = cycle(case, committed=committed)
    assert result.counts.sum() > 0
    assert torch.equal(result.logprobs.isnan(), torch.arange(6) < result.counts[:, None])


@pytest.mark.parametrize("committed", BOTH)
def test_the_result_is_written_where_the_caller_wants_it(committed: Any) -> None:
    case = random_case(0, 4, 5)
    _, _, expected = cycle(case)
    out = torch.full_like(expected.host, -77)
    _, _, result = cycle(case, committed=partial(committed, out=out))
    assert result.host is out
    assert torch.equal(out, expected.host)


def test_more_nodes_than_a_mask_has_bits_are_refused() -> None:
    with pytest.raises(AssertionError, match="64 nodes"):
        cycle(random_case(0, 1, MAX_NODES + 1))


def poison_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing pass that a kernel forgot to write."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(-77))


def to_device(value: Any, device: str) -> Any:
    """The same case on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    if value is None:
        return None
    return type(value)(*(to_device(getattr(value, field.name), device) for field in fields(value)))


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor of nested tuples and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:
        return []
    items = value if isinstance(value, tuple) else [getattr(value, field.name) for field in fields(value)]
    return [tensor for item in items for tensor in tensors(item)]

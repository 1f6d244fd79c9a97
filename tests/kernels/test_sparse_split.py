# ruff: noqa: N803
"""How programs share out the steps of all lists, against the same written as loops."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from kernels import sparse_split
from kernels.attention import paged_sequences
from kernels.attention_plan import Launch
from kernels.sparse_split import find_run, grid_of, program_of

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")


@triton.jit
def _runs(
    counts,
    found,
    owners,
    num_units,
    max_count,
    min_steps,
    TILES: tl.constexpr,
    BLOCK_U: tl.constexpr,
    ONCE: tl.constexpr,
):
    """What find_run says to each program, and whose each step of its run is."""
    # a block of a list is a step
    total, programs, begin, end, unit, unit_begin = find_run(
        counts, num_units, max_count, min_steps, TILES, 16, 16, BLOCK_U, ONCE
    )
    row = found + tl.program_id(0) * 4
    tl.store(row, begin)
    tl.store(row + 1, end)
    tl.store(row + 2, unit)
    tl.store(row + 3, unit_begin)
    for step in range(begin, end):
        tl.store(owners + step, program_of(step, total, programs))


@on_cpu
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 2),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
)
def test_runs_cover_every_step_once_and_differ_by_one_at_most(
    counts: list[int], tiles: int, num_programs: int, min_steps: int, once: bool
) -> None:
    steps = [max(count, 1) for count in counts for _ in range(tiles)]
    ends = torch.tensor(steps).cumsum(0)
    total = int(ends[-1])
    found = torch.zeros(num_programs, 4, dtype=torch.int32)
    owners = torch.full((total,), -1, dtype=torch.int32)
    _runs[(num_programs,)](
        torch.tensor(counts, dtype=torch.int32),
        found,
        owners,
        len(steps),
        9,
        min_steps,
        TILES=tiles,
        BLOCK_U=32 if once else 4,
        ONCE=once,
    )

    runs = [(begin, end) for begin, end, _, _ in found.tolist() if begin < end]
    lengths = [end - begin for begin, end in runs]
    assert sorted(step for begin, end in runs for step in range(begin, end)) == list(range(total))
    assert max(lengths) - min(lengths) <= 1
    assert len(runs) == min(num_programs, max(total // min_steps, 1))
    for program, (begin, end, unit, unit_begin) in enumerate(found.tolist()):
        if begin < end:
            assert unit == int((ends <= begin).sum()) and unit_begin == int(ends[unit]) - steps[unit]
            assert owners[begin:end].tolist() == [program] * (end - begin)


@pytest.mark.parametrize(
    ("batch", "slots", "programs"),
    [(3, 12, 12), (4, 13, 12), (5, 13, 10), (5, 14, 14), (14, 13, 13)],
    ids=["divides", "all but one", "twice", "too many idle", "more units than programs"],
)
def test_every_unit_has_as_many_programs_unless_that_leaves_many_idle(
    monkeypatch: pytest.MonkeyPatch, batch: int, slots: int, programs: int
) -> None:
    monkeypatch.setattr(sparse_split, "num_programs", lambda device, per_sm: slots)
    monkeypatch.setattr(sparse_split, "ALIKE", 0.75)
    assert _programs(batch, max_list_keys=1024) == programs


@pytest.mark.parametrize(
    ("batch", "max_list_keys", "programs"),
    [(5, 512, 5), (5, 513, 10), (4, 512, 12), (12, 512, 12), (13, 512, 12)],
    ids=["short", "longer", "idle multiprocessors", "as many", "more units than programs"],
)
def test_short_lists_are_not_cut_where_every_multiprocessor_has_one(
    monkeypatch: pytest.MonkeyPatch, batch: int, max_list_keys: int, programs: int
) -> None:
    monkeypatch.setattr(sparse_split, "num_programs", lambda device, per_sm: 5 if per_sm == 1 else 12)
    monkeypatch.setattr(sparse_split, "ALIKE", 0.75)
    monkeypatch.setattr(sparse_split, "SHORT", 512)
    launch = Launch(16, 32, num_warps=1, num_stages=2, programs_per_sm=3, fold=True)
    assert _programs(batch, max_list_keys=max_list_keys, launch=launch) == programs


def _programs(batch: int, *, max_list_keys: int, launch: Launch | None = None) -> int:
    """Programs for one list a sequence."""
    seqs = paged_sequences(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32),
        max_seqlen_q=1,
        context_lens=torch.full((batch,), 1023, dtype=torch.int32),
        max_context=1023,
        block_tables=torch.zeros(batch, 64, dtype=torch.int32),
        slots=torch.zeros(batch, dtype=torch.int64),
        block_size=16,
    )
    grid = grid_of(
        seqs,
        groups=2,
        num_kv_heads=1,
        head_dim=64,
        dtype=torch.float32,
        max_list_keys=max_list_keys,
        launch=launch,
        min_chunk=32,
    )
    return grid.programs

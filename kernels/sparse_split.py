# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Which program reads which listed blocks: a static grid over the steps of all lists, end to end (Triton).

A unit is one tile of new tokens of one sequence and key head; its steps read its list, BLOCK_N keys each. Programs take
runs of the steps of all units, equal to within a step however unequal the lists: a run may begin in one unit and end in
another (stream-K; Osama et al. 2023, arXiv 2301.03598). Each program finds its run from the counts alone, so no plan is
made.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.attention import PagedSequences, most_rows
from kernels.attention_plan import Launch, num_programs

MIN_CHUNK = 64  # keys of a run below which a further program costs more to combine than it saves
SHORT = 1024  # keys of lists that are not cut, where they are alike and every multiprocessor has one
ALIKE = 0.9  # of the programs that run at once: from so many on, each unit has as many


@dataclass(frozen=True, slots=True)
class Grid:
    """What a launch is made of, known to the host: its room in memory follows.

    tiles: of a sequence and key head, of `tokens` new tokens each. units: sequences times key heads times tiles.
    programs: as many as run at once, and no more than there can be steps, or units of short lists. min_steps: of a
    program's run.
    """

    launch: Launch
    groups: int
    head_dim: int
    tokens: int
    tiles: int
    units: int
    programs: int
    min_steps: int

    @property
    def rows(self) -> int:
        """Rows of a tile that may be in use."""
        return self.tokens * self.groups


@dataclass(frozen=True, slots=True)
class Room:
    """What programs leave for one another; made once a forward, and left as it was found by every layer.

    arrived [units] int32: chunks of each unit that are done, 0 between layers. maxima, sums [P, rows] and partials
    [P, rows, D] float32: of the chunks of split units; a unit and a program are met at most once, so chunk i of unit u,
    which program p0 + i computes, is part p0 + i + u.
    """

    arrived: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
    partials: torch.Tensor


def choose_sparse_launch(rows: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """A launch for tiles of so many rows (new tokens times query heads a key head)."""
    block_m = min(max(16, triton.next_power_of_2(rows)), most_rows(head_dim, dtype))
    if dtype.itemsize == 4:
        return Launch(block_m, 32, num_warps=4, num_stages=2, programs_per_sm=1, fold=True)
    if head_dim > 128:
        return Launch(block_m, 32, num_warps=4, num_stages=3, programs_per_sm=2, fold=True)
    if block_m == 16 and head_dim <= 64:
        # of 13 launches on an H100, 64 sequences with three lists of 256 and 512 keys each
        return Launch(block_m, 64, num_warps=1, num_stages=3, programs_per_sm=4, fold=True)
    if block_m == 16:
        # of 13 launches on an H100, heads of 128, 1 x 8 Ki to 4 x 128 Ki keys of which 10 % are listed: the best, or
        # at most 2 % slower
        return Launch(block_m, 128, num_warps=4, num_stages=3, programs_per_sm=1, fold=True)
    if block_m < 128:
        return Launch(64, 64, num_warps=4, num_stages=3, programs_per_sm=2, fold=True)
    return Launch(block_m, 64, num_warps=8, num_stages=3, programs_per_sm=1, fold=True)


def grid_of(
    seqs: PagedSequences,
    *,
    groups: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_list_keys: int,
    launch: Launch | None,
    min_chunk: int,
) -> Grid:
    """The grid for lists of at most max_list_keys keys; launch None chooses one by shape."""
    lists = seqs.context_lens.shape[0] * num_kv_heads
    launch = launch or choose_sparse_launch(groups * seqs.max_seqlen_q, head_dim, dtype)
    tiles = triton.cdiv(seqs.max_seqlen_q, launch.block_m // groups)
    units = lists * tiles
    min_steps = max(1, min_chunk // launch.block_n)
    max_runs = triton.cdiv(units * triton.cdiv(max_list_keys, launch.block_n), min_steps)
    programs = num_programs(seqs.slots.device, launch.programs_per_sm)
    if num_programs(seqs.slots.device, 1) <= units < programs and max_list_keys <= SHORT:
        programs = units
    # as many to each unit, where that leaves few idle: lists of equal length are then cut where units end
    elif (alike := programs // units * units) >= ALIKE * programs:
        programs = alike
    return Grid(
        launch=launch,
        groups=groups,
        head_dim=head_dim,
        tokens=triton.cdiv(seqs.max_seqlen_q, tiles),
        tiles=tiles,
        units=units,
        programs=min(programs, max_runs),
        min_steps=min_steps,
    )


def room_for(seqs: PagedSequences, grid: Grid) -> Room:
    """The room of these sequences' launches, made by the first layer of its grid and shared by the others."""
    if grid not in seqs.rooms:
        parts = grid.programs + grid.units
        device = seqs.slots.device
        seqs.rooms[grid] = Room(
            arrived=torch.zeros(grid.units, dtype=torch.int32, device=device),
            maxima=torch.empty(parts, grid.rows, dtype=torch.float32, device=device),
            sums=torch.empty(parts, grid.rows, dtype=torch.float32, device=device),
            partials=torch.empty(parts, grid.rows, grid.head_dim, dtype=torch.float32, device=device),
        )
    return seqs.rooms[grid]


@triton.jit
def steps_of(counts, unit, exists, max_count, TILES: tl.constexpr, SELECT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Steps of a unit: at least one where it exists, so that every output is written, and 0 where it does not."""
    count = tl.minimum(tl.load(counts + unit // TILES, mask=exists, other=0), max_count)
    return tl.where(exists, tl.maximum(tl.cdiv(count * SELECT, BLOCK_N), 1), 0)


@triton.jit
def find_run(
    counts,
    num_units,
    max_count,
    min_steps,
    TILES: tl.constexpr,
    SELECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    ONCE: tl.constexpr,
):
    """This program's run among the steps of all units: (all steps, programs that share them, the run's begin, its end,
    its first unit, that one's begin). Runs differ by a step at most; where there is nothing left, end <= begin.

    ONCE: BLOCK_U units are all there are.
    """
    lane = tl.arange(0, BLOCK_U)
    me = tl.program_id(0)
    steps = steps_of(counts, lane, lane < num_units, max_count, TILES, SELECT, BLOCK_N)
    total = tl.sum(steps, axis=0)
    if not ONCE:
        for base in range(BLOCK_U, num_units, BLOCK_U):
            more = steps_of(counts, base + lane, base + lane < num_units, max_count, TILES, SELECT, BLOCK_N)
            total += tl.sum(more, axis=0)
    programs = tl.minimum(tl.num_programs(0), tl.maximum(total // min_steps, 1))
    begin = tl.where(me < programs, _begin_of(me, total, programs), total)
    end = tl.minimum(_begin_of(me + 1, total, programs), total)
    unit, unit_begin = _passed(steps, 0, lane < num_units, begin)
    if not ONCE:
        before = tl.sum(steps, axis=0)  # steps of the units seen so far
        for base in range(BLOCK_U, num_units, BLOCK_U):
            exists = base + lane < num_units
            steps = steps_of(counts, base + lane, exists, max_count, TILES, SELECT, BLOCK_N)
            units, last_end = _passed(steps, before, exists, begin)
            unit += units
            unit_begin = tl.maximum(unit_begin, last_end)
            before += tl.sum(steps, axis=0)
    return total, programs, begin, end, unit, unit_begin


@triton.jit
def _passed(steps, before, exists, begin):
    """How many of these units end before a run begins, and where the last of them does; before: steps before them."""
    end = before + tl.cumsum(steps, axis=0)
    is_past = exists & (end <= begin)
    return tl.sum(is_past.to(tl.int32), axis=0), tl.max(tl.where(is_past, end, 0), axis=0)


@triton.jit
def _begin_of(program, total, programs):
    """The first step of a program's run."""
    return (tl.cast(program, tl.int64) * total // programs).to(tl.int32)


@triton.jit
def program_of(step, total, programs):
    """The program whose run a step is in: the last one that begins no later."""
    return (((tl.cast(step, tl.int64) + 1) * programs - 1) // total).to(tl.int32)

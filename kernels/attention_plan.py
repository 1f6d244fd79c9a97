# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Which program attends to which keys: the flat work list of split-KV paged attention, made on the device.

A tile is up to `tokens` new tokens of one sequence times the query heads of a group: rows that one read of the keys
serves. Its keys are cut into chunks of about equal length, so many that items times key heads fill the machine once
and no more; an item is one chunk of one tile. The host knows bounds alone, so launches are static and capturable.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import PagedSequences, most_rows
from kernels.linear_triton import overlaps

MIN_CHUNK = 128  # keys below which a further chunk costs more to combine than it saves
FEW_PROGRAMS = 128  # sequences times key heads below which most are cut, to fill the multiprocessors
LONG = 8192  # keys from which deep loads pay
INTERPRETED_PROGRAMS = 12  # of a machine without multiprocessors: few, so that small tests meet every case
NO_WINDOW = 1 << 30
ITEM_FIELDS = 16  # 64 bytes an item: one line holds what its program needs to start
TILE_FIELDS = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """How the attention kernel runs: rows and keys of a step, warps, pipeline stages, programs a multiprocessor holds.

    fold: the last program to finish a tile combines its chunks; otherwise a kernel of its own does.
    slices: parts of a step, each its own warp's, that are merged after the last step; 1, or num_warps.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    fold: bool
    slices: int = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a plan depends on besides the sequences. window: NO_WINDOW for none."""

    groups: int
    num_kv_heads: int
    window: int
    min_chunk: int
    launch: Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The items of one forward and the room their programs need; written anew by every forward.

    tokens: new tokens of a tile. rows: rows of a tile that may be in use. items [I, 16] int32, fields in the order in
    which _plan_kernel stores them; tiles [N, 4] int32, likewise; counts [2] int32: items and tiles that there are.
    arrived [N * Hkv] int32: chunks of each tile and head that are done.
    maxima, sums [P, Hkv, rows] and partials [P, Hkv, rows, D] float32: of the chunks of split tiles.
    """

    geometry: Geometry
    tokens: int
    rows: int
    items: torch.Tensor
    tiles: torch.Tensor
    counts: torch.Tensor
    arrived: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
    partials: torch.Tensor
    may_split: bool


def choose_launch(rows: int, head_dim: int, dtype: torch.dtype, num_programs: int, max_keys: int) -> Launch:
    """A launch for tiles of so many rows (new tokens times query heads a key head).

    num_programs: sequences times key heads. max_keys: a bound on what one sequence attends to.
    """
    block_m = min(max(16, triton.next_power_of_2(rows)), most_rows(head_dim, dtype))
    if dtype.itemsize == 4:
        return Launch(block_m, 32, num_warps=4, num_stages=2, programs_per_sm=1, fold=True)
    # where hardly a sequence is cut, a kernel that combines would start programs for nothing
    fold = block_m == 16 or num_programs >= FEW_PROGRAMS
    # programs_per_sm: what 64 Ki registers and 227 KB of shared memory hold
    if head_dim > 128:
        return Launch(block_m, 32, num_warps=4, num_stages=2, programs_per_sm=2, fold=fold)
    if block_m == 16:
        # measured on an H200 from 96 to 2048 keys: warps that keep slices of their own pay where programs are neither
        # so few that each waits alone nor so many that registers decide how many run at once
        if head_dim <= 64:
            if num_programs >= 64:
                return Launch(block_m, 32, num_warps=2, num_stages=4, programs_per_sm=4, fold=True, slices=2)
            return Launch(block_m, 64, num_warps=4, num_stages=4, programs_per_sm=4, fold=True, slices=4)
        if num_programs <= 128 and max_keys >= LONG:
            # one program a multiprocessor: its shared memory keeps it from starting before its predecessor ends, which
            # costs short sequences more than deep loads give; on an H100 2 to 9 % faster from 1 to 8 x 8 Ki to 128 Ki
            return Launch(block_m, 128, num_warps=8, num_stages=3, programs_per_sm=1, fold=True, slices=8)
        if 128 < num_programs <= 512:
            return Launch(block_m, 64, num_warps=4, num_stages=3, programs_per_sm=2, fold=True, slices=4)
        return Launch(block_m, 64, num_warps=4, num_stages=3, programs_per_sm=3, fold=True)
    if block_m < 128:
        return Launch(64, 64, num_warps=4, num_stages=3, programs_per_sm=2, fold=fold)
    return Launch(block_m, 64, num_warps=8, num_stages=3, programs_per_sm=1, fold=fold)


def geometry_of(
    seqs: PagedSequences,
    *,
    groups: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    min_chunk: int,
    launch: Launch | None,
) -> Geometry:
    """By what a plan of these sequences is known; launch None chooses one by shape."""
    if launch is None:
        num_programs = seqs.context_lens.shape[0] * num_kv_heads
        max_keys = seqs.max_context + seqs.max_seqlen_q
        launch = choose_launch(groups * seqs.max_seqlen_q, head_dim, dtype, num_programs, max_keys)
    return Geometry(groups, num_kv_heads, window, min_chunk, launch)


def plan_for(seqs: PagedSequences, geometry: Geometry, head_dim: int) -> Plan:
    """The plan of these sequences, made by the first layer of its geometry and shared by the others."""
    if geometry not in seqs.plans:
        seqs.plans[geometry] = _make_plan(seqs, geometry, head_dim)
    return seqs.plans[geometry]


def _make_plan(seqs: PagedSequences, geometry: Geometry, head_dim: int) -> Plan:
    launch, num_kv_heads = geometry.launch, geometry.num_kv_heads
    num_sequences, num_tokens, device = seqs.context_lens.shape[0], seqs.slots.shape[0], seqs.slots.device
    tokens = launch.block_m // geometry.groups
    rows = min(tokens, seqs.max_seqlen_q) * geometry.groups
    # every sequence's last tile may be short of tokens by all but one
    num_tiles = min(
        num_sequences * triton.cdiv(seqs.max_seqlen_q, tokens), (num_tokens + num_sequences * (tokens - 1)) // tokens
    )
    wave = max(1, num_programs(device, launch.programs_per_sm) // num_kv_heads)
    may_split = min(seqs.max_context + seqs.max_seqlen_q, geometry.window + tokens) > geometry.min_chunk
    # the kernel's promise: a wave of items where the tiles fit one, and otherwise at most a wave more than tiles
    max_items = (wave if num_tiles <= wave else num_tiles + wave) if may_split else num_tiles
    max_partials = (wave if num_tiles <= wave else 2 * wave) if may_split else 1

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    plan = Plan(
        geometry=geometry,
        tokens=tokens,
        rows=rows,
        items=empty(max_items, ITEM_FIELDS, dtype=torch.int32),
        tiles=empty(num_tiles, TILE_FIELDS, dtype=torch.int32),
        counts=empty(2, dtype=torch.int32),
        arrived=empty(num_tiles * num_kv_heads, dtype=torch.int32),
        maxima=empty(max_partials, num_kv_heads, rows, dtype=torch.float32),
        sums=empty(max_partials, num_kv_heads, rows, dtype=torch.float32),
        partials=empty(max_partials, num_kv_heads, rows, head_dim, dtype=torch.float32),
        may_split=may_split,
    )
    is_tree = seqs.num_drafted is not None
    overlap = overlaps(device)
    _plan_kernel[(num_sequences,)](
        seqs.cu_seqlens_q,
        seqs.context_lens,
        seqs.num_drafted if is_tree else seqs.context_lens,
        plan.items,
        plan.tiles,
        plan.counts,
        plan.arrived,
        num_sequences,
        wave,
        geometry.window,
        max(1, geometry.min_chunk // launch.block_n) if may_split else 1 << 24,
        IS_TREE=is_tree,
        TOKENS=tokens,
        KV_HEADS=num_kv_heads,
        STEP=launch.block_n,
        ITEM_FIELDS=ITEM_FIELDS,
        TILE_FIELDS=TILE_FIELDS,
        # few sizes, since each is compiled
        BLOCK_B=32 if num_sequences <= 32 else max(256, triton.next_power_of_2(num_sequences)),
        BLOCK_I=64,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    return plan


@lru_cache
def num_programs(device: torch.device, per_sm: int) -> int:
    """Programs that run at once."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * per_sm


@triton.jit(do_not_specialize=["num_sequences", "wave", "window", "min_steps"])
def _plan_kernel(
    cu_seqlens,  # [B + 1] int32
    context_lens,  # [B] int32
    num_drafted,  # [B] int32
    items_out,
    tiles_out,
    counts_out,
    arrived_out,
    num_sequences,
    wave,
    window,
    min_steps,
    IS_TREE: tl.constexpr,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STEP: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program b lists the items of sequence b. All of them decide together how long a chunk is, each by itself."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    me = tl.program_id(0)
    row = tl.arange(0, BLOCK_B)
    valid = row < num_sequences
    start = tl.load(cu_seqlens + row, mask=valid, other=0)
    query_len = tl.load(cu_seqlens + row + 1, mask=valid, other=0) - start
    context = tl.load(context_lens + row, mask=valid, other=0)
    drafted = tl.zeros_like(context)
    if IS_TREE:
        drafted = tl.load(num_drafted + row, mask=valid, other=0)

    # lengths in steps of the attention loop; a tile of nodes reaches back from the first node, not from its own
    tiles = tl.cdiv(query_len, TOKENS)
    keys = tl.minimum(context + query_len, window + TOKENS + drafted)
    steps = tl.cdiv(tl.where(query_len > 0, keys, 0), STEP)
    num_tiles = tl.sum(tiles, axis=0)
    total = tl.sum(tiles * steps, axis=0)
    low = tl.maximum(tl.cdiv(total, wave), 1)
    high = low
    if num_tiles <= wave:
        # the shortest chunk with which all items run in one wave: uncut tiles do, so the search succeeds
        high = tl.maximum(tl.max(steps, axis=0), 1)
        low = tl.minimum(low, high)
        while low < high:
            middle = (low + high) // 2
            if tl.sum(tiles * tl.cdiv(steps, middle), axis=0) <= wave:
                high = middle
            else:
                low = middle + 1
    longest = tl.maximum(high, min_steps)
    chunks = tl.maximum(tl.cdiv(steps, longest), 1)
    chunk_steps = tl.maximum(tl.cdiv(steps, chunks), 1)
    chunks = tl.maximum(tl.cdiv(steps, chunk_steps), 1)

    count = tiles * chunks
    split = tl.where(chunks > 1, count, 0)
    mine = row == me
    first_item = tl.sum(tl.where(row < me, count, 0), axis=0)
    first_partial = tl.sum(tl.where(row < me, split, 0), axis=0)
    first_tile = tl.sum(tl.where(row < me, tiles, 0), axis=0)
    my_tiles = tl.sum(tl.where(mine, tiles, 0), axis=0)
    my_chunks = tl.sum(tl.where(mine, chunks, 0), axis=0)
    chunk_keys = tl.sum(tl.where(mine, chunk_steps, 0), axis=0) * STEP
    my_start = tl.sum(tl.where(mine, start, 0), axis=0)
    my_query_len = tl.sum(tl.where(mine, query_len, 0), axis=0)
    my_context = tl.sum(tl.where(mine, context, 0), axis=0)
    ordinary = my_query_len - tl.sum(tl.where(mine, drafted, 0), axis=0)
    if me == 0:
        tl.store(counts_out + 0, tl.sum(count, axis=0))
        tl.store(counts_out + 1, num_tiles)

    for begin in range(0, my_tiles * my_chunks, BLOCK_I):
        index = begin + tl.arange(0, BLOCK_I)
        exists = index < my_tiles * my_chunks
        # tiles that read the same keys run beside one another
        tile = index % my_tiles
        chunk = index // my_tiles
        offset = tile * TOKENS
        num_tokens = tl.minimum(TOKENS, my_query_len - offset)
        reach = my_context + tl.minimum(offset, ordinary) - window + 1
        first_key = tl.maximum(reach, 0) + chunk * chunk_keys
        last_key = tl.minimum(my_context + offset + num_tokens, first_key + chunk_keys)
        field = items_out + (first_item + index) * ITEM_FIELDS
        tl.store(field + 0, tl.zeros_like(index) + me, mask=exists)
        tl.store(field + 1, my_start + offset, mask=exists)  # the tile's first token among all
        tl.store(field + 2, num_tokens, mask=exists)
        tl.store(field + 3, my_context + offset, mask=exists)  # and its index in the sequence
        tl.store(field + 4, tl.zeros_like(index) + my_context, mask=exists)
        tl.store(field + 5, tl.zeros_like(index) + my_context + ordinary, mask=exists)  # of the first node
        tl.store(field + 6, first_key, mask=exists)
        tl.store(field + 7, last_key, mask=exists)
        tl.store(field + 8, chunk, mask=exists)
        tl.store(field + 9, tl.zeros_like(index) + my_chunks, mask=exists)
        tl.store(field + 10, first_tile + tile, mask=exists)
        tl.store(field + 11, first_partial + tile * my_chunks, mask=exists)  # of the tile's chunks
        is_first = exists & (chunk == 0)
        field = tiles_out + (first_tile + tile) * TILE_FIELDS
        tl.store(field + 0, my_start + offset, mask=is_first)
        tl.store(field + 1, num_tokens, mask=is_first)
        tl.store(field + 2, tl.zeros_like(index) + my_chunks, mask=is_first)
        tl.store(field + 3, first_partial + tile * my_chunks, mask=is_first)
        for head in range(KV_HEADS):
            tl.store(arrived_out + (first_tile + tile) * KV_HEADS + head, tl.zeros_like(index), mask=is_first)

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""Descriptors of cached keys in one launch for all layers (Triton)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.describe import Kind, most_touched
from kernels.linear_triton import overlaps

TILE = 4096  # elements of keys that a program holds: some columns of one selection block
PROGRAMS = 2048  # a few for each multiprocessor: layers are shared out so that few programs have nothing to do


def describe_triton(
    kind: Kind,
    storage: torch.Tensor,
    out: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    max_tokens: int,
) -> None:
    """kernels.describe.describe on the GPU."""
    assert storage.is_contiguous() and out.is_contiguous() and block_tables.stride(1) == 1
    assert begins.is_contiguous() and ends.is_contiguous()
    num_layers, _, num_blocks, block_size, num_kv_heads, head_dim = storage.shape
    select_block = block_size // out.shape[2]
    entry_size = num_kv_heads * head_dim
    block_tokens = triton.next_power_of_2(select_block)
    block_elements = min(triton.next_power_of_2(entry_size), max(16, TILE // block_tokens))
    columns = triton.cdiv(entry_size, block_elements)
    touched = most_touched(max_tokens, select_block)
    shares = min(num_layers, max(1, PROGRAMS // (len(begins) * touched * columns)))
    overlap = overlaps(storage.device)
    _describe_kernel[(len(begins) * touched, columns, shares)](
        storage,
        out,
        block_tables,
        begins,
        ends,
        touched,
        num_layers,
        storage.stride(0),
        out.stride(0),
        block_tables.stride(0),
        IS_MINMAX=kind == "minmax",
        PARTS=out.shape[2],
        SELECT_BLOCK=select_block,
        ENTRY_SIZE=entry_size,
        HEAD_DIM=head_dim,
        DESCRIPTOR_DIM=out.shape[4],
        BLOCK_T=block_tokens,
        BLOCK_E=block_elements,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )


@triton.jit(do_not_specialize=["num_touched", "num_layers", "table_stride"])
def _describe_kernel(
    storage,
    out,
    block_tables,
    begins,
    ends,
    num_touched,  # selection blocks of a row that have programs
    num_layers,
    layer_stride,
    out_stride,
    table_stride,
    IS_MINMAX: tl.constexpr,
    PARTS: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    ENTRY_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESCRIPTOR_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some columns of one selection block's keys, in some layers."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) // num_touched
    begin, end = tl.load(begins + row), tl.load(ends + row)
    selected = begin // SELECT_BLOCK + tl.program_id(0) % num_touched
    num_keys = tl.minimum(end - selected * SELECT_BLOCK, SELECT_BLOCK)
    if (begin >= end) | (num_keys <= 0):
        return
    block = tl.load(block_tables + row.to(tl.int64) * table_stride + selected // PARTS)
    place = block.to(tl.int64) * PARTS + selected % PARTS  # of the descriptor, and of the keys as it counts them
    token = tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_column = column < ENTRY_SIZE
    is_key = (token < num_keys)[:, None] & is_column[None, :]
    entry = place * (SELECT_BLOCK * ENTRY_SIZE) + token[:, None] * ENTRY_SIZE + column[None, :]
    heads: tl.constexpr = ENTRY_SIZE // HEAD_DIM
    described = place * (heads * DESCRIPTOR_DIM) + column // HEAD_DIM * DESCRIPTOR_DIM + column % HEAD_DIM
    for layer in range(tl.program_id(2), num_layers, tl.num_programs(2)):
        keys = tl.load(storage + tl.cast(layer, tl.int64) * layer_stride + entry, mask=is_key, other=0.0)
        keys = keys.to(tl.float32)
        target = out + tl.cast(layer, tl.int64) * out_stride + described
        if IS_MINMAX:
            tl.store(target, tl.min(tl.where(is_key, keys, float("inf")), axis=0), mask=is_column)
            tl.store(target + HEAD_DIM, tl.max(tl.where(is_key, keys, -float("inf")), axis=0), mask=is_column)
        else:
            tl.store(target, tl.sum(keys, axis=0) / num_keys, mask=is_column)

# mypy: allow-untyped-defs
# ruff: noqa: N803
"""The query side of a gate (Triton): what a layer's queries ask of blocks, in two steps of two launches.

The first multiplies plain queries with the merging weights, shared out over the machine: a program takes some query
heads and some columns, and leaves its part of the sum. Whoever needs the merged queries adds the parts up, and norms
and turns them, for itself.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.gate import GateWeights
from kernels.linear_triton import overlaps
from kernels.turns_triton import cos_sin

MAX_TOKENS = 64  # new tokens that a program has the queries of
MERGE_PROGRAMS = 128  # about one a multiprocessor
MERGE_COLUMNS = 128


def merge_queries(
    weights: GateWeights, layer: int, query: torch.Tensor, positions: torch.Tensor, arrived: torch.Tensor
) -> torch.Tensor:
    """Merged queries before their norm, in parts to be added up, [S, T, Hkv, Dg] float32; arrived becomes zeros."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, groups, _, gate_dim = weights.query_weight.shape[1:]
    assert query.stride(2) == 1 and weights.query_weight.is_contiguous() and num_heads == num_kv_heads * groups
    block_t = min(max(16, triton.next_power_of_2(num_tokens)), MAX_TOKENS)
    block_o = min(max(16, triton.next_power_of_2(gate_dim)), MERGE_COLUMNS)
    tiles, columns = triton.cdiv(num_tokens, block_t), triton.cdiv(gate_dim, block_o)
    shares = min(groups, triton.cdiv(MERGE_PROGRAMS, tiles * columns * num_kv_heads))
    heads = triton.cdiv(groups, shares)
    shares = triton.cdiv(groups, heads)
    merged = torch.empty(shares, num_tokens, num_kv_heads, gate_dim, dtype=torch.float32, device=query.device)
    overlap = overlaps(query.device)
    _merge_kernel[(tiles, columns, num_kv_heads * shares)](
        query,
        positions,
        weights.query_weight[layer],
        weights.rotation.frequencies,
        merged,
        arrived,
        num_tokens,
        len(arrived),
        query.stride(0),
        query.stride(1),
        weights.rotation.scaling,
        KV_HEADS=num_kv_heads,
        GROUPS=groups,
        HEADS=heads,
        HEAD_DIM=head_dim,
        GATE_DIM=gate_dim,
        BLOCK_T=block_t,
        BLOCK_H=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK_O=block_o,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    return merged


@triton.jit(do_not_specialize=["num_tokens", "num_lists"])
def _merge_kernel(
    query,
    positions,
    weight,
    frequencies,
    merged,
    arrived,
    num_tokens,
    num_lists,
    token_stride,
    head_stride,
    scaling,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some tokens' plain queries of HEADS of a group, times some columns of their weights."""
    kv_head = tl.program_id(2) % KV_HEADS
    share = tl.program_id(2) // KV_HEADS
    half: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_H)
    is_dim = dim < half
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_weight = is_dim[:, None] & (column < GATE_DIM)[None, :]
    first_head = share * HEADS
    # what no kernel before this one writes, before waiting for it
    frequency = tl.load(frequencies + dim, mask=is_dim, other=0.0)
    weight += kv_head * (GROUPS * HEAD_DIM * GATE_DIM) + first_head * (HEAD_DIM * GATE_DIM)
    weight += dim[:, None] * GATE_DIM + column[None, :]
    w = tl.load(weight, mask=is_weight, other=0.0)
    other_w = tl.load(weight + half * GATE_DIM, mask=is_weight, other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()  # not earlier: the next kernel counts on all before this one to have ended
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        for begin in range(0, num_lists, 256):
            index = begin + tl.arange(0, 256)
            tl.store(arrived + index, tl.zeros_like(index), mask=index < num_lists)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    position = tl.load(positions + token, mask=is_token, other=0)
    cosine, sine = cos_sin(position.to(tl.float32)[:, None] * frequency[None, :])
    cosine, sine = cosine / scaling, sine / scaling
    row = query + token.to(tl.int64)[:, None] * token_stride + (kv_head * GROUPS + first_head) * head_stride
    row += dim[None, :]
    mask = is_token[:, None] & is_dim[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for step in range(HEADS):
        exists = mask & (first_head + step < GROUPS)
        x = tl.load(row + step * head_stride, mask=exists, other=0.0).to(tl.float32)
        y = tl.load(row + step * head_stride + half, mask=exists, other=0.0).to(tl.float32)
        acc = tl.dot((x * cosine + y * sine).to(w.dtype), w, acc, input_precision="ieee")
        acc = tl.dot((y * cosine - x * sine).to(w.dtype), other_w, acc, input_precision="ieee")
        if HEADS > 1:
            weight += HEAD_DIM * GATE_DIM
            exists = is_weight & (step + 1 < HEADS) & (first_head + step + 1 < GROUPS)
            w = tl.load(weight, mask=exists, other=0.0)
            other_w = tl.load(weight + half * GATE_DIM, mask=exists, other=0.0)
    place = ((share * num_tokens + token).to(tl.int64) * KV_HEADS + kv_head)[:, None] * GATE_DIM + column[None, :]
    tl.store(merged + place, acc, mask=is_token[:, None] & (column < GATE_DIM)[None, :])


@triton.jit
def asked_of_blocks(
    merged,
    positions,
    token,
    is_token,
    head,
    num_tokens,
    dim,
    is_dim,
    frequency,
    gain,
    other_gain,
    scaling,
    eps,
    KV_HEADS: tl.constexpr,
    GATE_DIM: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What some tokens ask of a key head's blocks: the sum of the parts, normed and turned, float32 [Q, 2 BLOCK_H]."""
    line = merged + (token.to(tl.int64) * KV_HEADS + head)[:, None] * GATE_DIM + dim[None, :]
    mask = is_token[:, None] & is_dim[None, :]
    x, y = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32), tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    for _ in tl.static_range(SHARES):
        x += tl.load(line, mask=mask, other=0.0)
        y += tl.load(line + GATE_DIM // 2, mask=mask, other=0.0)
        line += tl.cast(num_tokens, tl.int64) * (KV_HEADS * GATE_DIM)
    size = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / GATE_DIM + eps)[:, None]
    x, y = x * size * gain[None, :], y * size * other_gain[None, :]
    position = tl.load(positions + token, mask=is_token, other=0)
    cosine, sine = cos_sin(position.to(tl.float32)[:, None] * frequency[None, :])
    cosine, sine = cosine * scaling, sine * scaling
    turned = tl.join(x * cosine - y * sine, y * cosine + x * sine)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (BLOCK_Q, 2 * BLOCK_H))

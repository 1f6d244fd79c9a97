# mypy: allow-untyped-defs
# ruff: noqa: N803
"""keep_features as one Triton kernel; kernels/features.py defines what it computes."""

import torch
import triton
import triton.language as tl

from kernels.cycle import Drafts, Texts
from kernels.features import NUM_AUX, Rings

COLUMNS = 2048  # of a state that one program copies


def keep_features_triton(
    rings: Rings,
    texts: Texts,
    text: torch.Tensor,
    *,
    aux: tuple[torch.Tensor, ...],
    hidden: torch.Tensor,
    counts: torch.Tensor,
    path: torch.Tensor,
    num_valid: torch.Tensor,
    drafts: Drafts | None,
) -> None:
    """keep_features, in one launch."""
    num_rows, num_tokens = path.shape
    width = hidden.shape[1]
    assert len(aux) == NUM_AUX and rings.states.shape[2] == (NUM_AUX + 2) * width
    assert all(x.stride() == hidden.stride() for x in aux) and hidden.stride(1) == 1
    assert rings.states.is_contiguous() and path.is_contiguous()
    trees = drafts or Drafts(texts.tokens, texts.tokens, texts.lengths)
    block = min(triton.next_power_of_2(width), COLUMNS)
    _keep_features_kernel[(num_rows, num_tokens, triton.cdiv(width, block))](
        rings.slot_of,
        rings.states,
        rings.alt_ids,
        texts.tokens,
        texts.lengths,
        text,
        *aux,
        hidden,
        counts,
        path,
        num_valid,
        trees.token_ids,
        trees.parents,
        len(rings.states) - 1,
        width,
        texts.tokens.stride(0),
        hidden.stride(0),
        counts.stride(0),
        trees.token_ids.stride(0),
        trees.parents.stride(0),
        RING=rings.states.shape[1],
        NUM_NODES=num_tokens - 1,
        NODES=triton.next_power_of_2(max(1, num_tokens - 1)),
        BLOCK=block,
        num_warps=4 if block >= 1024 else 2,
    )


@triton.jit(do_not_specialize=["nobody", "counts_stride"])
def _keep_features_kernel(
    slot_of_ptr,
    states_ptr,
    alt_ids_ptr,
    tokens_ptr,
    lengths_ptr,
    text_ptr,
    early_ptr,
    middle_ptr,
    late_ptr,
    hidden_ptr,
    counts_ptr,
    path_ptr,
    num_valid_ptr,
    draft_ids_ptr,
    parents_ptr,
    nobody,
    width,
    tokens_stride,
    hidden_stride,
    counts_stride,
    draft_ids_stride,
    parents_stride,
    RING: tl.constexpr,
    NUM_NODES: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of the states of one committed token."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    count = tl.load(counts_ptr + row * counts_stride)
    text = tl.load(text_ptr + row).to(tl.int64)
    slot = tl.load(slot_of_ptr + text)
    if (place >= count) | (slot >= nobody):
        return
    column = tl.load(path_ptr + row * (1 + NUM_NODES) + place)
    position = tl.load(lengths_ptr + text) - count - 1 + place
    alt = -1
    alt_id = -1
    if NUM_NODES > 0:
        committed = tl.load(tokens_ptr + text * tokens_stride + position + 1)
        node = tl.arange(0, NODES)
        is_node = node < tl.minimum(tl.load(num_valid_ptr + row), NUM_NODES)
        parent = tl.load(parents_ptr + row * parents_stride + node, mask=is_node, other=-2) + 1
        drafted = tl.load(draft_ids_ptr + row * draft_ids_stride + node, mask=is_node, other=-1)
        rejected = is_node & (parent == column) & (drafted != committed)
        first = tl.min(tl.where(rejected, node, NODES), 0)
        alt_id = tl.max(tl.where(rejected & (node == first), drafted, -1), 0)
        alt = tl.where(first < NODES, first, -1)

    part = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = part < width
    source = (row * (1 + NUM_NODES) + column) * hidden_stride + part
    at = slot.to(tl.int64) * RING + position % RING
    target = states_ptr + at * (5 * width) + part
    tl.store(target, tl.load(early_ptr + source, mask=inside), mask=inside)
    tl.store(target + width, tl.load(middle_ptr + source, mask=inside), mask=inside)
    tl.store(target + 2 * width, tl.load(late_ptr + source, mask=inside), mask=inside)
    hidden = tl.load(hidden_ptr + source, mask=inside)
    tl.store(target + 3 * width, hidden, mask=inside)
    if NUM_NODES > 0:
        # nothing rejected: any finite state will do
        beside = tl.where(alt >= 0, alt + 1, column)
        hidden = tl.load(hidden_ptr + (row * (1 + NUM_NODES) + beside) * hidden_stride + part, mask=inside)
    tl.store(target + 4 * width, hidden, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(alt_ids_ptr + at, alt_id)

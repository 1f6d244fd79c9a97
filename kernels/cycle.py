"""One cycle's two ends on the device: what the forward is given, and what becomes of the tokens the target sampled.

State lives in tensors (Texts, Rows), so a cycle of draft, forward, sample and commit needs no word from the host.
"""

from dataclasses import dataclass

import torch

MAX_NODES = 63  # a node's ancestors are the bits of an int64, whose sign stays clear

RUNNING, STOP, LENGTH = 0, 1, 2  # CycleResult.finish


@dataclass(frozen=True, slots=True)
class Texts:
    """What sequences have said, kept on the device where drafting reads it and committing extends it.

    N texts of at most L tokens, prompt included: those being written and finished ones worth quoting. tokens [N, L]
    int32; lengths [N] int32; groups [N] int32: texts of one prompt share a group, -1 marks a free text. The last text
    belongs to nobody: what inactive rows point at.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    groups: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The running sequences on the device; a cycle over B rows takes the first B of R.

    text [R] int32: the text each row writes. keys [R] int64: its noise. max_lengths [R] int32: tokens the text may
    reach. active [R] int32: 0 for a row that is free or whose sequence has finished: it must change nothing.
    block_tables [R, W] int32: where its keys and values are; entries past its last block may hold anything in range.
    """

    text: torch.Tensor
    keys: torch.Tensor
    max_lengths: torch.Tensor
    active: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class Drafts:
    """The trees proposed for B rows. token_ids, parents [B, M] int32; num_nodes [B] int32, nodes past it hold anything.

    parents: index of each node's parent, -1 for the pending token. Parents stand before children; siblings carry
    different tokens.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    num_nodes: torch.Tensor


@dataclass(frozen=True, slots=True)
class CycleInputs:
    """What B rows forward: each its pending token, then M nodes, Q = 1 + M tokens.

    token_ids, positions, slots, keys, sample_positions [B * Q] int64: the token, its distance from the text's start
    by depth inside the tree, where its key and value are written, and the noise of the token drawn after it.
    context_lens [B] int32: tokens cached before this forward. num_drafted [B] int32: M in every row.
    ancestors [B * Q] int64: bit i of a node is set where it sees node i: its ancestors and itself; 0 for the pending
    token. num_valid [B] int32: nodes that count; those past them pad, see themselves alone and are written to the
    dummy slot, as is all of an inactive row.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    context_lens: torch.Tensor
    ancestors: torch.Tensor
    num_drafted: torch.Tensor
    keys: torch.Tensor
    sample_positions: torch.Tensor
    num_valid: torch.Tensor


@dataclass(frozen=True, slots=True)
class CycleResult:
    """What a cycle committed, for the host, and which cache entries must move, for the device.

    host [B, 3 + 3 Q] int32: all that the host reads, so that one copy brings it there; the properties are views of it.
    counts [B]: tokens committed, 0 for an inactive row. finish [B]: RUNNING, STOP or LENGTH. accepted [B]: drafted
    tokens among those committed. token_ids [B, Q] int32 and logprobs [B, Q] float32: the committed ones, then zeros.
    proposed_by_depth [B, Q]: nodes verified d + 1 levels below the pending token; the last is always 0.
    src_slots, dst_slots [B, M] int64: the entry at src belongs at dst now; -1 where nothing moves. A slot may be one's
    source and another's destination, inside a row: all reads come before the first write.
    path [B, Q] int32: the column, 0 the pending token and 1 + j node j, after which each committed token was sampled;
    entries past counts hold anything in range.
    """

    host: torch.Tensor
    src_slots: torch.Tensor
    dst_slots: torch.Tensor
    path: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        return self.host[:, 0]

    @property
    def finish(self) -> torch.Tensor:
        return self.host[:, 1]

    @property
    def accepted(self) -> torch.Tensor:
        return self.host[:, 2]

    @property
    def token_ids(self) -> torch.Tensor:
        return self.host[:, 3:].chunk(3, dim=1)[0]

    @property
    def logprobs(self) -> torch.Tensor:
        return self.host[:, 3:].chunk(3, dim=1)[1].view(torch.float32)

    @property
    def proposed_by_depth(self) -> torch.Tensor:
        return self.host[:, 3:].chunk(3, dim=1)[2]


def prepare(
    texts: Texts, rows: Rows, drafts: Drafts | None, *, num_rows: int, block_size: int, dummy_slot: int
) -> CycleInputs:
    """What the first num_rows rows forward: their pending tokens and, unless drafts is None, their drafted trees.

    A row whose text has n tokens forwards tokens[n - 1] at position n - 1, and node j at index n + j, at the position
    of its depth below. Nodes whose index would pass max_lengths are dropped: a prefix of a tree is a tree.
    """
    if texts.tokens.is_cuda:
        from kernels.cycle_triton import prepare_triton

        return prepare_triton(texts, rows, drafts, num_rows=num_rows, block_size=block_size, dummy_slot=dummy_slot)
    return prepare_reference(texts, rows, drafts, num_rows=num_rows, block_size=block_size, dummy_slot=dummy_slot)


def commit(
    texts: Texts,
    rows: Rows,
    drafts: Drafts | None,
    inputs: CycleInputs,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    num_rows: int,
    block_size: int,
    stop_ids: torch.Tensor,
    out: torch.Tensor | None = None,
) -> CycleResult:
    """Keep what the target sampled after the pending token and along the path of nodes that agree with it.

    A node is kept when its parent is kept and it is the token the target sampled there (rollout/speculate.py, verify).
    Committed is the target's token after the pending token and after every kept node, up to the first stop token,
    which is kept, or max_lengths. Texts grow by it; a row that finishes is no longer active.
    Shapes: drafts and inputs as prepare was given and gave them; token_ids [B * Q] int64 and logprobs [B * Q] float32
    sampled after each forwarded token; stop_ids [K] int32; out [B, 3 + 3 Q] int32, contiguous: becomes the result's
    host tensor. Mutates texts.tokens, texts.lengths and rows.active.
    """
    if texts.tokens.is_cuda:
        from kernels.cycle_triton import commit_triton as commit_on_device
    else:
        commit_on_device = commit_reference
    return commit_on_device(
        texts,
        rows,
        drafts,
        inputs,
        token_ids,
        logprobs,
        num_rows=num_rows,
        block_size=block_size,
        stop_ids=stop_ids,
        out=out,
    )


def prepare_reference(
    texts: Texts, rows: Rows, drafts: Drafts | None, *, num_rows: int, block_size: int, dummy_slot: int
) -> CycleInputs:
    """The definition of prepare."""
    num_nodes = _num_nodes(drafts)
    device = texts.tokens.device
    text, active = rows.text[:num_rows].long(), rows.active[:num_rows] != 0
    lengths = torch.where(active, texts.lengths[text], 1).long()
    num_valid = torch.zeros(num_rows, dtype=torch.int32, device=device)
    tokens = torch.zeros(num_rows, 1 + num_nodes, dtype=torch.int64, device=device)
    tokens[:, 0] = texts.tokens[text, lengths - 1]
    depths = torch.zeros_like(tokens)
    node_bits = torch.ones(num_nodes, dtype=torch.int64, device=device) << torch.arange(num_nodes, device=device)
    ancestors = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), node_bits]).repeat(num_rows, 1)
    if drafts is not None:
        room = (rows.max_lengths[:num_rows] - lengths).clamp(min=0)
        num_valid = torch.where(active, torch.minimum(drafts.num_nodes[:num_rows], room), 0).int()
        tokens[:, 1:] = drafts.token_ids[:num_rows]
        # column 0 of every table is the pending token, the parent of nodes whose parent is -1
        is_node = torch.arange(num_nodes, device=device) < num_valid[:, None]
        parents = torch.where(is_node, drafts.parents[:num_rows] + 1, 0).long()
        for node in range(num_nodes):
            parent = parents[:, node, None]
            ancestors[:, node + 1, None] |= ancestors.gather(1, parent)
            depths[:, node + 1, None] = depths.gather(1, parent) + 1
    column = torch.arange(1 + num_nodes, device=device)
    valid = active[:, None] & (column <= num_valid[:, None])
    index = torch.where(valid, lengths[:, None] - 1 + column, 0)
    positions = torch.where(valid, lengths[:, None] - 1 + depths, 0)
    return CycleInputs(
        token_ids=torch.where(valid, tokens, 0).flatten(),
        positions=positions.flatten(),
        slots=torch.where(valid, _slots(rows, index, block_size), dummy_slot).flatten(),
        context_lens=torch.where(active, lengths - 1, 0).int(),
        ancestors=ancestors.flatten(),
        num_drafted=torch.full((num_rows,), num_nodes, dtype=torch.int32, device=device),
        keys=rows.keys[:num_rows].repeat_interleave(1 + num_nodes),
        sample_positions=(positions + 1).flatten(),
        num_valid=num_valid,
    )


def commit_reference(
    texts: Texts,
    rows: Rows,
    drafts: Drafts | None,
    inputs: CycleInputs,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    num_rows: int,
    block_size: int,
    stop_ids: torch.Tensor,
    out: torch.Tensor | None = None,
) -> CycleResult:
    """The definition of commit."""
    num_nodes = _num_nodes(drafts)
    device = texts.tokens.device
    text, active = rows.text[:num_rows].long(), rows.active[:num_rows] != 0
    lengths = texts.lengths[text].long()
    sampled, sampled_logprobs = token_ids.view(num_rows, -1), logprobs.view(num_rows, -1)
    node_index = torch.arange(num_nodes, device=device)

    # the walk: path[:, k] is the column after which the k-th token was sampled, the pending token's first
    path = torch.zeros(num_rows, 1 + num_nodes, dtype=torch.int64, device=device)
    num_kept = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)
    reached = torch.zeros_like(num_kept)
    is_node = node_index < inputs.num_valid[:, None]
    if drafts is not None:
        for node in range(num_nodes):
            agrees = drafts.token_ids[:num_rows, node, None] == sampled.gather(1, reached)
            kept = is_node[:, node, None] & (drafts.parents[:num_rows, node, None] + 1 == reached) & agrees
            reached = torch.where(kept, node + 1, reached)
            num_kept += kept
            path.scatter_(1, num_kept, reached)

    # the cut
    column = torch.arange(1 + num_nodes, device=device)
    new_ids = sampled.gather(1, path)
    room = (rows.max_lengths[:num_rows] - lengths).clamp(min=0)
    counts = torch.where(active, torch.minimum(num_kept[:, 0] + 1, room), 0)
    is_stop = torch.isin(new_ids, stop_ids) & (column < counts[:, None])
    stopped = is_stop.any(dim=1)
    counts = torch.where(stopped, is_stop.int().argmax(dim=1) + 1, counts)
    full = active & (lengths + counts == rows.max_lengths[:num_rows])
    finish = torch.where(stopped, STOP, torch.where(full, LENGTH, RUNNING))
    committed = column < counts[:, None]

    row, place = committed.nonzero(as_tuple=True)
    texts.tokens[text[row], lengths[row] + place] = new_ids[row, place].int()
    # not by index: inactive rows share a text
    texts.lengths.index_add_(0, text, counts.int())
    rows.active[:num_rows] = (active & (finish == RUNNING)).int()

    accepted = torch.minimum(num_kept[:, 0], counts)
    moves = (node_index < accepted[:, None]) & (path[:, 1:] != node_index + 1)
    sources = torch.where(moves, lengths[:, None] + path[:, 1:] - 1, 0)
    targets = torch.where(moves, lengths[:, None] + node_index, 0)
    result = CycleResult(
        host=texts.tokens.new_empty(num_rows, 6 + 3 * num_nodes) if out is None else out,
        src_slots=torch.where(moves, _slots(rows, sources, block_size), -1),
        dst_slots=torch.where(moves, _slots(rows, targets, block_size), -1),
        path=path.int(),
    )
    result.counts.copy_(counts)
    result.finish.copy_(finish)
    result.accepted.copy_(accepted)
    result.token_ids.copy_(torch.where(committed, new_ids, 0))
    result.logprobs.copy_(torch.where(committed, sampled_logprobs.gather(1, path), 0))
    depths = inputs.positions.view(num_rows, -1)[:, 1:] - lengths[:, None]  # 0 directly below the pending token
    at_depth = (depths[:, None] == column[:, None]) & is_node[:, None]
    result.proposed_by_depth.copy_(at_depth.sum(dim=2))
    return result


def _num_nodes(drafts: Drafts | None) -> int:
    num_nodes = 0 if drafts is None else drafts.token_ids.shape[1]
    assert num_nodes <= MAX_NODES, f"{num_nodes} nodes exceed the {MAX_NODES} an ancestor mask has bits for"
    return num_nodes


def _slots(rows: Rows, index: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where the token at each index of a row's text is cached. index [B, ...] int64, below the row's max_lengths."""
    blocks = rows.block_tables[: index.shape[0]].gather(1, index // block_size).long()
    return blocks * block_size + index % block_size

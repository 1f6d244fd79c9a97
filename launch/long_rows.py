"""Rows that have said a great deal, without its having been computed: what their cycles launch, to be timed."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from configs.errors import ResourceError
from drafter.selfdraft import SelfDrafter
from drafter.types import Strategy
from kernels.cache import compact
from kernels.cycle import commit, prepare
from launch.bench_rollout import sampling
from rollout.decoder import make_decoder
from rollout.forward import RowForward
from rollout.graphs import GraphPool
from rollout.launched import seconds_between, stamp
from rollout.model import PagedCache
from rollout.residency import Residency
from rollout.sparse import SparseAttention, SparsePolicy

BLOCK_SIZE = 64
GRAPH_BYTES = 4 << 30
REPEATS = 5  # launches that a figure is the mean of


class LongRows:
    """So many rows of so many cached tokens: random keys and values in strewn blocks, known to a selector.

    Their cycles are rollout.resident.ResidentCycles', with a fixed context: rows are set back after every launch.
    """

    @torch.inference_mode()
    def __init__(
        self, model: PreTrainedModel, sparse: SparseAttention, *, num_rows: int, tokens: int, max_depth: int, seed: int
    ) -> None:
        device = model.device
        max_length = tokens + 2 + max_depth
        width = -(-(max_length + max_depth) // BLOCK_SIZE)
        try:
            self.cache = PagedCache(
                model.config,
                num_blocks=num_rows * width,
                block_size=BLOCK_SIZE,
                device=str(device),
                dtype=model.dtype,
            )
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"no memory for {num_rows} rows of {tokens} tokens; lower --layers or the largest of --ratios"
            ) from error
        self.num_rows = num_rows
        self._residency = Residency(
            num_rows=num_rows,
            num_texts=num_rows,
            max_length=max_length,
            table_width=width,
            max_nodes=max_depth,
            dummy_block=self.cache.dummy_block,
            device=device,
            drafter=None,
            reader=None,
        )
        self._lengths = tokens + 1
        self._sparse = sparse
        self._graphs = GraphPool(device, max_bytes=GRAPH_BYTES)
        decoder = make_decoder(model)
        decoder.reach(max_length)
        how = sampling(1, seed=seed)
        self._forward = RowForward(decoder, self.cache, how, residency=self._residency, block_size=BLOCK_SIZE)
        self._drafter = SelfDrafter()
        self._fill(num_rows * width, model.config.get_text_config().vocab_size, seed)
        drafting = self._forward
        if sparse.lowbit is not None:
            reads = sparse.lowbit.drafting(decoder)
            sparse.lowbit.refresh(0, [self._residency.texts.tokens[0].tolist()])
            drafting = RowForward(reads, self.cache, how, residency=self._residency, block_size=BLOCK_SIZE)
        self._drafter.lend(SparsePolicy(drafting, sparse))
        # what a watching selector goes by is nothing until a verification: the newest blocks are as many
        sparse.attach(self.cache, num_texts=num_rows, num_rows=num_rows, table_width=width)
        sparse.begin(range(num_rows))
        begins = torch.zeros(num_rows, dtype=torch.int32, device=device)
        sparse.describe(
            block_tables=self._residency.rows.block_tables,
            begins=begins,
            ends=begins + tokens,
            most=tokens,
        )
        self._accepted = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def plain_ms(self, rounds: int) -> list[float]:
        """Milliseconds of a step without drafts or selectors, a value a round."""
        return self._times("plain", lambda: self._target(0, sparse=None), rounds)

    def draft_ms(self, depth: int, rounds: int) -> list[float]:
        """Milliseconds in which the policy drafts so many tokens under its selector."""
        strategy = Strategy("sparse", depth, 1, depth)
        drafts = self._residency.drafts(self.num_rows, depth)
        propose = self._drafter.propose
        texts, rows = self._residency.texts, self._residency.rows
        return self._times(f"draft {depth}", lambda: propose(texts, rows, strategy, drafts), rounds)

    def verify_ms(self, depth: int, rounds: int) -> list[float]:
        """Milliseconds in which the draft made last is verified, and what it commits described."""
        return self._times(f"verify {depth}", lambda: self._target(depth, sparse=self._sparse), rounds)

    def accepted(self) -> list[int]:
        """Drafted tokens that the verification launched last kept, by row."""
        return self._accepted.tolist()

    def _target(self, num_nodes: int, *, sparse: SparseAttention | None) -> None:
        """Forward pending tokens and drafts densely, sample, and commit."""
        residency, num_rows = self._residency, self.num_rows
        texts, rows = residency.texts, residency.rows
        drafts = residency.drafts(num_rows, num_nodes) if num_nodes else None
        inputs = prepare(
            texts, rows, drafts, num_rows=num_rows, block_size=BLOCK_SIZE, dummy_slot=self.cache.dummy_slot
        )
        attention = sparse.watch(rows, num_rows) if sparse else None
        drawn = self._forward(rows, inputs, num_rows=num_rows, num_nodes=num_nodes, attention=attention)
        result = commit(
            texts,
            rows,
            drafts,
            inputs,
            drawn.token_ids,
            drawn.logprobs,
            num_rows=num_rows,
            block_size=BLOCK_SIZE,
            stop_ids=self._forward.stop_ids,
            out=residency.results(num_rows, num_nodes),
        )
        self._accepted = result.accepted
        if num_nodes:
            compact(self.cache.storage, result.src_slots, result.dst_slots)
        if sparse is not None:
            sparse.commit(rows, inputs, result.counts, most=1 + num_nodes)

    def _fill(self, num_blocks: int, vocab_size: int, seed: int) -> None:
        """Random tokens, keys, values and places."""
        residency, device = self._residency, self.cache.storage.device
        generator = torch.Generator(device).manual_seed(seed)
        for layer in self.cache.storage:  # one by one: a normal of all would need as much again
            layer.normal_(generator=generator)
        residency.texts.tokens.random_(vocab_size, generator=generator)
        rows, index = residency.rows, torch.arange(self.num_rows, device=device)
        rows.text.copy_(index)
        rows.keys.copy_(index + 1)
        rows.max_lengths.fill_(residency.max_length)
        tables = torch.randperm(num_blocks, generator=generator, device=device, dtype=torch.int32)
        rows.block_tables.copy_(tables.view_as(rows.block_tables))
        self._set_back()

    def _set_back(self) -> None:
        self._residency.texts.lengths[: self.num_rows] = self._lengths
        self._residency.rows.active.fill_(1)

    @torch.inference_mode()
    def _times(self, name: str, launch: Callable[[], None], rounds: int) -> list[float]:
        """Milliseconds of a launch, a value a round; captured, and replayed once, before."""
        for _ in range(2):
            self._set_back()
            self._graphs.run(name, launch)
        return [self._mean_ms(name, launch) for _ in range(rounds)]

    def _mean_ms(self, name: str, launch: Callable[[], None]) -> float:
        device, times = self.cache.storage.device, []
        for _ in range(REPEATS):
            self._set_back()
            begun = stamp(device)
            self._graphs.run(name, launch)
            times.append((begun, stamp(device)))
        return sum(seconds_between(*each) for each in times) / REPEATS * 1e3


def rows_tokens(kv_bytes: float, token_bytes: int, num_rows: int) -> int:
    """Cached tokens of each row that come to so many bytes in all, in whole blocks, one at least."""
    return max(1, round(kv_bytes / (num_rows * token_bytes * BLOCK_SIZE))) * BLOCK_SIZE


def accept_length(rate: float, depth: int) -> float:
    """Tokens that a cycle commits where each of its drafted tokens is accepted at this rate if those before it were.

    1 + r + ... + r^depth. Source: Leviathan et al. 2023 (arXiv 2211.17192), eq. 1.
    """
    return sum(rate**power for power in range(depth + 1))

"""Cycles whose state lives on the device: the host plans ahead, launches, and reads results one cycle late.

A cycle is two launch sequences, each a CUDA graph: the drafter's proposal, and the target's part - prepare, forward,
sample, walk, commit, compact - which strategies that verify equally many tokens share (DESIGN.md, one cycle).
"""

from collections import abc

import torch

from drafter.selfdraft import DraftsAsPolicy
from drafter.types import CycleFeatures, Drafts, Strategy
from kernels.cache import compact
from kernels.cycle import CycleInputs, commit, prepare
from rollout.activity import Tally
from rollout.decoder import Decoder
from rollout.forward import Drawn, RowForward
from rollout.fused import LayerAttention
from rollout.graphs import GraphPool, bucket
from rollout.launched import Launched, Stamp, stamp
from rollout.lossy import let_stand
from rollout.model import PagedCache
from rollout.residency import Residency
from rollout.runner import group_by_length, pack
from rollout.scheduler import Scheduler, Work
from rollout.sequence import Sequence
from rollout.sparse import SparseAttention, SparsePolicy
from rollout.strategy import Chooser
from rollout.types import Sampling


class ResidentCycles:
    """Runs the sequences of one generate call over rows on the device.

    Blocks are reserved for what the cycle in flight and the next one can commit at most. When they run short the host
    first reads what is in flight, so that only sequences whose length is known are ever sent back.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        scheduler: Scheduler,
        sampling: Sampling,
        *,
        residency: Residency,
        graphs: GraphPool,
        chooser: Chooser,
        tally: Tally,
        block_size: int,
        sparse: SparseAttention | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._scheduler = scheduler
        self._sampling = sampling
        self._residency = residency
        self._graphs = graphs
        self._chooser = chooser
        self._tally = tally
        self._block_size = block_size
        self._device = cache.storage.device
        self._stop = frozenset(sampling.stop_token_ids)
        self._sparse = sparse
        self._forward = RowForward(decoder, cache, sampling, residency=residency, block_size=block_size)
        if sparse is not None and isinstance(residency.drafter, DraftsAsPolicy):
            kept = residency.draft_logprobs if sampling.under == "rectified" else None
            drafting = self._forward
            if sparse.lowbit is not None:
                reads = sparse.lowbit.drafting(decoder)
                drafting = RowForward(reads, cache, sampling, residency=residency, block_size=block_size)
            residency.drafter.lend(SparsePolicy(drafting, sparse, logprobs=kept))
        self._launched: Launched | None = None
        self._last_done: Stamp | None = None  # None where something else ran since

    @property
    def in_flight(self) -> bool:
        """Whether a cycle's results are still to come."""
        return self._launched is not None

    @torch.inference_mode()
    def step(self, version: int) -> list[Sequence]:
        """Launch a cycle, then read the one before; the sequences that became complete."""
        previous = self._launched
        finished: list[Sequence] = []
        # those on rows, and those that may enter now: after prompts were computed all of them do at once
        decoding = [s for s in self._scheduler.running if len(s.tokens) - s.num_cached == 1]
        strategy = self._chooser.choose(batch=max(1, len(decoding)), context=_mean_tokens(decoding))
        ahead = strategy.num_verify + (1 + previous.strategy.num_verify if previous else 0)
        if previous is not None and not self._scheduler.fits(ahead):
            finished += self._collect(previous)
            previous = self._launched = None
        works = self._scheduler.plan(ahead=ahead)
        self._residency.leave([s for s in self._residency.sequences if s.num_blocks == 0])
        coming = [work for work in works if work.sequence not in self._residency]
        # one admitted just now, its whole prompt known, has no blocks ahead yet; the next plan gives them
        ready = [
            work.sequence
            for work in coming
            if work.sequence.num_uncached == 1 and self._scheduler.holds(work.sequence, ahead)
        ]
        self._residency.enter(ready)
        if self._sparse is not None and ready:
            texts = self._residency.row_texts().tolist()
            self._sparse.begin(texts[-len(ready) :], beside=texts[: -len(ready)])
        self._residency.upload_blocks()
        self._launched = self._launch(strategy, version) if self._residency.sequences else None
        prefilling = [work for work in coming if work.sequence.num_uncached > 1]
        self._tally.cycle(strategy if self._launched else None, prefills=bool(prefilling))
        if prefilling:
            self._prefill(prefilling)
        if previous is not None:
            finished += self._collect(previous)
        return finished

    def admit(self, sequences: abc.Iterable[Sequence]) -> None:
        """Sequences the scheduler will plan."""
        self._residency.expect(sequences)

    def dismiss(self, sequences: abc.Collection[Sequence]) -> None:
        """Sequences that the scheduler dropped: another engine goes on with them."""
        assert self._launched is None
        self._residency.dismiss(sequences)

    @torch.inference_mode()
    def drain(self) -> list[Sequence]:
        """Read what is in flight: afterwards the host knows every token that the device does."""
        launched, self._launched = self._launched, None
        self._last_done = None  # the time until the next cycle is the caller's
        return [] if launched is None else self._collect(launched)

    def vacate(self) -> None:
        """Take all sequences off their rows; those the scheduler plans again will enter again."""
        assert self._launched is None
        self._residency.leave(list(self._residency.sequences))

    def close(self) -> None:
        """Vacate all rows. What is in flight is waited for and dropped."""
        if self._launched is not None:
            self._launched.wait()
            self._launched = None
        self._residency.clear()

    def _launch(self, strategy: Strategy, version: int) -> Launched:
        """Enqueue one cycle over all rows."""
        residency = self._residency
        num_rows = min(bucket(len(residency.sequences)), residency.num_rows)
        num_nodes = strategy.num_verify
        context = _mean_tokens(residency.sequences)
        begun = self._last_done or stamp(self._device)
        capture_s = 0.0
        residency.refresh(strategy)
        if num_nodes:
            drafter, drafts = residency.drafter, residency.drafts(num_rows, num_nodes)
            assert drafter is not None
            capture_s += self._graphs.run(
                ("draft", strategy, num_rows, *(self._forward.identity if strategy.source == "sparse" else ())),
                lambda: drafter.propose(residency.texts, residency.rows, strategy, drafts),
            )
        device_results = residency.results(num_rows, num_nodes)
        watched = self._watched()
        if watched is not None:
            self._target(num_rows, num_nodes, device_results, watched)
        else:
            capture_s += self._graphs.run(
                ("target", num_rows, num_nodes, *self._forward.identity),
                lambda: self._target(num_rows, num_nodes, device_results),
            )
        results = residency.host_results(num_rows, num_nodes)
        results.copy_(device_results, non_blocking=True)
        dense_logprobs = None
        if self._sampling.under == "rectified":
            assert strategy.source in ("off", "sparse"), "what is not the policy's own would stand"
            dense_logprobs = residency.host_dense_logprobs(num_rows, num_nodes)
            dense_logprobs.copy_(residency.dense_logprobs(num_rows, num_nodes), non_blocking=True)
        self._last_done = stamp(self._device)
        return Launched(
            sequences=list(residency.sequences),
            texts=residency.row_texts(),
            strategy=strategy,
            num_rows=num_rows,
            context=context,
            results=results,
            dense_logprobs=dense_logprobs,
            version=version,
            begun=begun,
            done=self._last_done,
            capture_s=capture_s,
            is_watched=watched is not None,
        )

    def _watched(self) -> LayerAttention | None:
        """What the next cycle attends with where gates learn from it."""
        sampler = None if self._sparse is None else self._sparse.sampler
        if sampler is None or self._sampling.temperature == 0:
            return None
        return sampler.next_cycle(self._residency.sequences)

    def _target(
        self, num_rows: int, num_nodes: int, results: torch.Tensor, watched: LayerAttention | None = None
    ) -> None:
        """Forward every row's pending token and draft, sample after each, commit what agrees, or all if rectified.

        watched: what it attends with in layers of gates that learn, in a cycle that runs outside of its graph.
        """
        residency, cache, size = self._residency, self._cache, self._block_size
        texts, rows = residency.texts, residency.rows
        drafts = residency.drafts(num_rows, num_nodes) if num_nodes else None
        inputs = prepare(texts, rows, drafts, num_rows=num_rows, block_size=size, dummy_slot=cache.dummy_slot)
        reader, sparse, under = residency.reader, self._sparse, self._sampling.under
        attention = None
        if sparse is not None and under == "sparse":
            attention = sparse.forward(rows, num_rows)
        elif sparse is not None:
            attention = sparse.watch(rows, num_rows, beside=watched)
        drawn = self._forward(
            rows,
            inputs,
            num_rows=num_rows,
            num_nodes=num_nodes,
            aux_layers=reader.aux_layers if reader else (),
            attention=attention,
        )
        token_ids, logprobs = drawn.token_ids, drawn.logprobs
        if under == "rectified":
            token_ids, logprobs = self._let_stand(drafts, inputs, drawn)
        result = commit(
            texts,
            rows,
            drafts,
            inputs,
            token_ids,
            logprobs,
            num_rows=num_rows,
            block_size=size,
            stop_ids=self._forward.stop_ids,
            out=results,
        )
        if num_nodes:
            compact(cache.storage, result.src_slots, result.dst_slots)
        if sparse is not None:
            sparse.commit(rows, inputs, result.counts, most=1 + num_nodes)
        if reader is not None:
            reader.observe(
                texts,
                rows,
                CycleFeatures(
                    num_rows=num_rows,
                    aux=drawn.aux,
                    hidden=drawn.hidden,
                    counts=result.counts,
                    path=result.path,
                    num_valid=inputs.num_valid,
                    drafts=drafts,
                ),
            )

    def _let_stand(self, drafts: Drafts | None, inputs: CycleInputs, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        """What a rectified cycle commits, [B * Q] tokens and what they were drawn with; the policy's own log-probs of
        them are left for the host."""
        residency, num_rows = self._residency, len(inputs.num_valid)
        num_nodes = 0 if drafts is None else drafts.token_ids.shape[1]
        settled = let_stand(
            drafts,
            residency.draft_logprobs(num_rows, num_nodes),
            inputs,
            drawn.logits,
            drawn.token_ids,
            drawn.logprobs,
            temperature=self._sampling.temperature,
        )
        residency.dense_logprobs(num_rows, num_nodes).copy_(settled.dense_logprobs.view(num_rows, 1 + num_nodes))
        return settled.token_ids, settled.logprobs

    def _prefill(self, works: abc.Sequence[Work]) -> None:
        """Compute prompts up to their last token, which the first cycle forwards as the row's pending token."""
        shares = [Work(w.sequence, min(w.num_tokens, w.sequence.num_uncached - 1)) for w in works]
        groups = group_by_length(shares) if self._device.type == "cpu" else [list(range(len(shares)))]
        for group in groups:
            packed = pack([shares[index] for index in group], block_size=self._block_size, device=self._device)
            self._decoder.forward(packed.token_ids, packed.positions, packed.seqs, self._cache)
            if self._sparse is not None:
                self._sparse.prefilled(packed.seqs)
        self._last_done = None
        for share in shares:
            self._scheduler.advance(share.sequence, share.sequence.num_cached + share.num_tokens)

    def _collect(self, launched: Launched) -> list[Sequence]:
        """Commit on the host what a cycle committed on the device; the sequences that became complete."""
        seconds = launched.wait()
        read = launched.read()
        num_nodes, source = launched.strategy.num_verify, launched.strategy.source
        proposed_lists = read.proposed.tolist()
        finished = []
        for row, sequence in enumerate(launched.sequences):
            count = read.counts[row]
            if count == 0:  # it finished one cycle earlier
                continue
            if count < 1 + num_nodes:
                del read.tokens[row][count:], read.logprobs[row][count:]
            taken = sequence.commit(
                read.tokens[row], read.logprobs[row], stop_token_ids=self._stop, version=launched.version
            )
            assert taken == count, "host and device disagree about the end of a sequence"
            if read.dense_logprobs is not None:
                sequence.dense_logprobs += read.dense_logprobs[row][:count]
            if num_nodes:
                sequence.count_forward(proposed_lists[row], read.accepted[row], source, count=count)
            else:
                sequence.num_forwards += 1
            if sequence.finish is None:
                self._scheduler.extend(sequence, len(sequence.tokens) - 1)
            else:
                self._scheduler.finish(sequence)
                finished.append(sequence)
        if self._residency.reader is not None:
            launched.tell(self._residency.reader, read)
        self._tally.tokens += sum(read.counts)
        if not launched.is_watched:
            self._chooser.observe(launched.report(read, seconds))
        self._residency.leave(finished)
        return finished


def _mean_tokens(sequences: abc.Sequence[Sequence]) -> float:
    return sum([len(sequence.tokens) for sequence in sequences]) / max(1, len(sequences))

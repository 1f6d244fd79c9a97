"""One response in the making: its tokens, the part of them that is in the KV cache, and what it will report."""

from collections import abc
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rollout.blocks import ROOT, chain_hash
from rollout.types import Partial, Prompt, Rollout, SampledUnder, SpecStats


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been sampled after it.

    The last token is always pending: sampled (or the prompt's last), not yet forwarded. num_cached tokens have their
    keys and values in the blocks of block_table[:num_blocks]; a new, a preempted and a decoding sequence differ in
    num_cached alone. A sequence may grow to max_length tokens, and block_table has room for as many.
    """

    prompt: Prompt
    sample: int
    noise_key: int
    max_length: int
    block_size: int
    sampled_under: SampledUnder = "dense"
    tokens: list[int] = field(init=False)
    block_table: np.ndarray = field(init=False)  # [ceil(max_length / block_size)] int32
    num_blocks: int = 0
    num_cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    dense_logprobs: list[float] = field(default_factory=list)  # as many, of a rectified one
    version_spans: list[tuple[int, int]] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    num_forwards: int = 0
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)  # as in SpecStats, like the next
    drafted: list[tuple[int, int]] = field(default_factory=list)
    _hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.token_ids)
        self.block_table = np.zeros(-(-self.max_length // self.block_size), dtype=np.int32)

    @property
    def num_uncached(self) -> int:
        """Tokens to forward before, or while, the next one is sampled; at least the pending one."""
        return len(self.tokens) - self.num_cached

    @property
    def num_remaining(self) -> int:
        """Tokens the sequence may still take."""
        return self.max_length - len(self.tokens)

    @property
    def num_shared(self) -> int:
        """Tokens of the prompt that its samples share: its full blocks without the last token, which is pending."""
        return (len(self.prompt.token_ids) - 1) // self.block_size * self.block_size

    def slot(self, index: int) -> int:
        """Place in the cache of the token at this index."""
        return int(self.block_table[index // self.block_size]) * self.block_size + index % self.block_size

    def block_hashes(self, count: int) -> list[bytes]:
        """Chain hashes of the first count blocks, all of them full."""
        size = self.block_size
        assert count * size <= len(self.tokens)
        while len(self._hashes) < count:
            start = len(self._hashes) * size
            parent = self._hashes[-1] if self._hashes else ROOT
            self._hashes.append(chain_hash(parent, self.tokens[start : start + size]))
        return self._hashes[:count]

    def commit(self, token_ids: list[int], logprobs: list[float], *, stop_token_ids: abc.Set[int], version: int) -> int:
        """Append tokens up to the first stop token or max_length, which finish the sequence; return how many."""
        spans, room = self.version_spans, self.max_length - len(self.tokens)
        count = min(len(token_ids), room)
        for index in range(count):
            if token_ids[index] in stop_token_ids:
                count = index + 1
                self.finish = "stop"
                break
        self.tokens += token_ids[:count]
        self.logprobs += logprobs[:count]
        if self.finish is None and count == room:
            self.finish = "length"
        if spans and spans[-1][0] == version:
            spans[-1] = (version, spans[-1][1] + count)
        else:
            spans.append((version, count))
        return count

    def count_forward(
        self, proposed_by_depth: abc.Sequence[int], num_accepted: int, source: str, *, count: int
    ) -> None:
        """Record one verification, after its tokens were committed.

        proposed_by_depth: drafted nodes d + 1 levels down. num_accepted: drafted tokens among the count committed ones,
        which they begin. source: who drafted them.
        """
        self.num_forwards += 1
        if num_accepted:
            self.drafted.append((len(self.logprobs) - count, num_accepted))
        deepest = len(proposed_by_depth)
        while deepest and not proposed_by_depth[deepest - 1]:
            deepest -= 1
        missing = deepest - len(self.proposed_by_depth)
        if missing > 0:
            self.proposed_by_depth += [0] * missing
            self.accepted_by_depth += [0] * missing
        for level in range(deepest):
            self.proposed_by_depth[level] += proposed_by_depth[level]
        for level in range(num_accepted):
            self.accepted_by_depth[level] += 1
        if deepest:
            forwards, accepted = self.by_source.get(source, (0, 0))
            self.by_source[source] = forwards + 1, accepted + num_accepted

    def take_up(self, partial: Partial) -> None:
        """Go on from what was sampled elsewhere."""
        assert not self.logprobs and partial.prompt.id == self.prompt.id and partial.sample == self.sample
        self.tokens += partial.token_ids
        self.logprobs += partial.logprobs
        self.dense_logprobs += partial.dense_logprobs
        self.version_spans += partial.version_spans
        self.num_forwards = partial.spec.forwards
        self.proposed_by_depth += partial.spec.proposed_by_depth
        self.accepted_by_depth += partial.spec.accepted_by_depth
        self.by_source |= partial.spec.by_source
        self.drafted += partial.spec.drafted
        assert self.num_remaining > 0, "it is complete"

    def partial(self) -> Partial:
        """The response so far."""
        assert self.finish is None
        return Partial(
            prompt=self.prompt,
            sample=self.sample,
            token_ids=self.tokens[len(self.prompt.token_ids) :],
            logprobs=self.logprobs,
            version_spans=self.version_spans,
            spec=self._spec(),
            dense_logprobs=self.dense_logprobs,
        )

    def rollout(self) -> Rollout:
        """The finished response."""
        assert self.finish is not None
        return Rollout(
            prompt_id=self.prompt.id,
            sample=self.sample,
            token_ids=self.tokens[len(self.prompt.token_ids) :],
            logprobs=self.logprobs,
            version_spans=self.version_spans,
            finish=self.finish,
            spec=self._spec(),
            sampled_under=self.sampled_under,
            dense_logprobs=self.dense_logprobs,
        )

    def _spec(self) -> SpecStats:
        return SpecStats(
            forwards=self.num_forwards,
            proposed=sum(self.proposed_by_depth),
            accepted=sum(self.accepted_by_depth),
            proposed_by_depth=self.proposed_by_depth,
            accepted_by_depth=self.accepted_by_depth,
            by_source=self.by_source,
            drafted=self.drafted,
        )

"""What flows through the rollout engine: prompts in, rollouts out. Plain values that may cross processes."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem, ready for the policy.

    id: stable across epochs and runs; two prompts of one data set never share it.
    token_ids: chat template applied, generation prompt included.
    answer: the reference answer, as text. task: what the reward needs besides, JSON-able
    ("question" always; "solution" and reasoning-gym's "metadata" and "name" where the source has them).
    """

    id: str
    token_ids: list[int]
    answer: str
    task: dict[str, Any] = field(default_factory=dict)


# How the policy attends where a token is drawn from it: to all keys; to those a selector picks; or so, and every few
# tokens all of them are forwarded again densely, which leaves their dense keys and log-probs (ReSA, arXiv 2506.04108).
SampledUnder = Literal["dense", "sparse", "rectified"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The transform from logits to the sampled distribution, and the identity of the noise.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 filter nothing. Filters apply after the temperature, in the
    order top_k, top_p, min_p. seed and step key the noise together with prompt, sample and position (DESIGN.md,
    idea 2). under: anything but "dense" samples from another distribution than the policy's, and marks what it gives.
    """

    num_samples: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    step: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    under: SampledUnder = "dense"


@dataclass(frozen=True, slots=True)
class SpecStats:
    """What speculation did for one rollout.

    accepted_by_depth[d] and proposed_by_depth[d] count drafted tokens d + 1 levels below the pending token. by_source:
    for each source that drafted, the forwards that verified its drafts, and its drafted tokens that were accepted.
    The accept length, tokens committed a forward, is (tokens) / forwards. drafted: which tokens of the response were
    accepted drafts, as runs of (first index, number), in order.
    """

    forwards: int
    proposed: int
    accepted: int
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    drafted: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    token_ids: generated tokens, the stop token included. logprobs: float32 each, under the sampling transform.
    version_spans: (policy version, number of tokens), in order. text: decoded without special tokens, "" until decoded.
    sampled_under: what logprobs are of, not of the policy's own distribution but where it is "dense". dense_logprobs:
    of "rectified" alone, the policy's own log-prob of each token, at the temperature and without filters; else empty.
    """

    prompt_id: str
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[tuple[int, int]]
    finish: Literal["stop", "length"]
    spec: SpecStats
    text: str = ""
    sampled_under: SampledUnder = "dense"
    dense_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Partial:
    """A response in the making, given up by one engine for another to go on with, token for token.

    token_ids, logprobs, version_spans and dense_logprobs as a Rollout's, of what was sampled so far; none where it has
    not begun. The rest needs the Sampling it was begun under: the noise is that of its seed, step, prompt, sample and
    position.
    """

    prompt: Prompt
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[tuple[int, int]]
    spec: SpecStats
    dense_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """What a worker did from begin to end, in seconds of time.time() on its host."""

    kind: Literal["decode", "prefill", "drafter"]
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Activity:
    """What one worker's engine does, and what it has done in the generates of one step.

    step: of the sampling; None before the first. running, waiting: sequences now. tokens: of responses, committed here.
    strategy: of the last cycle, "off" or as "suffix d6 k1 v6". cycles: by source of their drafts. preempted: how often
    a sequence was sent back to wait for room. spans: the latest ones that are over, in order; none overlaps another.
    """

    step: int | None = None
    running: int = 0
    waiting: int = 0
    tokens: int = 0
    strategy: str = "off"
    cycles: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    spans: tuple[Span, ...] = ()


class Engine(Protocol):
    """Samples rollouts from the current policy."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
        """num_samples rollouts of every prompt, each as it finishes; order is not part of the contract."""

    def update(self, version: int) -> int:
        """The policy is at this version: forget what was computed with the old one; the bytes of weights moved for it.

        0 where weights are shared. Raises StaleWeightsError where the version is not to be had whole.
        """

    def activity(self) -> list[Activity]:
        """What every worker does, as far as is known now; never waits for one. [] where there is nothing to tell."""

    def references(self) -> Mapping[tuple[str, int], Sequence[float]]:
        """The reference policy's log-probs of rollouts of the last generate, by prompt id and sample.

        Of those alone that idle workers have scored.
        """

    def figures(self) -> dict[str, Any]:
        """What the last generate measured beside what rollouts tell, for a step's record: of a fleet, its idle time."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to roll out at the same speed (the drafter's state): JSON-able with default=list."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""

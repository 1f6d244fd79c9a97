"""What flows through the learning half: groups, batches, statistics, and the seams around them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from drafter.report import DrafterReport, LearnStats
from rollout.types import Prompt, Rollout

Reward = Callable[[Prompt, Rollout], float]


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt in one step, ordered by sample.

    rewards [G]: weighted sums. advantages [G]. parts: each reward function's unweighted values, [G] by name.
    """

    prompt: Prompt
    rollouts: list[Rollout]
    rewards: list[float]
    advantages: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences, prompts and responses end to end. T tokens, N sequences.

    token_ids, positions [T] int64; cu_seqlens [N + 1] int32; old_logprobs [T] float32: the rollout's log-prob of
    token_ids[t], 0 off the response; advantages [T] float32; loss_mask [T] bool: True on response tokens;
    reference_logprobs [T] float32: the reference policy's, NaN off the response and where nobody computed them yet.
    dense_logprobs [T] float32: what the engine gives the token when it attends densely: old_logprobs of a token sampled
    so, NaN where it never did (Rollout.sampled_under "sparse").
    Token t is predicted from token t - 1 of the same sequence.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    reference_logprobs: torch.Tensor
    dense_logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepStats:
    """One training step. Means are over response tokens unless said otherwise.

    prob_diff and logprob_diff compare training with the engine's dense forward, which should agree; None where no token
    had one. log_ratio is training's log-prob less that which the token was sampled with: p over q of lossy modes.
    """

    loss: float
    grad_norm: float
    lr: float
    entropy: float
    kl: float  # k3 estimate against the reference; 0 without one
    clip_fraction: float
    importance_mean: float  # mean of the truncated rollout correction
    log_ratio_mean: float
    log_ratio_max: float
    effective_share: float  # (sum p/q)^2 / sum (p/q)^2, the effective sample size, as a share of the tokens
    prob_diff_mean: float | None  # mean |exp(training) - exp(rollout)| of the sampled tokens' probabilities
    prob_diff_max: float | None
    logprob_diff_mean: float | None
    logprob_diff_p99: float | None
    num_tokens: int  # response tokens trained on
    num_sequences: int
    seconds: float
    offloaded_bytes: int = 0  # of device memory that optimiser states leave to rollouts, on this rank
    memory_bytes: int = 0  # of a GPU held at a time, at most, since the step before, on this rank


class Trainer(Protocol):
    """Improves the policy whose parameters it shares with the engine."""

    def step(self, batch: Batch) -> StepStats:
        """One pass over the batch: updates_per_step optimiser updates. Raises DivergedError, parameters untouched."""

    def supervise(self, batch: Batch, lr: float) -> StepStats:
        """One cross-entropy update on the batch's masked tokens (the warm start)."""

    def save(self, folder: Path) -> None:
        """Write parameters, optimiser and scheduler state into an existing empty folder: safetensors and JSON."""

    def load(self, folder: Path) -> None:
        """Restore what save wrote, bit for bit."""


class Learner(Protocol):
    """Improves the drafter beside the policy. drafter.learner.Learner, or one over several workers'."""

    def begin(self, counts: torch.Tensor) -> None:
        """Choose its vocabulary by how often each token was sampled, counts [V] int64; only the first call counts."""

    def learn(self, *, budget_s: float, until: Callable[[], bool]) -> LearnStats:
        """Train until told to stop, or until another step would exceed the budget."""

    def settle(self, version: int) -> DrafterReport:
        """Judge what was learned by features of this policy version, the present one, and publish it where it is
        better. No rollout is being sampled."""

    def save(self, folder: Path) -> float:
        """Begin to write this folder, which appears when it is whole; the seconds the caller was held up."""

    def saved(self) -> None:
        """Wait for it. Raises StorageError where it could not be written."""

    def load(self, folder: Path) -> None:
        """Take up what save wrote, bit for bit, and serve what it served."""


class TeachesGates(Protocol):
    """Improves the gates that drafts are made by. rl.gate_lessons.GateLessons, or one over several workers'."""

    def take(self) -> dict[str, Any]:
        """A step's lesson, no sequence running; its figures. What is served afterwards is better, or as before."""

    def save(self, folder: Path, *, base_model: str) -> None:
        """Make this folder. base_model: what others call the policy. Raises OSError."""

    def load(self, folder: Path) -> None:
        """Take up what save wrote, bit for bit, and serve what it served."""

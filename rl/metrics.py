"""What a step measured: one flat record a step, for the terminal, metrics/steps.jsonl and whoever plots it."""

import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from math import ceil
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from configs.schema import Config
from rl.types import Group, StepStats
from rollout.types import Rollout


class Progress(Protocol):
    """Shows a person where the run is. Implementations: launch/monitor/terminal.py."""

    def phase(self, name: str) -> None:
        """The step enters this phase: rollout, reward, drafter, train, checkpoint, eval, warmstart."""

    def rollouts(self, done: int, total: int) -> None:
        """So many of the step's rollouts are finished."""

    def step(self, record: dict[str, float | int]) -> None:
        """A step is complete; record as step_record makes it."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """The run is over; leave the terminal as it was."""


BINS = 32  # of a histogram, at most
TAIL = 0.9  # of a step's rollouts; the tail is the time from there to the last


class Stopwatch:
    """Seconds spent in each named phase of one step, and in the tail of its rollouts. around: entered with each."""

    def __init__(self, around: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()) -> None:
        self._around = around
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = perf_counter()
        self._arrivals: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase."""
        begin = perf_counter()
        try:
            with self._around(name):
                yield
        finally:
            self.seconds[name] += perf_counter() - begin

    def arrived(self) -> None:
        """One more rollout is finished."""
        self._arrivals.append(perf_counter())

    def tail(self) -> float:
        """Seconds from nine rollouts in ten being finished to all of them; 0 without any."""
        if not self._arrivals:
            return 0.0
        return self._arrivals[-1] - self._arrivals[ceil(TAIL * len(self._arrivals)) - 1]

    def record(self) -> dict[str, float]:
        """seconds_PHASE for every phase, seconds_tail within that of the rollouts, and seconds since it was made."""
        phases = {f"seconds_{name}": value for name, value in self.seconds.items()} | {"seconds_tail": self.tail()}
        return phases | {"seconds": perf_counter() - self.start}


def rollout_record(groups: Sequence[Group], *, seconds: float) -> dict[str, float | int]:
    """Reward, length and speculation over all rollouts of a step; seconds: what sampling them took."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    tokens = sum(lengths)
    forwards = sum(rollout.spec.forwards for rollout in rollouts)
    proposed = sum(rollout.spec.proposed for rollout in rollouts)
    accepted = sum(rollout.spec.accepted for rollout in rollouts)
    record: dict[str, float | int] = {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "solved_all_or_none": sum(len(set(group.rewards)) == 1 for group in groups) / len(groups),
        "response_len_mean": tokens / len(rollouts),
        "response_len_max": max(lengths),
        "truncated_fraction": sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts),
        "num_rollouts": len(rollouts),
        "tokens": tokens,
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "accept_length": tokens / max(forwards, 1),
        "draft_tokens": proposed,
        "draft_accept_rate": accepted / max(proposed, 1),
        "lossy_share": sum(lossy_tokens(rollout) for rollout in rollouts) / max(tokens, 1),
    }
    for source in sorted({source for rollout in rollouts for source in rollout.spec.by_source}):
        counts = [rollout.spec.by_source.get(source, (0, 0)) for rollout in rollouts]
        drafted = sum(number for number, _ in counts)
        record[f"accept_length_{source}"] = 1 + sum(number for _, number in counts) / drafted
        record[f"draft_share_{source}"] = drafted / forwards
    for name in groups[0].parts:
        record[f"reward_{name}"] = statistics.fmean(value for group in groups for value in group.parts[name])
    return record


def step_record(
    step: int, config: Config, groups: Sequence[Group], stats: StepStats, watch: Stopwatch
) -> dict[str, Any]:
    """The record of one finished training step; step counts from 1."""
    record: dict[str, Any] = {"step": step, "total_steps": config.train.steps}
    record |= rollout_record(groups, seconds=watch.seconds["rollout"]) | distributions(groups, config)
    record |= {name: value for name, value in asdict(stats).items() if name != "seconds" and value is not None}
    return record | watch.record()


def distributions(groups: Sequence[Group], config: Config) -> dict[str, dict[str, list[float]]]:
    """Histograms of rewards and of response lengths, with edges that stay the same in all steps of a run.

    Lengths are divided from 0 to rollout.max_new_tokens, rewards over what functions between 0 and 1 can sum up to;
    what lies outside is counted in the outermost bin.
    """
    weights = config.reward.functions.values()
    low = sum(weight for weight in weights if weight < 0)
    high = sum(weight for weight in weights if weight > 0)
    longest = config.rollout.max_new_tokens
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(rollout.token_ids) for group in groups for rollout in group.rollouts]
    return {
        "reward_hist": histogram(rewards, [low + (high - low) * place / BINS for place in range(BINS + 1)]),
        "response_len_hist": histogram(lengths, sorted({round(longest * n / BINS) for n in range(BINS + 1)})),
    }


def histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, list[float]]:
    """How many values lie from each edge to before the next; in the last bin the last edge too, and all beyond."""
    last = len(edges) - 2
    counts = [0] * (last + 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), last)] += 1
    return {"edges": list(edges), "counts": list(counts)}


def sample_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One row a rollout, for samples/step_N.parquet."""
    return [
        {
            "prompt_id": group.prompt.id,
            "sample": rollout.sample,
            "question": str(group.prompt.task.get("question", "")),
            "answer": group.prompt.answer,
            "text": rollout.text,
            "reward": reward,
            "advantage": advantage,
            "num_tokens": len(rollout.token_ids),
            "finish": rollout.finish,
            "forwards": rollout.spec.forwards,
            "accepted": rollout.spec.accepted,
            "token_ids": np.array(rollout.token_ids, dtype=np.int32),
            "drafted": drafted(rollout),
            "sampled_under": rollout.sampled_under,
            "logprobs": np.array(rollout.logprobs, dtype=np.float32),
            "dense_logprobs": np.array(rollout.dense_logprobs, dtype=np.float32),
        }
        for group in groups
        for rollout, reward, advantage in zip(group.rollouts, group.rewards, group.advantages, strict=True)
    ]


def drafted(rollout: Rollout) -> np.ndarray:
    """Of each token whether it was an accepted draft, [T] bool."""
    flags = np.zeros(len(rollout.token_ids), dtype=bool)
    for first, count in rollout.spec.drafted:
        flags[first : first + count] = True
    return flags


def lossy_tokens(rollout: Rollout) -> int:
    """How many of a rollout's tokens were sampled under a selector; rectified, the last of every window was not."""
    match rollout.sampled_under:
        case "dense":
            return 0
        case "rectified":
            return sum(count for _, count in rollout.spec.drafted)
    return len(rollout.token_ids)

"""Every metric of a run: its name, its kind and the values its labels may take. What shows a number names it here.

Names follow Prometheus's conventions: a unit at the end, _total on counters, base units. What happens is counted, and
whoever reads takes rates and ratios of counts: a mean of means would be of nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rl.drift import LEVELS

PROB_DIFF_WARN, PROB_DIFF_ALARM = LEVELS["warn"], LEVELS["alarm"]

SOURCES = ("suffix", "eagle", "sparse")
PHASES = ("rollout", "reward", "drafter", "train", "sync", "checkpoint", "eval", "other")
ACTIVITIES = ("decode", "prefill", "train", "drafter", "sync", "idle", "reward", "checkpoint", "eval", "warmstart")
HEADS = ("trained", "served")
STATES = ("starting", "running", "done", "stopped", "died")
FAILURES = ("timeout", "memory", "died", "exception")
# Lines of events.jsonl; what none of these names is counted as other.
EVENTS = ("attempt", "resume", "recovery", "checkpoint", "exit", "drafter_off", "drift", "other")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. labels: each label's name and every value it may take; () where it may take any, as a run's name.

    buckets: upper bounds of a histogram's, without infinity.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(f"paceline_{name}_total", "counter", help, labels)


def _gauge(name: str, help: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(f"paceline_{name}", "gauge", help, labels)


INFO = _gauge("run_info", "The run that is watched; always 1.", run=(), model=(), host=())
STATE = _gauge("run_state", "1 for the state the run is in, 0 for the others.", state=STATES)
UPDATED = _gauge("last_update_timestamp_seconds", "When the run last wrote anything of itself, in Unix time.")
STEPS = _counter("steps", "Training steps finished.")
STEPS_PLANNED = _gauge("planned_steps", "Training steps the run is to take.")
STEP_SECONDS = Metric(
    "paceline_step_duration_seconds",
    "histogram",
    "Wall time of training steps.",
    buckets=(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0),
)
PHASE_SECONDS = _counter("phase_seconds", "Wall time of training steps by phase.", phase=PHASES)
WORKER_SECONDS = _counter("worker_seconds", "Time of all workers by what they did.", activity=ACTIVITIES)
SYNC_BYTES = _counter("weight_sync_bytes", "Bytes of weights sent from training to rollout.")

REWARD = _gauge("reward_mean", "Mean reward of the last step's rollouts.")
EVAL_REWARD = _gauge("eval_reward_mean", "Mean greedy reward of the last evaluation on held-out problems.")
LOSS = _gauge("loss", "Policy loss of the last step.")
GRAD_NORM = _gauge("grad_norm", "Norm of the policy's gradient in the last step, before clipping.")
LEARNING_RATE = _gauge("learning_rate", "Learning rate of the last step.")
KL = _gauge("reference_kl_nats", "Estimate (k3) of KL(policy || reference) per token in the last step.")
ENTROPY = _gauge("entropy_nats", "Mean entropy of the policy per token in the last step.")
CLIPPED = _gauge("clipped_ratio", "Share of the last step's tokens whose probability ratio was clipped.")
PROB_DIFF = _gauge(
    "probability_difference_mean", "Mean difference of a token's probability in training and in rollout, last step."
)
PROB_DIFF_MAX = _gauge("probability_difference_max", "Largest such difference in the last step.")
LOG_RATIO = _gauge(
    "log_ratio_mean_nats", "Mean of a token's log-prob in training less that it was sampled with, last step."
)
LOG_RATIO_MAX = _gauge("log_ratio_max_nats", "Largest such log ratio in the last step.")
EFFECTIVE = _gauge(
    "effective_sample_ratio", "Effective sample size of the last step's tokens under that ratio, as a share of them."
)

TOKENS = _counter("response_tokens", "Response tokens sampled in training steps, those of the step at hand included.")
LOSSY = _counter("response_tokens_lossy", "Response tokens of finished steps drawn from another than the policy.")
ROLLOUTS = _counter("rollouts", "Rollouts of finished training steps.")
TRUNCATED = _counter("rollouts_truncated", "Rollouts that ended because they reached the longest length.")
FORWARDS = _counter("sequence_forwards", "Forwards of the policy, counted for every sequence in them.")
PROPOSED = _counter("draft_tokens_proposed", "Drafted tokens that the policy verified.")
ACCEPTED = _counter("draft_tokens_accepted", "Drafted tokens that the policy accepted.", source=SOURCES)
DRAFTED = _counter("drafted_forwards", "Forwards that verified a draft, counted for every sequence.", source=SOURCES)
RUNNING = _gauge("running_sequences", "Sequences being decoded now.")
WAITING = _gauge("waiting_sequences", "Sequences waiting for room now.")

DRAFTER_VERSION = _gauge("drafter_version", "Version of the learned drafter that is served; 0 before the first.")
DRAFTER_LENGTH = _gauge(
    "drafter_accept_length_tokens", "Accept length on held-out features: of the copy that learns, of the head served.",
    head=HEADS,
)  # fmt: skip
DRAFTER_LOSS = _gauge("drafter_loss", "Loss of the learned drafter in its last lesson.")
DRAFTER_OFF = _gauge("drafter_off", "1 once the drafter learns no more.")

FAILED = _counter("reward_failures", "Rollouts scored 0 because a reward function failed.", kind=FAILURES)
HAPPENED = _counter("events", "Lines of events.jsonl: attempts, checkpoints, faults, ends.", kind=EVENTS)

CATALOGUE: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

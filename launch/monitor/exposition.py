"""The catalogue's metrics with a run's values, in Prometheus's text format or OpenMetrics."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from launch.monitor import catalogue as c
from launch.monitor.reader import RunReader
from launch.monitor.summary import state, summary
from launch.monitor.tail import Record

Value = tuple[tuple[str, ...], float]  # the labels' values, in the catalogue's order, and the number


class RunCollector(Collector):
    """Gives prometheus_client a run's metrics whenever someone asks for them."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader

    def collect(self) -> Iterator[Family]:
        """One family a metric of the catalogue."""
        values = measure(self._reader)
        for metric in c.CATALOGUE:
            yield family(metric, values.get(metric.name, []), self._reader)


def expose(reader: RunReader, accept: str) -> tuple[bytes, str]:
    """Every metric, and the content type it is written in, as the request's Accept header wants it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(reader))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def family(metric: c.Metric, values: Iterable[Value], reader: RunReader) -> Family:
    """A metric and its values as prometheus_client takes them."""
    if metric.kind == "histogram":
        bounds, seconds = metric.buckets, [record["seconds"] for record in reader.steps]
        counts = Counter(bisect_left(bounds, value) for value in seconds)
        names = [*(str(bound) for bound in bounds), "+Inf"]
        buckets = [(name, sum(counts[i] for i in range(index + 1))) for index, name in enumerate(names)]
        return HistogramMetricFamily(metric.name, metric.help, buckets=buckets, sum_value=sum(seconds))
    made: CounterMetricFamily | GaugeMetricFamily
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = kind(metric.name, metric.help, labels=tuple(metric.labels))
    for labels, value in values:
        made.add_metric(labels, value)
    return made


def measure(reader: RunReader) -> dict[str, list[Value]]:
    """The value of every counter and gauge that the run has one for, by metric name."""
    totals = count(reader)
    last = reader.steps[-1] if reader.steps else {}
    about = summary(reader)
    values: dict[str, list[Value]] = {name: sorted(of.items()) for name, of in totals.items()}

    def gauge(metric: c.Metric, value: float | None, *labels: str) -> None:
        if value is not None:
            values.setdefault(metric.name, []).append((labels, float(value)))

    gauge(c.INFO, 1, about["run"], about["model"], about["host"])
    for name in c.STATES:
        gauge(c.STATE, name == state(reader), name)
    gauge(c.UPDATED, reader.updated)
    gauge(c.STEPS_PLANNED, about["total_steps"])
    for metric, key in _LAST:
        gauge(metric, last.get(key))
    gauge(c.EVAL_REWARD, reader.evals[-1].get("reward_mean") if reader.evals else None)
    alive = bool(reader.status.get("alive"))
    for metric, key in ((c.RUNNING, "running"), (c.WAITING, "waiting")):
        gauge(metric, sum(worker[key] for worker in reader.latest.get("workers", [])) if alive else 0)
    gauge(c.DRAFTER_LENGTH, last.get("drafter_accept_length"), "trained")
    gauge(c.DRAFTER_LENGTH, last.get("drafter_served_accept_length"), "served")
    if "drafter_version" in last:
        gauge(c.DRAFTER_OFF, bool(last.get("drafter_off")))
    return values


_LAST = (
    (c.REWARD, "reward_mean"),
    (c.LOSS, "loss"),
    (c.GRAD_NORM, "grad_norm"),
    (c.LEARNING_RATE, "lr"),
    (c.KL, "kl"),
    (c.ENTROPY, "entropy"),
    (c.CLIPPED, "clip_fraction"),
    (c.PROB_DIFF, "prob_diff_mean"),
    (c.PROB_DIFF_MAX, "prob_diff_max"),
    (c.LOG_RATIO, "log_ratio_mean"),
    (c.LOG_RATIO_MAX, "log_ratio_max"),
    (c.EFFECTIVE, "effective_share"),
    (c.DRAFTER_VERSION, "drafter_version"),
    (c.DRAFTER_LOSS, "drafter_loss"),
)


def count(reader: RunReader) -> dict[str, Counter[tuple[str, ...]]]:
    """Every counter's values by its labels' values: sums over the steps' records."""
    totals: dict[str, Counter[tuple[str, ...]]] = {m.name: Counter() for m in c.CATALOGUE if m.kind == "counter"}

    def add(metric: c.Metric, number: float, *labels: str) -> None:
        totals[metric.name][labels] += number  # type: ignore[assignment]  # a Counter sums floats as well

    for metric in (c.STEPS, c.TOKENS, c.LOSSY, c.ROLLOUTS, c.TRUNCATED, c.FORWARDS, c.PROPOSED, c.SYNC_BYTES):
        add(metric, 0)
    for record in reader.steps:
        add(c.STEPS, 1)
        add(c.TOKENS, record["tokens"])
        add(c.LOSSY, round(record.get("lossy_share", 0) * record["tokens"]))
        add(c.ROLLOUTS, record["num_rollouts"])
        add(c.TRUNCATED, round(record["truncated_fraction"] * record["num_rollouts"]))
        add(c.SYNC_BYTES, record.get("weight_sync_bytes", 0))
        add(c.PROPOSED, record["draft_tokens"])
        add(c.FORWARDS, forwards := forwards_of(record))
        for source in c.SOURCES:
            if f"draft_share_{source}" in record:
                drafted = round(record[f"draft_share_{source}"] * forwards)
                add(c.DRAFTED, drafted, source)
                add(c.ACCEPTED, round((record[f"accept_length_{source}"] - 1) * drafted), source)
        for phase, seconds in phases(record).items():
            add(c.PHASE_SECONDS, seconds, phase)
    latest = reader.latest
    if not latest.get("eval") and latest.get("step", 0) > (reader.steps[-1]["step"] if reader.steps else 0):
        add(c.TOKENS, latest["tokens"])
    for activity, seconds in reader.activity_seconds.items():
        add(c.WORKER_SECONDS, seconds, activity)
    for event in reader.events:
        kind = event.get("event", "other")
        add(c.HAPPENED, 1, kind if kind in c.EVENTS else "other")
    before: Counter[str] = Counter()
    for record in reader.steps:
        failures: Counter[str] = Counter(record.get("reward_failures_by_kind", {}))
        for name, number in failures.items():
            # counted from the start of an attempt: fewer than before are those of a new one
            add(c.FAILED, number - before[name] if number >= before[name] else number, failure_kind(name))
        before = failures
    return totals


def forwards_of(record: Record) -> int:
    """Forwards of a step, counted for every sequence: its tokens over its accept length, which are whole numbers."""
    return round(record["tokens"] / record["accept_length"]) if record["accept_length"] else 0


def phases(record: Record) -> dict[str, float]:
    """Seconds of a step by phase; other is what no phase covers."""
    known = {name: record[f"seconds_{name}"] for name in c.PHASES if record.get(f"seconds_{name}") is not None}
    return known | {"other": max(0.0, record["seconds"] - sum(known.values()))}


def failure_kind(text: str) -> str:
    """Which of FAILURES a "function: kind" of rl.sandbox is."""
    if "no answer within" in text:
        return "timeout"
    if "MemoryError" in text:
        return "memory"
    return "died" if "killed by" in text or "exited with" in text else "exception"

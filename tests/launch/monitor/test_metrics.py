"""The catalogue, and what is made of it: /metrics, Prometheus's rules, the dashboard."""

import ast
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from launch.monitor import catalogue
from launch.monitor.catalogue import CATALOGUE, EVENTS
from launch.monitor.exposition import count, expose, failure_kind
from launch.monitor.generate import ALERTS, PANELS, write_monitoring
from launch.monitor.reader import RunReader

ROOT = Path(__file__).parents[3]
NAMES = {metric.name for metric in CATALOGUE}


def read(path: Path) -> RunReader:
    reader = RunReader(path)
    reader.poll()
    return reader


def exposed(reader: RunReader) -> dict[tuple[str, tuple[str, ...]], float]:
    text = expose(reader, "text/plain")[0].decode()
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_names_follow_prometheus_conventions() -> None:
    assert len(NAMES) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert re.fullmatch(r"paceline_[a-z]+(_[a-z]+)*", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert all(values for name, values in metric.labels.items() if metric is not catalogue.INFO), metric.name


def test_every_value_carries_labels_of_the_catalogue(written) -> None:
    written.step(1, drafter_version=2, drafter_accept_length=2.0, drafter_served_accept_length=1.9, drafter_loss=0.3)
    written.run.append_event("somethingnew")
    by_name = {metric.name.removesuffix("_total"): metric for metric in CATALOGUE}
    families = list(text_string_to_metric_families(expose(read(written.path), "")[0].decode()))
    assert {family.name for family in families} == set(by_name)
    for family in families:
        metric = by_name[family.name]
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            assert list(labels) == sorted(metric.labels)
            assert all(value in metric.labels[name] for name, value in labels.items() if metric.labels[name])


def test_counters_are_sums_over_steps(written) -> None:
    for step in (1, 2):
        written.step(step)
    written.point(3, written.begun + 40, running=5, finished=2)
    values = exposed(read(written.path))
    assert values["paceline_steps_total", ()] == 2
    assert values["paceline_response_tokens_total", ()] == 2 * 80 + 20  # those of the step under way are in it
    assert values["paceline_rollouts_truncated_total", ()] == 4
    assert values["paceline_sequence_forwards_total", ()] == 2 * 50
    assert values["paceline_drafted_forwards_total", ("suffix",)] == 2 * 20
    assert values["paceline_draft_tokens_accepted_total", ("suffix",)] == 2 * 30
    assert values["paceline_phase_seconds_total", ("train",)] == 6.0
    assert values["paceline_phase_seconds_total", ("other",)] == pytest.approx(2 * 1.5)
    assert values["paceline_worker_seconds_total", ("decode",)] == pytest.approx(2 * 7.0)
    assert values["paceline_step_duration_seconds_bucket", ("10.0",)] == 2
    assert values["paceline_running_sequences", ()] == 5
    assert values["paceline_run_state", ("running",)] == 1


def test_lossy_samples_are_counted_and_told_from_the_policy(written) -> None:
    written.step(1)  # as a run of an older version, which says nothing of them
    before = exposed(read(written.path))
    assert before["paceline_response_tokens_lossy_total", ()] == 0
    assert ("paceline_effective_sample_ratio", ()) not in before
    written.step(2, lossy_share=0.875, log_ratio_mean=-0.25, log_ratio_max=3.5, effective_share=0.17)
    values = exposed(read(written.path))
    assert values["paceline_response_tokens_lossy_total", ()] == 70
    assert values["paceline_log_ratio_mean_nats", ()] == -0.25
    assert values["paceline_log_ratio_max_nats", ()] == 3.5
    assert values["paceline_effective_sample_ratio", ()] == 0.17


def test_counters_of_a_finished_run_do_not_run(written) -> None:
    written.step(1)
    written.end()
    values = exposed(read(written.path))
    assert values["paceline_running_sequences", ()] == 0
    assert values["paceline_run_state", ("done",)] == 1
    assert values["paceline_events_total", ("exit",)] == 1


def test_failures_are_counted_over_attempts(written) -> None:
    for step, failures in enumerate(
        [{"task: killed by SIGKILL": 1}, {"task: killed by SIGKILL": 3}, {"x: ValueError": 2}]
    ):
        written.step(step + 1, reward_failures_by_kind=failures)
    assert dict(count(read(written.path))["paceline_reward_failures_total"]) == {("died",): 3, ("exception",): 2}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("code: no answer within 10 s", "timeout"),
        ("math: MemoryError", "memory"),
        ("task: exited with code 3", "died"),
        ("mine:score: ZeroDivisionError", "exception"),
    ],
)
def test_failure_has_one_of_four_kinds(text: str, kind: str) -> None:
    assert failure_kind(text) == kind


def test_every_event_of_the_program_is_in_the_catalogue() -> None:
    written = set()
    for folder in ("rl", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "append_event":
                    (kind, *_) = node.args
                    written |= {kind.value} if isinstance(kind, ast.Constant) else set()
    assert "attempt" in written
    assert written <= set(EVENTS)


def test_promtool_finds_nothing_wrong_with_the_metrics(written, program: Callable[[str], str]) -> None:
    written.step(1, drafter_version=1, drafter_loss=0.5)
    text, content_type = expose(read(written.path), "text/plain")
    assert content_type.startswith("text/plain")
    found = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


def test_scraper_that_asks_for_openmetrics_gets_it(written) -> None:
    text, content_type = expose(read(written.path), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_promtool_accepts_what_is_generated(tmp_path: Path, program: Callable[[str], str]) -> None:
    write_monitoring(tmp_path, port=8470)
    promtool = program("promtool")
    for what, file in (("config", "prometheus.yml"), ("rules", "rules.yml")):
        found = subprocess.run([promtool, "check", what, tmp_path / file], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
    assert yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"] == [
        {"targets": ["127.0.0.1:8470"]}
    ]


def test_every_query_names_metrics_and_labels_of_the_catalogue(tmp_path: Path) -> None:
    write_monitoring(tmp_path, port=8470)
    dashboard = json.loads((tmp_path / "grafana" / "paceline.json").read_text())
    rules = yaml.safe_load((tmp_path / "rules.yml").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(dashboard["panels"]) == len(PANELS) and len(alerts) == len(ALERTS)
    by_name = {metric.name: metric for metric in CATALOGUE}
    for query in queries + alerts:
        found = re.findall(r"paceline_\w+", query)
        metrics = [by_name[name.removesuffix("_bucket")] for name in found]  # KeyError: no metric of ours
        assert metrics, query
        for label in re.findall(r"by \((\w+)\)", query):
            assert label == "le" or any(label in metric.labels for metric in metrics), query
        for label, value in re.findall(r'\{(\w+)="(\w+)"\}', query):
            assert value in metrics[-1].labels[label], query


def test_every_metric_is_on_the_dashboard_or_in_an_alert_or_says_who_runs() -> None:
    text = " ".join([query for panel in PANELS for query in panel.queries.values()] + [a.expression for a in ALERTS])
    assert NAMES - set(re.findall(r"paceline_\w+?(?=_bucket\b|\b)", text)) == {catalogue.INFO.name}

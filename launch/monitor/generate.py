"""Prometheus's configuration, alerts and a Grafana dashboard, generated from the catalogue."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from launch.monitor import catalogue as c
from launch.monitor.catalogue import Metric

SCRAPE_S = 15
WINDOW = "5m"
COLUMNS = 24  # of Grafana's grid


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph: queries by legend, in PromQL, and the unit that Grafana shows."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    stacked: bool = False
    thresholds: tuple[float, ...] = ()  # where it turns yellow, and red


def rate(metric: Metric, *, by: str = "") -> str:
    """Increase a second of a counter, summed over all labels but these."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric.name}[{WINDOW}]))"


def ratio(numerator: Metric, denominator: Metric, *, by: str = "") -> str:
    """One counter's increase over another's."""
    return f"{rate(numerator, by=by)} / {rate(denominator, by=by)}"


def quantile(share: float, metric: Metric) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by (le) (rate({metric.name}_bucket[{WINDOW}])))"


PANELS: tuple[Panel, ...] = (
    Panel("Step", {"finished": c.STEPS.name, "planned": c.STEPS_PLANNED.name}),
    Panel("Reward", {"rollouts": c.REWARD.name, "held-out, greedy": c.EVAL_REWARD.name}),
    Panel("Response tokens a second", {"tokens": rate(c.TOKENS)}),
    Panel("Sequences", {"running": c.RUNNING.name, "waiting": c.WAITING.name}, stacked=True),
    Panel("Where step time goes", {"{{phase}}": rate(c.PHASE_SECONDS, by="phase")}, "s", stacked=True),
    Panel("What workers do", {"{{activity}}": rate(c.WORKER_SECONDS, by="activity")}, "s", stacked=True),
    Panel("Step time", {"median": quantile(0.5, c.STEP_SECONDS), "p90": quantile(0.9, c.STEP_SECONDS)}, "s"),
    Panel("Bytes of weights a second", {"sync": rate(c.SYNC_BYTES)}, "Bps"),
    Panel("Accept length", {"all forwards": ratio(c.TOKENS, c.FORWARDS),
                            "{{source}}": f"1 + {ratio(c.ACCEPTED, c.DRAFTED, by='source')}"}),
    Panel("Drafted tokens accepted", {"share": ratio(c.ACCEPTED, c.PROPOSED)}, "percentunit"),
    Panel("Drafter, held-out accept length", {"{{head}}": c.DRAFTER_LENGTH.name}),
    Panel("Drafter", {"version": c.DRAFTER_VERSION.name, "loss": c.DRAFTER_LOSS.name, "off": c.DRAFTER_OFF.name}),
    Panel("Rollout against training", {"mean": c.PROB_DIFF.name, "max": c.PROB_DIFF_MAX.name},
          thresholds=(c.PROB_DIFF_WARN, c.PROB_DIFF_ALARM)),
    Panel("What was sampled against the policy", {"log ratio, mean": c.LOG_RATIO.name,
                                                  "log ratio, max": c.LOG_RATIO_MAX.name}),
    Panel("Samples that count", {"effective": c.EFFECTIVE.name, "lossy": ratio(c.LOSSY, c.TOKENS)}, "percentunit"),
    Panel("Truncated rollouts", {"share": ratio(c.TRUNCATED, c.ROLLOUTS)}, "percentunit"),
    Panel("Loss", {"policy": c.LOSS.name, "KL to reference": c.KL.name}),
    Panel("Optimisation", {"gradient norm": c.GRAD_NORM.name, "entropy": c.ENTROPY.name, "clipped": c.CLIPPED.name}),
    Panel("Learning rate", {"policy": c.LEARNING_RATE.name}),
    Panel("Failures and events", {"reward {{kind}}": f"sum by (kind) (increase({c.FAILED.name}[{WINDOW}]))",
                                  "{{kind}}": f"sum by (kind) (increase({c.HAPPENED.name}[{WINDOW}]))"}),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alert:
    """What someone should be told of: when it holds for so long."""

    name: str
    expression: str
    lasting: str
    severity: str
    text: str


ALERTS: tuple[Alert, ...] = (
    Alert("PacelineDied", f'{c.STATE.name}{{state="died"}} == 1', "0m", "critical",
          "The run died before it could say why; `paceline resume RUN` goes on."),
    Alert("PacelineSilent",
          f'time() - {c.UPDATED.name} > 1800 and on (instance, job) {c.STATE.name}{{state="running"}} > 0',
          "0m", "critical", "The run is alive and has written nothing for half an hour."),
    Alert("PacelineDisagrees", f"{c.PROB_DIFF.name} > {c.PROB_DIFF_ALARM}", "0m", "critical",
          "Rollout and training disagree about the sampled tokens' probabilities."),
    Alert("PacelineDrifts", f"{c.PROB_DIFF.name} > {c.PROB_DIFF_WARN}", "15m", "warning",
          "Rollout and training begin to disagree about the sampled tokens' probabilities."),
    Alert("PacelineDrafterOff", f"{c.DRAFTER_OFF.name} == 1", "0m", "warning",
          "The drafter learns no more; rollouts go on with the head that was served last."),
    Alert("PacelineRewardsFail", f"sum(increase({c.FAILED.name}[15m])) > 0", "0m", "warning",
          "Reward functions fail, and their rollouts are scored 0."),
    Alert("PacelineTruncates", f"{ratio(c.TRUNCATED, c.ROLLOUTS)} > 0.5", "15m", "warning",
          "More than half of the rollouts reach rollout.max_new_tokens."),
)  # fmt: skip


def write_monitoring(folder: Path, *, port: int) -> None:
    """prometheus.yml, rules.yml and grafana/paceline.json for a hub on this port."""
    (folder / "grafana").mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(_yaml(prometheus(port)), encoding="utf-8")
    (folder / "rules.yml").write_text(_yaml(rules()), encoding="utf-8")
    (folder / "grafana" / "paceline.json").write_text(json.dumps(dashboard(PANELS), indent=1) + "\n", encoding="utf-8")


def prometheus(port: int) -> dict[str, Any]:
    """A configuration that scrapes the hub and loads the alerts beside it."""
    return {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "paceline", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }


def rules() -> dict[str, Any]:
    """The alerts as a rule file."""
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.text},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "paceline", "rules": alerts}]}


def dashboard(panels: Sequence[Panel]) -> dict[str, Any]:
    """A Grafana dashboard, two panels a row; Grafana asks for the data source when it is imported."""
    width, height = COLUMNS // 2, 8
    return {
        "title": "Paceline",
        "uid": "paceline",
        "tags": ["paceline"],
        "schemaVersion": 39,
        "refresh": f"{SCRAPE_S}s",
        "time": {"from": "now-3h", "to": "now"},
        "__inputs": [{"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "pluginId": "prometheus"}],
        "panels": [
            _panel(panel, index + 1, {"x": width * (index % 2), "y": height * (index // 2), "w": width, "h": height})
            for index, panel in enumerate(panels)
        ],
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": at} for color, at in zip(("yellow", "red"), panel.thresholds, strict=False)]
    custom: dict[str, Any] = {"fillOpacity": 30 if panel.stacked else 0, "lineWidth": 1}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    if panel.thresholds:
        custom["thresholdsStyle"] = {"mode": "line"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": source}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, width=120)
    return "# generated by `paceline monitor --write` from launch/monitor/catalogue.py\n" + text

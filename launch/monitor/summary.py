"""Where a run stands, in one record: what the page's header shows, and what should make someone look."""

import time
from datetime import datetime
from statistics import median
from typing import Any

from launch.monitor.catalogue import PROB_DIFF_ALARM, PROB_DIFF_WARN
from launch.monitor.reader import RunReader

RECENT = 10  # steps the time of arrival is judged by
SILENT_S = 60.0  # and five steps without a word from a run that is alive
_RESUMABLE = (75, 130, 143)  # asked to stop: nothing is wrong


def summary(reader: RunReader) -> dict[str, Any]:
    """State, step, time left, alarms, and the parts of the configuration that name the run."""
    status, config = reader.status, reader.config
    last = reader.steps[-1] if reader.steps else {}
    section = {name: config.get(name) or {} for name in ("run", "data", "spec", "compute", "train")}
    return {
        "run": section["run"].get("name", ""),
        "path": str(reader.path),
        "host": status.get("host", ""),
        "attempt": status.get("attempt", 0),
        "model": config.get("model", ""),
        "task": section["data"].get("name", ""),
        "source": section["spec"].get("source", ""),
        "workers": section["compute"].get("workers", 1),
        "state": state(reader),
        "alive": bool(status.get("alive")),
        "reason": status.get("reason", ""),
        "step": last.get("step", 0),
        "total_steps": last.get("total_steps") or section["train"].get("steps", 0),
        "drawn_steps": ranges(reader.drawn_steps),
        "begun": begun(reader),
        "updated": reader.updated,
        "now": time.time(),
        "eta_s": eta_s(reader),
        "alarms": [{"level": level, "text": text} for level, text in alarms(reader)],
        "thresholds": {"warn": PROB_DIFF_WARN, "alarm": PROB_DIFF_ALARM},
    }


def state(reader: RunReader) -> str:
    """starting, running, done, stopped, or died where the run ended without a word."""
    status = reader.status
    if status.get("alive"):
        # STATUS.json is written after a step; before the first one the curve says that it goes
        return "running" if reader.steps or reader.latest else str(status.get("state", "starting"))
    if "exit_code" not in status:
        return "died"
    return "done" if status["exit_code"] == 0 else "stopped"


def begun(reader: RunReader) -> float | None:
    """When the first attempt began, Unix time."""
    first = next((event["time"] for event in reader.events if "time" in event), None)
    return None if first is None else datetime.fromisoformat(first).timestamp()


def eta_s(reader: RunReader) -> float | None:
    """Seconds to the last step, by the median of recent ones; None where nobody can say."""
    if not reader.steps or not reader.status.get("alive"):
        return None
    last = reader.steps[-1]
    seconds = median(record["seconds"] for record in reader.steps[-RECENT:])
    left = (last["total_steps"] - last["step"]) * seconds
    return max(0.0, left - min(seconds, max(0.0, time.time() - last.get("time", time.time()))))


def alarms(reader: RunReader) -> list[tuple[str, str]]:
    """(alarm or warn, what is wrong), the worst first."""
    status = reader.status
    last = reader.steps[-1] if reader.steps else {}
    found: list[tuple[str, str]] = []
    now = state(reader)
    if now == "died":
        found.append(("alarm", f"the run died before it could say why; `paceline resume {reader.path}` goes on"))
    elif now == "stopped":
        level = "warn" if status["exit_code"] in _RESUMABLE else "alarm"
        found.append((level, f"stopped with exit code {status['exit_code']}: {status.get('reason', '')}"))
    difference = last.get("prob_diff_mean") or 0.0
    if difference > PROB_DIFF_WARN:
        level = "alarm" if difference > PROB_DIFF_ALARM else "warn"
        text = f"rollout and training disagree: mean probability difference {difference:.4f} in step {last['step']}"
        found.append((level, text))
    if "loss" in last and last["loss"] is None:
        found.append(("alarm", f"the loss of step {last['step']} is not finite"))
    silent = time.time() - reader.updated
    typical = median([record["seconds"] for record in reader.steps[-RECENT:]] or [SILENT_S])
    if status.get("alive") and now == "running" and silent > max(SILENT_S, 5 * typical):
        found.append(("alarm", f"nothing was written for {silent:.0f} s"))
    if last.get("drafter_off"):
        found.append(("warn", f"the drafter learns no more: {last['drafter_off']}"))
    if failures := last.get("reward_failures"):
        found.append(("warn", f"{failures} rewards failed in this attempt and were scored 0"))
    return sorted(found, key=lambda item: item[0] != "alarm")


def ranges(steps: list[int]) -> list[list[int]]:
    """Sorted whole numbers as [first, last] of every stretch without a gap."""
    found: list[list[int]] = []
    for step in steps:
        if found and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return found

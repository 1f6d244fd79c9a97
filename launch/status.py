"""`paceline status`: a run's STATUS.json for a person to read."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.crash import read, where
from launch.monitor.terminal import facts


def describe(status: Mapping[str, Any], path: Path) -> Table:
    """State, step, age and the last step's numbers."""
    view = Table.grid(padding=(0, 2))
    view.add_column(style="bold")
    view.add_column()
    view.add_row("run", str(path))
    view.add_row("state", state(status, path))
    if "step" in status:
        view.add_row("step", f"{status['step']} of {status.get('total_steps', '?')}")
    view.add_row("updated", f"{age(status['updated'])} ago, attempt {status['attempt']}")
    if (report := read(path, status["attempt"])) is not None:
        view.add_row("first cause", report["first"]["error"])
        view.add_row("where", where(report))
        if report["waited_for"]:
            view.add_row("waited for", report["waited_for"])
        view.add_row("next", report["following"] or "\n".join(report["next"]))
    for name, value in facts(status.get("record") or {}):
        if value:
            view.add_row(name, value)
    return view


def state(status: Mapping[str, Any], path: Path) -> str:
    """What the run does now; a run that says it goes on while nothing holds it has died."""
    remedy = f"`paceline resume {path}` goes on"
    if status["alive"]:
        return f"{status['state']} (process {status['pid']} on {status['host']})"
    if "exit_code" not in status:
        return f"died before it could say why; {remedy}"
    if status["exit_code"] == 0:
        return "done"
    return f"stopped with exit code {status['exit_code']}: {status['reason']}"


def age(updated: str) -> str:
    """Time since then, in its largest unit."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(updated)).total_seconds()
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0, seconds):.0f} seconds"

"""`paceline top`: a run in the terminal, live or finished, from its files."""

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.monitor.reader import RunReader
from launch.monitor.summary import alarms, eta_s, state
from launch.monitor.tail import Record
from launch.monitor.terminal import bar, number_grid, phase_bar, sparkline

REFRESH_S = 0.5
EVENTS = 5
WIDEST = 120
ROOMY = 34  # lines of a screen that has some to spare for empty ones
STATES = {"running": "green", "done": "green", "starting": "yellow", "stopped": "red", "died": "red"}
SOURCES = {"off": "bright_black", "suffix": "cyan", "eagle": "magenta", "sparse": "yellow"}
LEVELS = {"warn": "yellow", "alarm": "bold red"}


def top(run: Path, console: Console) -> None:
    """Show the run until q or Ctrl-C; once where the output is no terminal. Raises PreflightError for no run."""
    reader = RunReader(run)
    reader.poll()
    if not console.is_terminal:
        console.print(view(reader, console.width))
        return
    with keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(view(reader, console.width, height=console.height), refresh=True)
                if pressed(REFRESH_S) == "q":
                    return
                reader.poll()
        except KeyboardInterrupt:
            return


def view(reader: RunReader, width: int, *, height: int = 0) -> RenderableType:
    """Everything there is to see, closer together on a low screen.

    height: of the screen, which "q" quits; 0 where there is none.
    """
    width = min(width, WIDEST)
    last = reader.steps[-1] if reader.steps else {}
    if last and reader.evals and (reward := reader.evals[-1].get("reward_mean")) is not None:
        last = last | {"eval_reward": reward}  # of the newest evaluation, as the run's own display has it
    step = reader.drawn_steps[-1] if reader.drawn_steps else 0
    points = reader.curve(step)
    gap: list[RenderableType] = [] if 0 < height < ROOMY else [Text()]
    parts: list[RenderableType] = [header(reader, width, hint="q quits" if height else ""), *gap]
    if points:
        parts += [curve(points, step, width), *gap, workers(points), *gap]
    if last:
        parts += [number_grid(last, width), *gap]
        if sources := accept_lengths(last):
            parts += [sources, *gap]
        parts += [history(reader, width), phase_bar(last, width), *gap]
    parts += [Text(text, style=LEVELS[level]) for level, text in alarms(reader)]
    parts += [events(reader.events[-EVENTS:])]
    return Group(*parts)


def header(reader: RunReader, width: int, *, hint: str = "") -> Table:
    """Which run, where it stands, and how much of it is left; a hint beside it."""
    done = reader.steps[-1]["step"] if reader.steps else 0
    total = (reader.config.get("train") or {}).get("steps") or 0
    now, left = state(reader), eta_s(reader)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8, style="bold")
    grid.add_column(width=max(10, width - 48), no_wrap=True)
    grid.add_column(width=11, justify="right")
    grid.add_column(no_wrap=True)
    grid.add_row("run", Text(str(reader.path)), Text(hint, style="dim"), Text(now, style=STATES.get(now, "")))
    eta = f"ETA {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02}" if left is not None else ""
    grid.add_row("step", bar(done, total), f"{done}/{total}", Text(eta, style="dim"))
    latest = reader.latest
    if latest and now == "running":
        doing = "evaluation" if latest.get("eval") else f"of step {latest['step']}"
        count = f"{latest['finished']}/{latest['total']}"
        grid.add_row("rollouts", bar(latest["finished"], latest["total"]), count, Text(doing, style="dim"))
    return grid


def curve(points: Sequence[Record], step: int, width: int) -> Table:
    """Running requests while a step was sampled, in the colour of what drafted; evenly over the time it took."""
    running = [sum(worker["running"] for worker in point["workers"]) for point in points]
    columns = spread([point["time"] for point in points], width - 34)
    heights = sparkline([0.0, *(float(running[place]) for place in columns)], len(columns) + 1)[1:]
    line = Text()
    for place, height in zip(columns, heights, strict=True):
        line.append(height, style=SOURCES.get(source(points[place]), ""))
    seconds = points[-1]["time"] - points[0]["time"]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8, style="bold")
    grid.add_column(no_wrap=True)
    grid.add_row("running", line.append(f"  0 to {max(running)} in {seconds:.0f} s, step {step}", style="dim"))
    legend = Text()
    for name, colour in SOURCES.items():
        legend.append("● ", style=colour).append(f"{name}  ")
    grid.add_row("", legend)
    return grid


def source(point: Record) -> str:
    """Who drafts on most of the workers that sample."""
    drafting = [worker["strategy"].partition(" ")[0] for worker in point["workers"] if worker["running"]]
    return max(drafting, key=drafting.count) if drafting else "off"


def spread(times: Sequence[float], columns: int) -> list[int]:
    """For each column of a line over all this time, the last point before it; fewer columns than points at most."""
    count = min(columns, len(times))
    length = max(times[-1] - times[0], 1e-9)
    places, place = [], 0
    for column in range(count):
        moment = times[0] + length * (column + 1) / count
        while place + 1 < len(times) and times[place + 1] <= moment:
            place += 1
        places.append(place)
    return places


def workers(points: Sequence[Record]) -> Table:
    """Who samples how many, with what, and how fast lately."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("worker", "running", "waiting", "tokens/s", "cycles drafted", "sent back", "strategy"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    now = points[-1]
    before = points[max(0, len(points) - 9)]  # two seconds, at four points a second
    seconds = now["time"] - before["time"]
    for place, worker in enumerate(now["workers"]):
        then = before["workers"][place] if place < len(before["workers"]) else worker
        grown = worker.get("tokens", 0) - then.get("tokens", 0)
        cycles = worker["cycles"]
        drafted = sum(count for name, count in cycles.items() if name != "off") / max(1, sum(cycles.values()))
        rate = f"{grown / seconds:,.0f}" if seconds > 0 and grown >= 0 else "–"
        using = Text(worker["strategy"], style=SOURCES.get(worker["strategy"].partition(" ")[0], ""))
        counts = (str(worker["running"]), str(worker["waiting"]), rate, f"{drafted:.0%}", str(worker["preempted"]))
        table.add_row(str(worker.get("worker", place)), *counts, using)
    return table


def accept_lengths(record: Record) -> Text | None:
    """Tokens a forward by who drafted them, and in how many forwards they did; None where nobody did."""
    names = [name.removeprefix("accept_length_") for name in record if name.startswith("accept_length_")]
    if not names:
        return None
    text = Text.assemble(("drafts   ", "bold"))
    for name in names:
        length, share = record[f"accept_length_{name}"], record.get(f"draft_share_{name}", 0.0)
        text.append("● ", style=SOURCES.get(name, "")).append(f"{name} {length:.2f} tokens a forward in {share:.0%}   ")
    return text


def history(reader: RunReader, width: int) -> Table:
    """The mean reward of every step so far."""
    rewards = [record["reward_mean"] for record in reader.steps]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8, style="bold")
    grid.add_column(no_wrap=True)
    line = (sparkline(rewards, width - 30), "green")
    grid.add_row("reward", Text.assemble(line, (f"  {min(rewards):.2f} to {max(rewards):.2f}", "dim")))
    return grid


def events(records: Sequence[Record]) -> Table:
    """What happened last."""
    grid = Table.grid(padding=(0, 2))
    for record in records:
        rest = {name: value for name, value in record.items() if name not in ("time", "attempt", "event")}
        about = Text("  ".join(f"{name} {value}" for name, value in rest.items()), style="dim", overflow="ellipsis")
        grid.add_row(Text(str(record.get("time", ""))[11:19], style="dim"), str(record.get("event", "")), about)
    return grid


@contextmanager
def keys() -> Iterator["Keys"]:
    """The next key pressed within so many seconds, "" where none was; the terminal is as it was afterwards."""
    if not sys.stdin.isatty():
        yield Keys(-1)
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield Keys(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Keys:
    """Waits for a key. fd: a terminal's, negative where there is none to read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, within_s: float) -> str:
        ready, _, _ = select.select([self._fd] if self._fd >= 0 else [], [], [], within_s)
        return os.read(self._fd, 1).decode(errors="replace") if ready else ""

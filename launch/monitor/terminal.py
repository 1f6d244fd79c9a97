"""The run in a terminal: a live display where there is one, a line a step where there is not."""

import sys
from collections import deque
from collections.abc import Mapping
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Record = Mapping[str, float | int]

# Every phase a step's record may hold as seconds_PHASE, with its colour; the rest of the step is "other".
PHASES = {
    "rollout": "cyan",
    "reward": "magenta",
    "drafter": "red",
    "train": "green",
    "sync": "blue",
    "checkpoint": "yellow",
    "eval": "bright_black",
}
BARS = "▁▂▃▄▅▆▇█"
RECENT = 10  # steps the time of arrival is judged by


def make_progress(total_steps: int) -> "LiveProgress | PlainProgress":
    """The live display when stdout is a terminal, else plain lines."""
    console = Console()
    redraws = console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(total_steps, console) if redraws else PlainProgress()


class PlainProgress:
    """One line a step, for log files and pipes."""

    def __init__(self) -> None:
        self._clock = Arrival()

    def phase(self, name: str) -> None:
        """Phases show in the step's line."""

    def rollouts(self, done: int, total: int) -> None:
        """Rollouts show in the step's line."""

    def step(self, record: Record) -> None:
        """Print the step."""
        self._clock.add(record)
        parts = [f"step {record['step']}/{record['total_steps']}"]
        parts += [f"{name} {value}" for name, value in facts(record) if value]
        parts += [f"{record['seconds']:.1f}s", " ".join(f"{name} {share:.0%}" for name, share in shares(record))]
        print("  ".join(part for part in (*parts, f"ETA {self._clock.remaining()}") if part), flush=True)

    def message(self, text: str) -> None:
        """Print the text."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to put back."""
        sys.stdout.flush()


class LiveProgress:
    """A display that redraws in place: bars, the last step's numbers, the reward so far, where the time goes."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self._console = console
        self._total_steps = total_steps
        self._record: Record = {}
        self._rewards: list[float] = []
        self._eval_reward: float | None = None
        self._phase = "starting"
        self._rollouts = (0, 0)
        self._clock = Arrival()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def phase(self, name: str) -> None:
        """Show the phase beside the bars."""
        self._phase = name
        if name == "rollout":
            self._rollouts = (0, 0)

    def rollouts(self, done: int, total: int) -> None:
        """Move the bar within the step."""
        self._rollouts = (done, total)

    def step(self, record: Record) -> None:
        """Show the step's numbers."""
        self._record = dict(record)
        self._total_steps = int(record["total_steps"])
        self._rewards.append(float(record["reward_mean"]))
        self._eval_reward = record.get("eval_reward", self._eval_reward)
        self._clock.add(record)

    def message(self, text: str) -> None:
        """Print the text above the display."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen; a second close does nothing."""
        self._phase = "done" if self._record.get("step") == self._total_steps else "stopped"
        self._live.stop()

    def _render(self) -> RenderableType:
        width = min(self._console.width, 120)
        if not self._record:
            return Group(self._bars(width))
        record = dict(self._record)
        if self._eval_reward is not None:
            record["eval_reward"] = self._eval_reward
        numbers, time = number_grid(record, width), phase_bar(record, width)
        return Group(self._bars(width), Text(), numbers, Text(), self._history(width), time)

    def _bars(self, width: int) -> Table:
        """Steps of the run, and rollouts of the step at hand."""
        done = int(self._record.get("step", 0))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=8, style="bold")
        grid.add_column(width=max(10, width - 48))
        grid.add_column(width=11, justify="right")
        grid.add_column(style="dim", no_wrap=True)
        grid.add_row("step", bar(done, self._total_steps), f"{done}/{self._total_steps}", self._time())
        finished, total = self._rollouts
        grid.add_row("rollouts", bar(finished, total), f"{finished}/{total}" if total else "", self._phase)
        return grid

    def _time(self) -> str:
        return f"{self._record['seconds']:.1f} s a step, ETA {self._clock.remaining()}" if self._record else ""

    def _history(self, width: int) -> Table:
        """The mean reward of every step so far."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=8, style="bold")
        grid.add_column(no_wrap=True)
        low, high = min(self._rewards), max(self._rewards)
        line = (sparkline(self._rewards, width - 30), "green")
        grid.add_row("reward", Text.assemble(line, (f"  {low:.2f} to {high:.2f}", "dim")))
        return grid


class Arrival:
    """When the run will end, by the median of its recent steps."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._steps_left = 0

    def add(self, record: Record) -> None:
        """Take a finished step into account."""
        self._seconds.append(float(record["seconds"]))
        self._steps_left = int(record["total_steps"] - record["step"])

    def remaining(self) -> str:
        """Time left, as M:SS or H:MM:SS."""
        minutes, seconds = divmod(round(self._steps_left * median(self._seconds)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def facts(record: Record) -> list[tuple[str, str]]:
    """What a step's record says, by name, in order of interest; "" where it says nothing."""

    def shown(key: str, form: str) -> str:
        return format(record[key], form) if record.get(key) is not None else ""

    spread = f" ± {shown('reward_std', '.2f')}" if "reward_std" in record else ""
    # lossy modes draft nothing; of samples that are the policy's own there is nothing to say
    is_lossy = record.get("lossy_share", 0) > 0
    return [
        ("reward", shown("reward_mean", ".3f") + spread),
        ("eval", shown("eval_reward", ".3f")),
        ("length", shown("response_len_mean", ".0f")),
        ("tokens/s", shown("tokens_per_s", ",.0f")),
        ("accept", shown("accept_length", ".2f")),
        ("lossy", shown("lossy_share", ".0%")) if is_lossy else ("drafter", drafter_fact(record)),
        ("loss", shown("loss", ".4f")),
        ("grad", shown("grad_norm", ".3g")),
    ]


def drafter_fact(record: Record) -> str:
    """Which version of the learned drafter is served, and how well it did on held-out features; "" without one."""
    if "drafter_version" not in record:
        return ""
    length = record.get("drafter_served_accept_length")
    return f"v{record['drafter_version']}" + (f" {length:.2f}" if length is not None else "")


def shares(record: Record) -> list[tuple[str, float]]:
    """Each phase's share of the step's seconds, phases below half a percent left out."""
    total = max(float(record["seconds"]), 1e-9)
    spent = {name: float(record.get(f"seconds_{name}", 0)) / total for name in PHASES}
    spent["other"] = max(0.0, 1.0 - sum(spent.values()))
    return [(name, share) for name, share in spent.items() if share >= 0.005]


def number_grid(record: Record, width: int) -> Table:
    """The step's numbers under their names, in columns of equal width."""
    shown = [(name, value or "–") for name, value in facts(record)]
    grid = Table.grid(padding=(0, 0))
    for index in range(len(shown)):
        grid.add_column(width=width // len(shown) + (3 if index == 0 else -1), no_wrap=True)
    grid.add_row(*(Text(name, style="dim") for name, _ in shown))
    grid.add_row(*(Text(value, style="bold") for _, value in shown))
    return grid


def phase_bar(record: Record, width: int) -> Table:
    """One bar split among the step's phases, and a legend with their shares."""
    parts = shares(record)
    cells = allot([share for _, share in parts], width - 10)
    bar_line, legend = Text(), Text()
    for (name, share), count in zip(parts, cells, strict=True):
        colour = PHASES.get(name, "white")
        bar_line.append("━" * count, style=colour)
        legend.append("● ", style=colour).append(f"{name} ").append(f"{share:.0%}  ", style="bold")
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8, style="bold")
    grid.add_column()
    grid.add_row("time", bar_line)
    grid.add_row("", legend)
    return grid


def bar(done: int, total: int) -> ProgressBar:
    """A bar of what is done."""
    return ProgressBar(total=max(total, 1), completed=done, complete_style="cyan", finished_style="cyan")


def sparkline(values: list[float], width: int) -> str:
    """Values as bars of eight heights, neighbours averaged where there are more than width."""
    if len(values) > width:
        edges = [round(index * len(values) / width) for index in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def allot(parts: list[float], cells: int) -> list[int]:
    """Whole cells in proportion to parts that sum to 1 (largest remainders get the cells that rounding leaves)."""
    exact = [part * cells for part in parts]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: max(0, round(sum(exact)) - sum(counts))]:
        counts[index] += 1
    return counts

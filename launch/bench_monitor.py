"""What watching a run costs it: steps that are recorded and watched, in turns with steps that are not, in one run.

Watched: the curve, lanes and traces are written, and beside the run its page is served to a browser that draws what
comes, its metrics are scraped and its steps go to TensorBoard. Not: nothing of that is written, and all of those
processes are stopped. What cannot be left out is timed by itself: the engine's counts, and what a record and the
samples hold for whoever looks (distributions, tokens).
"""

import asyncio
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from configs.load import dump, load
from configs.schema import Config
from drafter.types import OFF
from launch.arms import make_loop, standing
from launch.bench_report import plain_table, provenance, say, spread
from launch.bench_watch import TimedRecorder, Unrecorded, cpu_seconds, watchers
from rl.loop import Loop
from rl.metrics import histogram
from rollout.activity import Tally

LIMIT = 0.01  # of a step's time
FIXED = ("compute.backend=inline", "eval.every=0", "warmstart.steps=0", "checkpoint.every=1000000")
WARMUP = 1  # steps that are not counted
WATCHED, UNWATCHED = "watched", "unwatched"
CYCLES = 200_000  # timed of the engine's counts
REPEATS = 20  # of what is timed by itself


@dataclass(frozen=True, slots=True)
class Turn:
    """One step. cpu_s: of this process, all threads; recorder_s: of that in the recorder; hub_cpu_s: beside it."""

    arm: str
    seconds: float
    cpu_s: float
    recorder_s: float
    hub_cpu_s: float
    tokens: int
    cycles: int
    num_bytes: dict[str, int]


def run(recipe: Path, overrides: Sequence[str], *, pairs: int, folder: Path) -> dict[str, Any]:
    """Take so many steps of each kind in a run of a recipe; JSON-able. Raises ConfigError and PreflightError."""
    steps = WARMUP + 2 * pairs
    config = load(recipe, [*overrides, *FIXED, f"train.steps={steps}"])
    return asyncio.run(_run(config, pairs=pairs, folder=folder))


async def _run(config: Config, *, pairs: int, folder: Path) -> dict[str, Any]:
    load_before = os.getloadavg()  # before we add to it
    async with standing(config, folder, num_heldout=0) as ground:
        loop = make_loop("monitor", config, ground)
        recorders: dict[str, Any] = {
            WATCHED: TimedRecorder(loop.run, loop.engine, config),
            UNWATCHED: Unrecorded(),
        }
        turns = []
        with watchers(loop.run.path, loop.run.logs) as processes:
            for number in range(-WARMUP, pairs):
                # watched first, then second: whatever drifts favours neither
                for arm in (WATCHED, UNWATCHED) if number % 2 == 0 else (UNWATCHED, WATCHED):
                    if number >= 0 or arm == WATCHED:
                        turn = await take(loop, arm, recorders[arm], processes)
                        turns += [turn] if number >= 0 else []
        aside = by_itself(loop)
    return report(config, turns, aside, device=ground.device, load_before=load_before)


async def take(loop: Loop, arm: str, recorder: Any, processes: Sequence[subprocess.Popen[bytes]]) -> Turn:
    """One step, watched or not."""
    for process in processes:
        process.send_signal(signal.SIGCONT if arm == WATCHED else signal.SIGSTOP)
    loop.recorder = recorder
    before, recorded, beside = sizes(loop.run.path), recorder.seconds, cpu_seconds(processes[0].pid)
    begun, cpu = time.perf_counter(), time.process_time()
    await loop.train_step()
    recorder.end()
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    after = sizes(loop.run.path)
    (activity,) = loop.engine.activity()
    turn = Turn(
        arm=arm,
        seconds=seconds,
        cpu_s=cpu_s,
        recorder_s=recorder.seconds - recorded,
        hub_cpu_s=cpu_seconds(processes[0].pid) - beside,
        tokens=activity.tokens,
        cycles=sum(activity.cycles.values()),
        num_bytes={kind: after[kind] - before.get(kind, 0) for kind in after},
    )
    say(f"{arm:>9}: {seconds:.2f} s, {cpu_s:.2f} s of processor, {1e3 * turn.recorder_s:.1f} ms recording")
    return turn


def sizes(run: Path) -> dict[str, int]:
    """Bytes in the run directory by kind of file."""
    kinds = {
        "curve": "metrics/curve.jsonl",
        "lanes": "metrics/lanes.jsonl",
        "trace": "trace/*",
        "steps": "metrics/steps.jsonl",
        "samples": "samples/*",
    }
    return {kind: sum(file.stat().st_size for file in run.glob(pattern)) for kind, pattern in kinds.items()}


def by_itself(loop: Loop) -> dict[str, Any]:
    """What no arm is without: the engine's counts a cycle, and what records and samples hold besides, each a step."""
    tally = Tally(0)
    begun = time.perf_counter()
    for number in range(CYCLES):
        since = time.time()
        tally.cycle(OFF, prefills=number % 1000 == 0)
        tally.tokens += 1
        tally.spent(since, time.time())
    cycle_s = (time.perf_counter() - begun) / CYCLES
    rows = pq.read_table(loop.run.path / "samples" / f"step_{loop.step}.parquet").to_pylist()
    plain = [{name: value for name, value in row.items() if name not in ("token_ids", "drafted")} for row in rows]
    rewards, edges = [row["reward"] for row in rows], [place / 32 for place in range(33)]
    return {
        "cycle_s": cycle_s,
        "histograms_s": timed(lambda: [histogram(rewards, edges) for _ in range(2)]),
        "samples_s": timed(lambda: loop.run.write_samples(0, rows)) - timed(lambda: loop.run.write_samples(0, plain)),
    }


def timed(call: Callable[[], Any]) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def report(
    config: Config, turns: Sequence[Turn], aside: dict[str, Any], *, device: str, load_before: Sequence[float]
) -> dict[str, Any]:
    """Everything measured: JSON-able."""
    arms = {arm: [turn for turn in turns if turn.arm == arm] for arm in (WATCHED, UNWATCHED)}
    pairs = list(zip(arms[WATCHED], arms[UNWATCHED], strict=True))
    seconds = statistics.median(turn.seconds for turn in arms[UNWATCHED])
    own_s = [turn.recorder_s + aside["cycle_s"] * turn.cycles for turn in arms[WATCHED]]
    own_s = [each + aside["histograms_s"] + max(0.0, aside["samples_s"]) for each in own_s]
    return {
        "what": "what watching a run costs it",
        "model": config.model,
        **provenance(device=device, seed=config.run.seed),
        "load_average": load_before,
        "config": dump(config),
        "limit": LIMIT,
        # what the run's own process does for whoever watches, on its clock, against the time of a step
        "own_share": spread([each / turn.seconds for each, turn in zip(own_s, arms[WATCHED], strict=True)]),
        "own_seconds": spread(own_s),
        "aside": aside,
        # the processes beside it, which have a lower priority
        "hub_cpu_share": spread([turn.hub_cpu_s / turn.seconds for turn in arms[WATCHED]]),
        # of each pair of neighbouring steps, whatever else the machine did then
        "wall_ratio": spread([on.seconds / off.seconds for on, off in pairs]),
        "cpu_ratio": spread([on.cpu_s / off.cpu_s for on, off in pairs]),
        "cpu_ratio_a_token": spread([on.cpu_s / on.tokens * off.tokens / off.cpu_s for on, off in pairs]),
        "step_seconds": seconds,
        "bytes_a_step": {
            kind: statistics.median(turn.num_bytes[kind] for turn in arms[WATCHED])
            for kind in arms[WATCHED][0].num_bytes
        },
        "turns": [asdict(turn) for turn in turns],
    }


def table(result: dict[str, Any]) -> Table:
    """The shares and ratios, with their spread."""
    title = f"{result['what']}: steps of {result['step_seconds']:.2f} s of {result['model']}"
    shown = plain_table(title, ("", "median", "least", "most"))
    for name, text in (
        ("own_share", "recording, of the step's time"),
        ("hub_cpu_share", "hub and sink, processor time of it"),
        ("wall_ratio", "watched / not, wall time"),
        ("cpu_ratio", "watched / not, processor time"),
        ("cpu_ratio_a_token", "the same a token"),
    ):
        figures = result[name]
        form = "{:.4f}" if "ratio" in name else "{:.3%}"
        shown.add_row(text, *(form.format(figures[which]) for which in ("median", "min", "max")))
    written = sum(result["bytes_a_step"].values())
    shown.add_row("bytes written a step", f"{written:,.0f}", "", "")
    return shown

"""What `paceline plan` says of a GPU's memory, beside what a few steps of the recipe then take.

Each recipe runs in a process of its own, which takes a few supervised steps, if the recipe has any, and a few of GRPO.
It writes no checkpoint: that of a large policy takes longer than all of its steps.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from rich.console import Group

from configs.errors import ConfigError, PreflightError
from configs.load import dump
from configs.schema import Config
from launch.arms import make_loop, standing
from launch.bench_peer import last_line
from launch.bench_recipe import Asked, random_folder
from launch.bench_report import plain_table, provenance, say
from launch.exits import run_command
from launch.plan import derive
from rl.metrics import Progress
from rl.warmstart import warm_start
from rollout.engine import NativeEngine
from rollout.model import load_config, resolve_compute

LIMIT = 0.10  # by which a plan may differ from what was taken (issue 5)
FIXED = ("compute.backend=inline", "eval.every=0", "checkpoint.every=1000000")
START = "start"  # the phase before any step: weights, optimiser, what a first forward needs
GIGA = 1e9
WHAT = "a GPU's memory as planned and as taken"

Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes: what torch had allocated and reserved at most since the last reading, what the device lacks now."""

    allocated: int
    reserved: int
    device: int


class Meter(Protocol):
    """What tells how much memory this process takes."""

    def read(self) -> Reading:
        """The most since the last reading."""


class GpuMeter:
    """Of the current GPU. What the driver had taken when this was made is not counted, what other processes take is."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self._before = 0
        self._before = self.read().device

    def read(self) -> Reading:
        """As Meter says."""
        free, total = torch.cuda.mem_get_info()
        reading = Reading(
            torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free - self._before
        )
        torch.cuda.reset_peak_memory_stats()
        return reading


class Peaks:
    """A Progress that reads the meter where a phase ends, and tells another one everything.

    phases: by name, the most bytes of each kind. Graphs are those held when the phase ended: of their pool, what is
    free between two replays is not "allocated", and nobody else can have it.
    """

    def __init__(self, meter: Meter, shown: Progress) -> None:
        self.meter = meter
        self.shown = shown
        self.engine: NativeEngine | None = None
        self.phases: dict[str, dict[str, int]] = {}
        self.now = START

    def note(self, allocated: int = 0) -> None:
        """The phase so far. allocated: what whoever reset torch's own peak found there."""
        reading = self.meter.read()
        found = asdict(reading) | {"allocated": max(allocated, reading.allocated)}
        found["graphs"] = 0 if self.engine is None else self.engine.graph_bytes
        found["used"] = found["allocated"] + found["graphs"]
        seen = self.phases.setdefault(self.now, dict.fromkeys(found, 0))
        self.phases[self.now] = {kind: max(size, seen[kind]) for kind, size in found.items()}

    def phase(self, name: str) -> None:
        """As Progress says."""
        self.note()
        self.now = name
        self.shown.phase(name)

    def rollouts(self, done: int, total: int) -> None:
        """As Progress says."""
        self.shown.rollouts(done, total)

    def step(self, record: dict[str, Any]) -> None:
        """As Progress says; the trainer has read and reset the peak of its step."""
        self.note(allocated=int(record["memory_bytes"]))
        self.shown.step(record)

    def message(self, text: str) -> None:
        """As Progress says."""
        self.shown.message(text)

    def close(self) -> None:
        """As Progress says."""
        self.shown.close()


def run(recipes: Sequence[Asked], *, steps: int, keep: Keep) -> dict[str, Any]:
    """Every recipe in a process of its own, in turn; JSON-able. keep is given the result so far after each.

    Raises ConfigError before the first begins, PreflightError without a GPU; a recipe that fails is named in "failed".
    """
    names = [each.name for each in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"{', '.join(names)}: two recipes of one name; give one a copy under another")
    configs = [each.config(FIXED) for each in recipes]
    for each, config in zip(recipes, configs, strict=True):
        if config.rollout.backend != "native":
            raise ConfigError(f"{each.name}: rollout.backend={config.rollout.backend} is not measured; leave it out")
    if not torch.cuda.is_available() or any(config.compute.device == "cpu" for config in configs):
        raise PreflightError("bench memory measures a GPU, and there is none to use; `paceline plan` needs none")
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    told = {"what": WHAT, "limit": LIMIT, "steps": steps, "recipes": found, "failed": failed}
    for each, config in zip(recipes, configs, strict=True):
        begun = perf_counter()
        result, said = in_child(each, steps=steps)
        if result is None:
            failed[each.name] = said
            say(f"{each.name}: {said}")
        else:
            found[each.name] = result | {"config": dump(config), "seconds_in_all": perf_counter() - begun}
        keep(told)
    # last: it measures the copy bandwidth, with memory of its own
    return told | provenance(device="cuda", seed=configs[0].run.seed)


def in_child(each: Asked, *, steps: int) -> tuple[dict[str, Any] | None, str]:
    """One recipe's result from a fresh process; None, and its last words, where it failed."""
    with tempfile.TemporaryDirectory(prefix="paceline-memory-") as folder:
        order = asdict(each) | {"steps": steps, "folder": folder}
        root = Path(__file__).resolve().parents[1]
        paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-m", "launch.bench_memory", json.dumps(order)],
            env=os.environ | {"PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        sys.stderr.write(done.stderr)
        result = Path(folder) / "result.json"
        if done.returncode:
            return None, f"ended with {done.returncode}: {last_line(done.stderr)}"
        return json.loads(result.read_text()), ""


def child(order: dict[str, Any]) -> None:
    """In the fresh process: measure, and leave the result in the folder."""
    begun = perf_counter()
    each = Asked(order["recipe"], order["shape"], tuple(order["overrides"]))
    folder = Path(order["folder"])
    config = each.config(FIXED)
    device, dtype = resolve_compute(config.compute)
    if each.shape:
        made = random_folder(
            config.model, each.shape, folder / "model", device=device, dtype=dtype, seed=config.run.seed
        )
        config = replace(config, model=str(made))
        gc.collect()
        torch.cuda.empty_cache()
    meter = GpuMeter()
    result = asyncio.run(take(config, meter, folder=folder, steps=order["steps"]))
    (folder / "result.json").write_text(json.dumps(result | {"seconds_child": perf_counter() - begun}))


async def take(config: Config, meter: Meter, *, folder: Path, steps: int) -> dict[str, Any]:
    """The plan of a configuration, and the memory by phase of so many supervised steps, if it has any, and of GRPO."""
    begun = perf_counter()
    async with standing(config, folder, num_heldout=0) as ground:
        plan = derive(config, load_config(ground.path))
        (planned,) = plan.memory.values()
        loop = make_loop("memory", config, ground)
        assert isinstance(loop.engine, NativeEngine)
        peaks = Peaks(meter, loop.progress)
        peaks.engine, loop.progress = loop.engine, peaks
        built = perf_counter()
        if config.warmstart.steps:
            few = replace(config.warmstart, steps=min(steps, config.warmstart.steps), warmup_steps=0)
            peaks.phase("warmstart")
            warm_start(loop.trainer, ground.data, ground.tokenizer, few, report=loop.report_warmstart)
            loop.engine.update(0)
        records = []
        for _ in range(steps):
            await loop.train_step()
            loop.recorder.end()
            records.append(json.loads((loop.run.path / "metrics/steps.jsonl").read_text().splitlines()[-1]))
    used = max(phase["used"] for phase in peaks.phases.values())
    return {
        "planned_bytes": planned.total,
        "planned": asdict(planned),
        "used_bytes": used,
        "off": planned.total / used - 1,
        "phases": peaks.phases,
        "kv_tokens": plan.kv_tokens,
        "num_tokens": [record["num_tokens"] for record in records],
        "longest": [record["response_len_max"] for record in records],
        "seconds_before": built - begun,
        "seconds_steps": [record["seconds"] for record in records],
    }


def table(result: dict[str, Any]) -> Group:
    """Planned beside taken, and what was taken in each phase."""
    title = f"{result['what']}, GB, {result['steps']} steps; asked: within {result['limit']:.0%}"
    headings = ["recipe", "planned", "used", "off", "", "graphs", "reserved", "device", "seconds"]
    shown = plain_table(title, headings)
    phases = plain_table("", ["used by phase", *(names := phase_names(result))])
    for name, found in result["recipes"].items():
        each = found["phases"]
        most = [max(phase[kind] for phase in each.values()) for kind in ("graphs", "reserved", "device")]
        shown.add_row(
            name,
            giga(found["planned_bytes"]),
            giga(found["used_bytes"]),
            f"{found['off']:+.1%}",
            "within" if abs(found["off"]) <= result["limit"] else "outside",
            *map(giga, most),
            f"{found['seconds_in_all']:.0f}",
        )
        phases.add_row(name, *(giga(each[phase]["used"]) if phase in each else "" for phase in names))
    for name, said in result["failed"].items():
        shown.add_row(name, f"failed: {said}", *[""] * (len(headings) - 2))
    return Group(shown, phases)


def phase_names(result: dict[str, Any]) -> list[str]:
    """Those of all recipes, in the order in which they came."""
    return list(dict.fromkeys(phase for found in result["recipes"].values() for phase in found["phases"]))


def giga(num_bytes: int) -> str:
    """In GB."""
    return f"{num_bytes / GIGA:.2f}"


if __name__ == "__main__":
    sys.exit(run_command(lambda: child(json.loads(sys.argv[1]))))

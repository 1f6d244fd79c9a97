"""What runs of one recipe in several sizes say beside one another: rollouts and losses by step, times, transfers."""

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group

from launch.bench_report import plain_table, spread
from launch.longtail_report import steps_of

WHAT = "one recipe in several sizes"
PHASES = ("rollout", "reward", "drafter", "train", "sync")
# Of the first step's rollouts, so many are the same in every arm. Rounding decides where two tokens all but tie, and
# in bfloat16 they often do: there nothing is asked.
LIMITS = {"float32": 0.99}

Record = Mapping[str, Any]
Said = Mapping[tuple[str, int], tuple[Sequence[int], float]]  # by prompt and sample: tokens and reward


def report(folder: Path, clocks: Mapping[str, Mapping[str, Any]], *, skip: int) -> dict[str, Any]:
    """Every arm's figures by name, from its run directory. The first is what the others are compared with.

    clocks: by arm, when its process began and ended, and its error. The first `skip` steps enter no time.
    """
    first = next(iter(clocks))
    arms: dict[str, Any] = {}
    for name, clock in clocks.items():
        run = folder / name
        steps = steps_of(run)
        arms[name] = times(steps[skip:]) | {
            "outside": outside(run, steps, clock),
            "by_step": [{key: step[key] for key in ("step", "loss", "grad_norm", "reward_mean")} for step in steps],
            "memory": planned(run) | {"trained_bytes": max((step.get("memory_bytes", 0) for step in steps), default=0)},
            "steps": steps,
        }
        if name != first:
            both = min(len(steps), len(arms[first]["steps"]))
            arms[name]["agreement"] = [
                agreement(rollouts(run, step), rollouts(folder / first, step)) for step in range(1, both + 1)
            ]
    failed = {name: clock["error"] for name, clock in clocks.items() if clock["error"]}
    return {"arms": arms, "failed": failed, "limits": {"rollouts": LIMITS}}


def times(steps: Sequence[Record]) -> dict[str, Any]:
    """Seconds of a step and its phases, tokens a second, what a transfer of weights moved; {} without steps."""
    if not steps:
        return {}
    keys = {"step": "seconds", **{phase: f"seconds_{phase}" for phase in PHASES}}
    found: dict[str, Any] = {name: spread([step.get(key, 0.0) for step in steps]) for name, key in keys.items()}
    found["tokens_per_s"] = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    moved = [step for step in steps if step.get("weight_sync_bytes")]
    if moved:
        found["sync_bytes"] = statistics.median(step["weight_sync_bytes"] for step in moved)
        found["sync_gb_per_s"] = spread([step["weight_sync_bytes"] / step["seconds_sync"] / 1e9 for step in moved])
    return found


def outside(run: Path, steps: Sequence[Record], clock: Mapping[str, Any]) -> dict[str, float]:
    """Seconds from the process's start to its run directory, on to the first step, and from the last step to its end.

    Between the first and the last, evaluations, checkpoints: none here.
    """
    found = {"in_all": clock["end"] - clock["begin"]}
    if not steps:
        return found
    started = datetime.fromisoformat(json.loads((run / "env.json").read_text())["time"]).timestamp()
    return found | {
        "to_directory": started - clock["begin"],
        "to_first_step": steps[0]["time"] - steps[0]["seconds"] - started,
        "after_last_step": clock["end"] - steps[-1]["time"],
    }


def planned(run: Path) -> dict[str, int]:
    """Planned bytes of each kind of process; {} before there is a plan."""
    path = run / "plan.json"
    if not path.exists():
        return {}
    kinds = json.loads(path.read_text())["memory"]
    return {
        f"planned_{kind}_bytes": sum(memory["always"].values())
        + max(sum(memory["rollout"].values()), sum(memory["training"].values()))
        for kind, memory in kinds.items()
    }


def rollouts(run: Path, step: int) -> Said:
    """A step's rollouts."""
    columns = ["prompt_id", "sample", "token_ids", "reward"]
    rows = pq.read_table(run / "samples" / f"step_{step}.parquet", columns=columns).to_pylist()
    return {(row["prompt_id"], row["sample"]): (row["token_ids"], row["reward"]) for row in rows}


def agreement(mine: Said, theirs: Said) -> dict[str, float]:
    """Share of rollouts whose tokens are all the same, of tokens before the first that is not, and of equal rewards."""
    assert mine.keys() == theirs.keys(), "runs of one seed draw the same prompts"
    pairs = [(mine[key], theirs[key]) for key in mine]
    alike = sum(common(a, b) for (a, _), (b, _) in pairs)
    return {
        "rollouts": statistics.fmean(a == b for (a, _), (b, _) in pairs),
        "prefix": alike / max(1, sum(max(len(a), len(b)) for (a, _), (b, _) in pairs)),
        "rewards": statistics.fmean(a == b for (_, a), (_, b) in pairs),
    }


def common(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens come before the first that differs."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def table(result: dict[str, Any]) -> Group:
    """Agreement, reward and loss by step; times by phase; what a run takes outside its steps."""
    limit = result["limits"]["rollouts"].get(result["dtype"])
    wanted = f"asked: in step 1 {limit:.0%} of the rollouts" if limit else "which bfloat16's rounding parts"
    title = f"{WHAT}, {result['recipe']}, {result['dtype']} on {result['device']}; equal rollouts: {wanted}"
    alike = plain_table(title, ["", "step", "equal rollouts", "prefix", "equal rewards", "reward", "loss", "grad norm"])
    seconds = plain_table(
        f"seconds a step, medians of {result['steps'] - result['skip']}",
        ["", "step", *PHASES, "tokens/s", "sync MB", "GB/s", "trained GB", "planned GB"],
    )
    whole = plain_table("seconds of a run", ["", "to its directory", "to step 1", "after the last", "in all"])
    for name, arm in result["arms"].items():
        same = arm.get("agreement", [])
        for number, step in enumerate(arm["by_step"]):
            shares = [f"{same[number][key]:.4f}" for key in ("rollouts", "prefix", "rewards")] if same[number:] else []
            figures = [f"{step['reward_mean']:.4f}", f"{step['loss']:.5f}", f"{step['grad_norm']:.4f}"]
            alike.add_row(name if number == 0 else "", str(step["step"]), *(shares or [""] * 3), *figures)
        if "step" in arm:
            moved = ["", ""]
            if "sync_bytes" in arm:
                moved = [f"{arm['sync_bytes'] / 1e6:.0f}", f"{arm['sync_gb_per_s']['median']:.2f}"]
            memory = dict(arm["memory"])
            held = memory.pop("trained_bytes")
            seconds.add_row(
                name,
                *(f"{arm[phase]['median']:.3f}" for phase in ("step", *PHASES)),
                f"{arm['tokens_per_s']:.0f}",
                *moved,
                f"{held / 1e9:.2f}" if held else "",
                " + ".join(f"{size / 1e9:.2f}" for size in memory.values()),
            )
        parts = [arm["outside"].get(part) for part in ("to_directory", "to_first_step", "after_last_step", "in_all")]
        whole.add_row(name, *("" if part is None else f"{part:.1f}" for part in parts))
    for name, said in result["failed"].items():
        whole.add_row(f"{name} {said}", *[""] * 4)
    return Group(alike, seconds, whole)

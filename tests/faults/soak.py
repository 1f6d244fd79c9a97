"""Random faults until the time is over, every invariant checked after each run.

    python tests/faults/soak.py --minutes 30 --seed 1 --json docs/results/soak_cpu.json

Each round is a run of four quick steps, in one process or with two Ray workers, with a random fault at a random hit of
a random point. Where it ends early it is resumed, perhaps with another fault, perhaps after a byte of its newest
checkpoint was changed, until it is complete. A round of one process must end in the state of an undisturbed run, bit
for bit, one of workers in its tokens. The first round that does not ends the soak with exit code 1.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[2]))

from fault_runs import ROOT, Commands, check_complete, check_end, corrupt, kill, staged, state, texts, write_recipe  # noqa: E402
from fault_table import RAY  # noqa: E402

RAY_SHARE = 0.25  # of the rounds: they take ten times as long
AGAIN_SHARE = 0.4  # of the resumed commands that meet another fault
CORRUPT_SHARE = 0.2  # of the commands that ended early, after which a byte of the newest checkpoint is changed
MOST_FAULTS = 4  # of a round; the last resumption has none
ENDS = ("kill", "exit", "raise", "oom", "term")
DISK = ("kill", "exit", "enospc", "term")

# Actions by point, and how often a run hits it.
INLINE: dict[str, tuple[tuple[str, ...], int]] = {
    "data.load": (("kill", "raise", "enospc"), 1),
    "rollout.cycle": (ENDS, 90),
    "train.backward": ((*ENDS, "nan"), 12),
    "reward.call": (("kill", "exit", "raise", "oom", "hang"), 64),
    "metrics.append": (DISK, 4),
    "samples.write": (DISK, 4),
    "checkpoint.stage": (DISK, 4),
    "checkpoint.file": (DISK, 16),
    "checkpoint.manifest": (DISK, 4),
    "checkpoint.fsync": (DISK, 32),
    "checkpoint.rename": (DISK, 4),
    "checkpoint.clean": (DISK, 4),
}
WORKERS: dict[str, tuple[tuple[str, ...], int]] = {
    "worker.build": (("kill", "exit"), 1),
    "rollout.cycle": (("kill", "exit", "stop", "raise", "oom"), 60),
    "train.backward": (("kill", "exit", "stop", "raise", "oom", "nan"), 6),
}


def fault(chance: random.Random, points: dict[str, tuple[tuple[str, ...], int]], at: str = "") -> str:
    """A fault that may happen."""
    point = chance.choice(list(points))
    actions, hits = points[point]
    return f"{point}{at}:{chance.randint(1, hits)}:{chance.choice(actions)}"


def one_round(commands: Commands, recipe: Path, run: Path, whole: Path, chance: random.Random, *, ray: bool) -> Any:
    """A run from its start to its end; what befell it. Raises AssertionError."""
    options = (*RAY, "run.silence_s=3") if ray else ("reward.timeout_s=1",)
    steps = 3 if ray else 4
    story: list[dict[str, Any]] = []
    damaged: Path | None = None
    arguments: tuple[str | Path, ...] = ("train", recipe, f"run.dir={run}", *options)
    while True:
        planned = ""
        if not story or (len(story) < MOST_FAULTS and chance.random() < AGAIN_SHARE):
            planned = fault(chance, WORKERS, f"@{chance.randint(0, 1)}") if ray else fault(chance, INLINE)
        story.append({"command": arguments[0], "fault": planned})
        leftover = staged(run)
        ended = commands.run(*arguments, fault=planned)
        try:
            story[-1]["code"] = ended.code
            assert ended.code is not None, f"it did not end:\n{ended.said}"
            assert planned or ended.code == 0, ended.said
            check_end(run, ended, damaged=damaged, leftover=leftover)
        finally:
            kill(ended.mark)
        if ended.code == 0:
            break
        if chance.random() < CORRUPT_SHARE:
            damaged = corrupt(run)
            story[-1]["corrupted"] = damaged is not None
        arguments = ("resume", run)
    check_complete(run, steps=steps)
    assert texts(run, steps) == texts(whole, steps), "other tokens than undisturbed"
    if not ray:
        assert state(run) == state(whole), "another state than undisturbed"
    return story


def tiny_model(folder: Path) -> Path:
    """The model of the tests."""
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_tiny_model(folder)


def main() -> int:
    """Exit code 0 where every invariant held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    rounds: list[dict[str, Any]] = []
    violation = ""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-soak-") as name:
        folder = Path(name)
        recipe = write_recipe(folder, tiny_model(folder / "model"))
        with Commands(folder) as commands:
            wholes = {}
            for ray, options in {False: (), True: RAY}.items():
                wholes[ray] = folder / f"undisturbed-{ray}"
                ended = commands.run("train", recipe, f"run.dir={wholes[ray]}", *options)
                assert ended.code == 0, ended.said
            while time.monotonic() - begun < 60 * given.minutes and not violation:
                ray = chance.random() < RAY_SHARE
                run = folder / f"round-{len(rounds)}"
                since = time.monotonic()
                entry: dict[str, Any] = {"workers": 2 if ray else 0}
                try:
                    entry["story"] = one_round(commands, recipe, run, wholes[ray], chance, ray=ray)
                    subprocess.run(["rm", "-r", str(run)], check=True)
                except Exception:  # an invariant that cannot even be looked at does not hold
                    violation = traceback.format_exc()
                    print(violation, file=sys.stderr)
                    kept = Path(tempfile.gettempdir()) / f"paceline-violation-{os.getpid()}"
                    subprocess.run(["cp", "-r", str(run), str(kept)], check=True)
                    print(f"the run is kept in {kept}", file=sys.stderr)
                entry["seconds"] = round(time.monotonic() - since, 1)
                rounds.append(entry)
                print(json.dumps(entry), flush=True)
                write(given.json, given, rounds, violation, time.monotonic() - begun)
    return 1 if violation else 0


def write(path: Path, given: argparse.Namespace, rounds: list[dict[str, Any]], violation: str, seconds: float) -> None:
    """The result so far."""
    stories = [each for entry in rounds for each in entry.get("story", [])]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    faults = [each["fault"] for each in stories if each["fault"]]
    result = {
        "commit": commit,
        "cores": os.cpu_count(),
        "seed": given.seed,
        "minutes_asked": given.minutes,
        "minutes": round(seconds / 60, 1),
        "rounds": len(rounds),
        "rounds_with_workers": sum(entry["workers"] > 0 for entry in rounds),
        "commands": len(stories),
        "faults_planned": len(faults),
        "corrupted": sum(bool(each.get("corrupted")) for each in stories),
        "by_point": dict(Counter(text.partition(":")[0].partition("@")[0] for text in faults).most_common()),
        "by_action": dict(Counter(text.rpartition(":")[2] for text in faults).most_common()),
        "by_exit_code": {str(code): number for code, number in Counter(each["code"] for each in stories).most_common()},
        "violation": violation,
        "stories": rounds,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

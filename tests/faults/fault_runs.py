"""Runs that are disturbed, and what must hold of them afterwards."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq
import yaml

from configs.faults import EXIT
from drafter.sealed import is_sound, step_folders

ROOT = Path(__file__).parents[2]
PROMPTS, GROUP = 4, 4
MARK = "PACELINE_TEST_RUN"  # in the environment of every process that a run starts
LEAVE_S = 300.0  # for a run's processes to go after it: a raylet follows a killed driver on its own
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's, which leave up to a minute after a killed driver
NO_REPORT = (0, 75, 130)  # exit codes of runs that were not meant to be told about

REWARD = '''
import os, subprocess, sys, time

def vowels(prompt, rollout):
    """Share of lower-case vowels: a reward that any model can move."""
    return sum(character in "aeiou" for character in rollout.text) / max(len(rollout.text), 1)

def _fails_once(prompt, rollout):
    return prompt.id.endswith("7") and rollout.sample == 1

def hog(prompt, rollout):
    """Wants 10 GB for one rollout."""
    return float(len(bytearray(10 << 30)) > 0) if _fails_once(prompt, rollout) else vowels(prompt, rollout)

def forks(prompt, rollout):
    """Starts processes that start processes, and waits for all of them."""
    if not _fails_once(prompt, rollout):
        return vowels(prompt, rollout)
    code = "import os, time; [os.fork() for _ in range(6)]; time.sleep(600)"
    return float(subprocess.run([sys.executable, "-c", code]).returncode)
'''


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe of four quick steps on the tiny model, with what it needs beside it."""
    rows = [{"prompt": f"say {index}", "answer": "a"} for index in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny_reward.py").write_text(REWARD)
    config = {
        "model": str(model),
        "run": {"name": "tiny", "seed": 3},
        "compute": {"dtype": "float32", "device": "cpu"},
        "data": {"source": "file", "name": str(folder / "rows.jsonl"), "max_prompt_tokens": 256},
        "reward": {"functions": {"tiny_reward:vowels": 1.0}, "workers": 1},
        "rollout": {"prompts_per_step": PROMPTS, "group_size": GROUP, "max_new_tokens": 24},
        "spec": {"source": "suffix", "depth": 4, "top_k": 1, "num_verify": 4},
        "drafter": {"draft_vocab": 200, "window": 32, "batch_tokens": 256, "budget": 1.0},
        "train": {"steps": 4, "lr": 1e-3, "micro_tokens": 512},
        "checkpoint": {"every": 1, "keep": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True)
class Ended:
    """A command that ended. code: negative for a signal, None where it had to be killed."""

    code: int | None
    said: str
    mark: str


class Commands:
    """Runs `paceline` in processes forked from one that has imported what takes long; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "PYTHONHASHSEED": "0",
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        self.env.pop("PACELINE_FAULT", None)

    def __enter__(self) -> Self:
        script = Path(__file__).with_name("zygote.py")
        self._zygote = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.env,
            cwd=self.folder,
        )
        assert self._answer() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zygote.communicate(timeout=300)

    def run(
        self, *args: str | Path, fault: str = "", timeout_s: float = 1000.0, env: Mapping[str, str] | None = None
    ) -> Ended:
        """Run a command to its end; env: beside what all have."""
        mark = uuid.uuid4().hex
        out = self.folder / f"{mark}.txt"
        out.touch()
        request = {
            "args": list(map(str, args)),
            "env": self.env | {"PACELINE_FAULT": fault, MARK: mark} | dict(env or {}),
            "cwd": str(self.folder),
            "out": str(out),
            "err": str(out),
            "timeout_s": timeout_s,
        }
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        code = json.loads(self._answer())["code"]
        return Ended(code, out.read_text(errors="replace"), mark)

    def _answer(self) -> str:
        assert self._zygote.stdout is not None
        return self._zygote.stdout.readline().strip()


def staged(run: Path) -> set[Path]:
    """Checkpoints whose writing was interrupted; the next start that has read the data removes them."""
    return set((run / "checkpoints").glob(".staging-step_*"))


def check_end(
    run: Path, ended: Ended, *, damaged: Path | None = None, leftover: Collection[Path] = ()
) -> dict[str, Any] | None:
    """What holds however a command ended: one crash report where it failed, no process left, no half-written file.

    damaged: a checkpoint that need not be whole. leftover: what was staged before. Returns the report.
    """
    assert ended.code is not None, f"it did not end:\n{ended.said}"
    left = processes(ended.mark)
    deadline = time.monotonic() + LEAVE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.1)  # processes that are not ours to wait for
        left = processes(ended.mark)
    assert not left, f"processes are left: {left}"
    folders = [folder for folder in step_folders(run / "checkpoints") if folder != damaged]
    assert all(map(is_sound, folders)), "a checkpoint is not whole"
    status = json.loads((run / "STATUS.json").read_text())
    report_path = run / "logs" / f"attempt_{status['attempt']}" / "crash.json"
    if ended.code < 0 or ended.code == EXIT:
        assert "exit_code" not in status
        return None
    assert status["exit_code"] == json.loads((run / "EXIT.json").read_text())["code"] == ended.code, ended.said
    assert not list(run.rglob("*.partial")), "a file is half-written"
    assert staged(run) <= set(leftover), "a checkpoint is half-written"
    if ended.code in NO_REPORT:
        assert not report_path.exists()
        return None
    report: dict[str, Any] = json.loads(report_path.read_text())
    assert report["code"] == ended.code and report["first"]["error"]
    assert report["next"] == [f"paceline resume {run}", f"paceline bundle {run}"]
    return report


def check_complete(run: Path, *, steps: int = 4) -> None:
    """What holds of a run that came to its end, whatever befell it: every step and every sample is there once."""
    records = [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    for step in range(1, steps + 1):
        rows = pq.read_table(run / "samples" / f"step_{step}.parquet", columns=["prompt_id", "sample"]).to_pylist()
        pairs = Counter((row["prompt_id"], row["sample"]) for row in rows)
        prompts = {prompt for prompt, _ in pairs}
        assert len(prompts) == PROMPTS and pairs == Counter((p, s) for p in prompts for s in range(GROUP)), pairs
    newest = step_folders(run / "checkpoints")[-1]
    assert newest.name == f"step_{steps}" and is_sound(newest)
    # a report for every attempt that did not end as it was meant to: their number is that of the attempts but the last
    attempts = sorted((run / "logs").iterdir())
    ends = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = {path.parent.name for path in run.glob("logs/*/crash.json")}
    quiet = {f"attempt_{each['attempt']}" for each in ends if each["event"] == "exit" and each["code"] in NO_REPORT}
    assert told | quiet == {path.name for path in attempts} and not told & quiet, (told, quiet)


def texts(run: Path, steps: int = 4) -> list[list[str]]:
    """What every rollout said, by step."""
    return [pq.read_table(run / "samples" / f"step_{s}.parquet")["text"].to_pylist() for s in range(1, steps + 1)]


def state(run: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint: parameters, optimiser, drafter, loop."""
    folder = step_folders(run / "checkpoints")[-1]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MANIFEST.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def corrupt(run: Path) -> Path | None:
    """Change one byte of the newest checkpoint's parameters, if there is one; which it was."""
    folders = step_folders(run / "checkpoints")
    if not folders:
        return None
    shard = folders[-1] / "trainer" / "params.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return folders[-1]


def processes(mark: str) -> list[str]:
    """Command lines of the processes that a command started and that live, zombies not counted."""
    found = []
    needle = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if needle not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            name = (entry / "cmdline").read_bytes().rstrip(b"\0")[:100].decode(errors="replace")
            if b") Z " not in (entry / "stat").read_bytes() and name not in AGENTS:
                found.append(f"{entry.name}: {name}")
        except OSError:  # it has ended
            continue
    return found


def kill(mark: str) -> None:
    """End what a command left behind."""
    for line in processes(mark):
        os.kill(int(line.partition(":")[0]), signal.SIGKILL)

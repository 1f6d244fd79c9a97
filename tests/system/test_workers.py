"""Ray workers on this machine: takeovers, learning, agreement and a kill, as the commands run them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

Paceline = Callable[..., subprocess.CompletedProcess[str]]


def actors_below(root: int) -> list[int]:
    """Worker actors among a process's descendants: others may run Ray on this machine."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title, stat = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
        except OSError:  # it has ended
            continue
        titles[int(entry.name)] = title.decode().partition("\0")[0]
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def is_below(pid: int) -> bool:
        while pid != root and pid in parents:
            pid = parents[pid]
        return pid == root

    return sorted(pid for pid, title in titles.items() if title.startswith("ray::Worker") and is_below(pid))


def step_of(run: Path) -> int:
    status = run / "STATUS.json"
    return int(json.loads(status.read_text()).get("step", 0)) if status.exists() else 0


LOCAL_RAY = """
import sys
from launch.cluster import protect_local_ray
protect_local_ray()
import ray
from launch.joined import join
join("local")
ray.get(ray.remote(lambda: None).remote())  # a worker is there, too
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


def test_a_ray_of_our_own_listens_to_this_machine_alone_and_asks_for_a_token(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", LOCAL_RAY], env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ours:
        assert ours.stdin is not None and ours.stdout is not None
        address = ours.stdout.readline().strip()
        started = psutil.Process(ours.pid).children(recursive=True)
        listening, asks = [], {}
        for process in (*started, psutil.Process(ours.pid)):
            with suppress(psutil.NoSuchProcess):  # one that was soon over
                found = process.net_connections(kind="tcp")
                listening += [one.laddr for one in found if one.status == psutil.CONN_LISTEN]
                asks[process.name()] = process.environ().get("RAY_AUTH_MODE")
        ours.stdin.close()
    assert ours.returncode == 0
    assert {ip_address(each.ip.removeprefix("::ffff:")).is_loopback for each in listening} == {True}, listening
    assert int(address.rpartition(":")[2]) in {each.port for each in listening}
    assert asks["gcs_server"] == asks["raylet"] == "token"
    assert not (tmp_path / ".ray" / "auth_token").exists(), "it is this run's own, not one for every run of the user"


@pytest.mark.slow
def test_sequences_that_change_workers_say_what_they_would_have_said(
    environment: dict[str, str], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("in_workers.py")
    result = subprocess.run(
        [sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1000
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["found"] == told["expected"]
    assert told["num_moved"] > 0 and told["sampled_s"] > 0
    assert told["meets"] == "127.0.0.1"  # nobody is on another machine
    assert told["lost"] == 0


@pytest.mark.slow
def test_an_idle_worker_learns_agrees_and_dies_at_no_rollouts_cost(paceline: Paceline, tmp_path: Path) -> None:
    out = tmp_path / "idle.json"
    shape = ["--geometry", "tiny", "--running", "4", "--new-tokens", "200", "--batch-tokens", "256", "--rounds", "1"]
    result = paceline("bench", "idle", *shape, "--device", "cpu", "--json", out)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert all(share == 1 for arm in found["arms"].values() for share in arm["same"])
    assert found["arms"]["rest"]["used"]["median"] == 0
    assert found["arms"]["learn"]["used"]["median"] > 0
    assert found["agreed"]["equal"] and found["agreed"]["report"]["num_steps"] > 0
    killed = found["killed"]
    assert list(killed["lost"]) == ["1"]
    assert killed["same"] == killed["next_same"] == 1


@pytest.mark.slow
def test_a_run_that_lost_a_worker_ends_at_once_and_goes_on_when_resumed(
    recipe: Path, tmp_path: Path, paceline: Paceline, command: list[str], environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    workers = ["compute.backend=ray", "compute.workers=2", "spec.source=eagle", "spec.top_k=1"]
    options = ["drafter.batch_tokens=256", "eval.every=0", "warmstart.steps=0", "checkpoint.every=1", "train.steps=500"]
    options += ["run.max_recoveries=0"]
    process = subprocess.Popen(
        [*command, "train", str(recipe), *workers, *options],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 1000
    while step_of(run) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)  # another process's progress has no event to wait on
    _, victim = actors_below(process.pid)
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 7, stderr
    assert b"resume the run" in stderr
    resumed = paceline("resume", run, f"train.steps={step_of(run) + 2}")
    assert resumed.returncode == 0, resumed.stderr

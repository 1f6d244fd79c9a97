"""The hub beside a run: started with it, gone with it, and free to crash."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import MonitorConfig
from launch.monitor.beside import watched

PATIENCE_S = 600.0  # with a machine that is busy with other work


def eventually(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


def state(port: int) -> dict | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/state", timeout=60) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def hubs(path: Path) -> list[int]:
    """Processes that watch this run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "launch.monitor.serve" in command and str(path) in command:
                found.append(int(folder.name))
    return found


def test_page_is_there_as_long_as_the_run(written, free_port: Callable[[], int]) -> None:
    port = free_port()
    log = written.path / "monitor.log"
    with watched(written.path, MonitorConfig(port=port), log=log):
        eventually(lambda: state(port) is not None, "the page does not come up")
        (hub,) = hubs(written.path)
        assert os.getsid(hub) == hub, "Ctrl-C in the run's terminal would end it before the run has saved"
    assert state(port) is None and hubs(written.path) == []
    assert log.read_text() == ""
    assert (written.path / "monitoring" / "grafana" / "paceline.json").is_file()


def test_taken_port_is_said_and_the_run_goes_on(written, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with watched(written.path, MonitorConfig(port=port), log=written.path / "monitor.log"):
            pass
    assert f"no page: monitor.port: cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_token_that_is_too_short_costs_the_page_and_not_the_run(
    written, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_MONITOR_TOKEN", "short")
    with watched(written.path, MonitorConfig(port=8470), log=written.path / "monitor.log"):
        assert hubs(written.path) == []
    assert "no page: monitor.port: PACELINE_MONITOR_TOKEN has 5 characters" in capsys.readouterr().err


def test_sinks_hold_the_last_step_when_the_run_ends(written) -> None:
    with watched(written.path, MonitorConfig(sinks=("tensorboard",)), log=written.path / "monitor.log"):
        written.step(1)
        eventually(lambda: (written.path / "tensorboard").exists(), "the sink does not start")
        written.step(2)
    (events,) = (written.path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"reward/mean") == 2
    assert (written.path / "monitor.log").read_text() == ""


def test_sink_without_its_login_says_so_in_a_line_and_leaves_the_others(
    written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    log = tmp_path / "monitor.log"
    with watched(written.path, MonitorConfig(sinks=("wandb", "tensorboard")), log=log):
        written.step(1)
        eventually(lambda: "API key" in (log.read_text() if log.exists() else ""), "nothing is said of the login")
    said = log.read_text()
    assert "the wandb sink holds nothing of this run: " in said and "WANDB_MODE=offline" in said
    assert "Traceback" not in said
    assert list((written.path / "tensorboard").iterdir())


def test_hub_goes_with_a_run_that_is_killed(written, free_port: Callable[[], int]) -> None:
    port = free_port()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom configs.schema import MonitorConfig\n"
        "from launch.monitor.beside import watched\n"
        f"with watched(Path({str(written.path)!r}), MonitorConfig(port={port}), log=Path('/dev/null')):\n"
        "    time.sleep(3600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: state(port) is not None, "the page does not come up")
    finally:
        run.kill()
        run.wait()
    eventually(lambda: hubs(written.path) == [], "the hub outlives its run")


HELD = """
import time
from pathlib import Path

scored = 0

def held(prompt, rollout):
    global scored
    scored += 1
    while scored > {free} and not Path({go!r}).exists():
        time.sleep(0.02)
    return 0.0
"""


@pytest.mark.slow
def test_killed_hub_leaves_training_untouched(
    tmp_path: Path, tiny_model_dir: Path, free_port: Callable[[], int]
) -> None:
    port, path, go = free_port(), tmp_path / "run", tmp_path / "go"
    (tmp_path / "held_reward.py").write_text(HELD.format(free=3 * 4, go=str(go)))  # three steps, then until told
    command = [
        sys.executable, "-m", "launch.cli", "train", "configs/smoke.yaml", f"model={tiny_model_dir}", f"run.dir={path}",
        f"monitor.port={port}", "train.steps=6", "rollout.prompts_per_step=2", "rollout.group_size=2",
        "rollout.max_new_tokens=8", "reward.workers=1", "eval.every=0", "checkpoint.every=1000",
        "reward.functions={'held_reward:held': 1.0}", "reward.timeout_s=1000",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with (tmp_path / "out").open("wb") as out:
        run = subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=out, stderr=out, env=environment)
    try:
        eventually(lambda: (state(port) or {}).get("step", 0) >= 1 or run.poll() is not None, "no step is shown")
        (hub,) = hubs(path)
        os.kill(hub, signal.SIGKILL)
        go.touch()
        assert run.wait(PATIENCE_S) == 0, (tmp_path / "out").read_text()[-2000:]
    finally:
        run.kill()
    steps = [json.loads(line)["step"] for line in (path / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))  # it went on without

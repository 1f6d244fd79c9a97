"""A run sent to a real Ray cluster by `ray job submit`, with its token."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from launch.exits import run_command

pytestmark = pytest.mark.slow

PATIENCE_S = 900.0
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]) -> Iterator[str]:
    """The address of a Ray head of this test's own, whose token lies in a file."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    head, client, page, agent = (free_port() for _ in range(4))
    # Ray's sockets must fit 107 characters, which pytest's folders use up
    with tempfile.TemporaryDirectory(prefix="pl-ray-", ignore_cleanup_errors=True) as folder:
        ray = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", f"--port={head}",
             f"--ray-client-server-port={client}", f"--dashboard-port={page}",
             f"--dashboard-agent-listen-port={agent}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{page}"
        finally:
            ray.terminate()
            ray.wait(300)


def status(address: str, job: str) -> str:
    """What Ray says of a job; "" while there is none."""
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = Request(f"{address}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"})
    with urlopen(request, timeout=300) as reply:
        return str(json.load(reply)["status"])


def test_a_run_is_submitted_and_ends_well(
    dashboard: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from launch.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model_dir}\n"
        "run: {name: sent}\n"
        "compute: {device: cpu, dtype: float32}\n"
        "data: {name: chain_sum, options: {min_terms: 2, max_terms: 2}, size: 64, max_prompt_tokens: 256}\n"
        "rollout: {prompts_per_step: 2, group_size: 2, max_new_tokens: 8}\n"
        "reward: {workers: 1}\n"
        "train: {steps: 1, micro_tokens: 1024}\n"
    )
    command = ["launch", "recipe.yaml", "--on", "ray-job", "--address", dashboard, "run.dir=run"]
    deadline = time.monotonic() + PATIENCE_S
    while run_command(lambda: app(command, standalone_mode=False)) != 0:  # the head is not up yet
        assert time.monotonic() < deadline, capfd.readouterr().err
        time.sleep(1)
    assert "Ray job sent-run\nfollow: RAY_AUTH_MODE=token ray job logs" in capfd.readouterr().out
    while (state := status(dashboard, "sent-run")) not in ENDED:
        assert time.monotonic() < deadline, state
        time.sleep(1)
    assert state == "SUCCEEDED"
    assert '"state": "done"' in (tmp_path / "run" / "STATUS.json").read_text()
    token = (tmp_path / "token").read_text()
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "token" and token in path.read_text(errors="replace")
    ]

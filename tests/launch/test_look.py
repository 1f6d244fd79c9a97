"""The commands that read a run: what they show of it, and what they leave out."""

import io
import json
import os
import pty
import subprocess
import sys
import tarfile
import termios
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.errors import ConfigError, PreflightError
from configs.schema import Config, RunConfig, TrainConfig
from launch import bundle, look
from launch.bundle import write_bundle
from launch.logs import follow, log_files
from launch.monitor.reader import RunReader
from launch.monitor.top import spread, view
from launch.samples import samples_file, show_samples, visible
from rl.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A run that has made two steps, and samples the third."""
    run_config = RunConfig(dir=str(tmp_path / "run"))
    config = Config(model=str(tiny_model_dir), run=run_config, train=TrainConfig(steps=9))
    with RunDir.create(config, "") as made:
        for step in (1, 2):
            made.append_metrics("steps", record(step))
            made.write_samples(step, [row(number, step) for number in range(4)])
        for place in range(12):
            made.append_metrics("curve", point(3, place))
        made.append_metrics("eval", {"step": 1, "stage": "rl", "reward_mean": 0.875})
        made.append_event("drift", step=2, level="warn", prob_diff_mean=0.006, limit=0.005)
        made.write_status(state="running", step=2, total_steps=9)
        (made.logs / "run.log").write_text("first line\nlast line\n")
    return tmp_path / "run"


def record(step: int) -> dict[str, object]:
    return {
        "step": step, "total_steps": 9, "reward_mean": step / 4, "reward_std": 0.1, "response_len_mean": 20.0,
        "tokens_per_s": 100.0, "accept_length": 1.5, "accept_length_suffix": 2.25, "draft_share_suffix": 0.4,
        "loss": 0.1, "grad_norm": 1.0, "prob_diff_mean": 0.006, "seconds": 4.0, "seconds_rollout": 3.0,
        "seconds_train": 1.0, "time": 1000.0 + step, "tokens": 300, "num_rollouts": 4, "truncated_fraction": 0.0,
        "draft_tokens": 200,
    }  # fmt: skip


def point(step: int, place: int) -> dict[str, object]:
    strategy = "off" if place < 6 else "suffix d4 k1 v4"
    worker = {
        "running": 12 - place, "waiting": 2, "strategy": strategy, "cycles": {"off": 6, "suffix": place},
        "preempted": 1, "tokens": 50 * place,
    }  # fmt: skip
    return {
        "step": step, "time": 1000.0 + place / 4, "finished": place, "total": 12, "tokens": 100 * place,
        "workers": [worker, worker],
    }  # fmt: skip


def row(number: int, step: int) -> dict[str, object]:
    text = f"answer {number}" + "!" * number
    token_ids = np.array([byte + 3 for byte in range(len(text))], dtype=np.int32)
    return {
        "prompt_id": "p", "sample": number, "question": "how many?", "answer": "4", "text": text, "reward": number / 10,
        "advantage": 0.0, "num_tokens": len(token_ids), "finish": "stop", "forwards": 5, "accepted": 4,
        "token_ids": token_ids, "drafted": np.arange(len(token_ids)) % 2 == 0,
    }  # fmt: skip


def shown(run: Path, width: int) -> str:
    reader = RunReader(run)
    reader.poll()
    out = io.StringIO()
    Console(file=out, width=width).print(view(reader, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_top_shows_where_a_run_is_and_fits_the_screen(run: Path, width: int) -> None:
    text = shown(run, width)
    assert all(len(line) <= width for line in text.splitlines())
    for expected in (
        "2/9",
        "running",
        "0 to 24 in 3 s, step 3",
        "suffix d4 k1 v4",
        "2.25 tokens a forward in 40%",
        "drift",
        "0.875",
    ):
        assert expected in text, expected
    assert "200" in text, "tokens a second of a worker: 50 in a quarter of one"
    assert "rollout 75%" in text and "0.25 to 0.50" in text
    assert "probability difference" in text, "the alarm stands there"


def test_top_fits_a_terminal_of_24_lines(run: Path) -> None:
    reader, out = RunReader(run), io.StringIO()
    reader.poll()
    Console(file=out, width=80).print(view(reader, 80, height=24))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 24 and "q quits" in lines[0]


def test_top_shows_a_run_that_has_only_begun(tmp_path: Path) -> None:
    with RunDir.create(Config(run=RunConfig(dir=str(tmp_path / "new"))), ""):
        assert "starting" in shown(tmp_path / "new", 80)


def test_the_curve_is_spread_over_its_time() -> None:
    assert spread([0.0, 1.0, 2.0, 3.0], 4) == [0, 1, 2, 3]
    # long pauses are long, and the last point is always there
    assert spread([0.0, 0.1, 0.2, 10.0], 4) == [2, 2, 2, 3]
    assert spread([5.0], 80) == [0]


def test_top_prints_once_into_a_pipe_and_quits_on_q_in_a_terminal(run: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "top", str(run)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "TERM": "xterm-256color"}
    piped = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert piped.returncode == 0 and "2/9" in piped.stdout and "\x1b" not in piped.stdout
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while b"q quits" not in seen:
        seen += os.read(ours, 1 << 16)
    os.write(ours, b"q")
    reader = threading.Thread(target=lambda: drained(ours), daemon=True)
    reader.start()
    assert process.wait(timeout=600) == 0
    os.close(ours)


def drained(terminal: int) -> None:
    """Read until the other end is gone: it must not wait for a screen that nobody reads."""
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:
        return


def test_logs_are_the_last_attempts_unless_another_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDir.open(run) as again:
        (again.logs / "run.log").write_text("second attempt\n")
        (again.logs / "crash.log").write_text("the cause\n")
    assert [file.name for file in log_files(run, None)] == ["run.log", "crash.log"]
    look.logs(run, follow=False, attempt=None)
    assert capsys.readouterr().out == "second attempt\n\n==> crash.log <==\nthe cause\n"
    look.logs(run, follow=False, attempt=1)
    assert capsys.readouterr().out == "first line\nlast line\n"
    (run / "logs" / "attempt_1" / "run.log").write_text("")
    look.logs(run, follow=False, attempt=1)
    assert "nothing was logged in" in capsys.readouterr().err
    with pytest.raises(PreflightError, match="no logs of attempt 7; attempts: 1, 2"):
        look.logs(run, follow=False, attempt=7)


def test_logs_of_a_run_that_has_only_begun_are_told_apart_from_no_attempt(tmp_path: Path) -> None:
    RunDir.create(Config(run=RunConfig(dir=str(tmp_path / "new"))), "").close()
    with pytest.raises(PreflightError, match="attempt 1 of .*new has logged nothing; `paceline status"):
        look.logs(tmp_path / "new", follow=False, attempt=None)


def test_samples_of_a_run_of_another_version_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "config" / "resolved.yaml").open("a") as file:
        file.write("later: {than: this}\n")
    look.samples(run, step=None, worst=False, best=False, longest=False, count=1)
    assert "how many?" in capsys.readouterr().out


def test_logs_are_followed_until_the_run_is_over(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("a\n")
    looks = 0

    def is_over() -> bool:
        nonlocal looks
        looks += 1
        with log.open("a") as file:
            file.write(f"{looks}\n")
        return looks == 3

    assert "".join(follow(log, is_over, poll_s=0.0)) == "a\n1\n2\n3\n"


def test_samples_are_chosen_and_drafts_coloured(run: Path, tiny_model_dir: Path) -> None:
    def printed(order: str, count: int, *, terminal: bool = False) -> str:
        out = io.StringIO()
        colours = "standard" if terminal else None
        console = Console(file=out, width=100, force_terminal=terminal, color_system=colours, highlight=False)
        show_samples(run, console, step=None, order=order, count=count, model=str(tiny_model_dir))  # type: ignore[arg-type]
        return out.getvalue()

    assert "step 2  p/0  reward 0 " in printed("worst", 1)
    assert "p/3  reward 0.3 " in printed("best", 1) and "p/3" in printed("longest", 1)
    everything = printed("prompt", 9)
    assert [f"p/{number}" in everything for number in range(5)] == [True] * 4 + [False]
    assert "\x1b" not in everything and "colour" not in everything
    coloured = printed("worst", 1, terminal=True)
    # every second token is a draft
    assert coloured.count("\x1b[1;36m") == len("answer 0") / 2 + 1
    assert "Accepted drafts" in coloured


def test_samples_of_a_step_that_is_not_there_are_refused(run: Path, tmp_path: Path) -> None:
    assert samples_file(run, 1).name == "step_1.parquet"
    with pytest.raises(PreflightError, match="no samples of step 7; it has 1 to 2"):
        samples_file(run, 7)
    with (
        RunDir.create(Config(run=RunConfig(dir=str(tmp_path / "new"))), ""),
        pytest.raises(PreflightError, match="yet"),
    ):
        samples_file(tmp_path / "new", None)
    with pytest.raises(ConfigError, match="one of"):
        look.samples(run, step=None, worst=True, best=True, longest=False, count=3)


def test_what_a_model_writes_cannot_drive_the_terminal() -> None:
    assert visible("a\x1b[2Jb\rc\td\né") == "a\\x1b[2Jb\\x0dc\td\né"


def test_a_bundle_holds_what_helps_and_neither_samples_nor_weights_nor_links(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "step_1").mkdir()
    (run / "checkpoints" / "step_1" / "params.safetensors").write_bytes(b"weights")
    (tmp_path / "private.json").write_text("{}")
    (run / "private.json").symlink_to(tmp_path / "private.json")
    (run / "logs" / "attempt_9").symlink_to(tmp_path)
    out = tmp_path / "bundle.tar.gz"
    names = write_bundle(run, out)
    assert {"config/resolved.yaml", "env.json", "events.jsonl", "metrics/curve.jsonl", "STATUS.json"} <= set(names)
    assert "logs/attempt_1/run.log" in names
    assert not [name for name in names if "private" in name or "params" in name or "parquet" in name]
    with tarfile.open(out) as file:
        assert {member.name for member in file} == {f"run/{name}" for name in (*names, "BUNDLE.json")}
        assert all(member.isfile() for member in file)
    assert out.stat().st_mode & 0o077 == 0
    with pytest.raises(PreflightError, match="exists; name another"):
        write_bundle(run, out)


def test_a_link_where_a_bundle_is_staged_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".bundle.tar.gz.partial").symlink_to(tmp_path / "precious")
    write_bundle(run, tmp_path / "bundle.tar.gz")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "bundle.tar.gz").is_symlink()


def test_a_long_file_is_bundled_with_its_last_whole_lines(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_BYTES", 600)
    write_bundle(run, tmp_path / "bundle.tar.gz")
    with tarfile.open(tmp_path / "bundle.tar.gz") as file:
        about = json.loads(file.extractfile("run/BUNDLE.json").read())  # type: ignore[union-attr]
        curve = file.extractfile("run/metrics/curve.jsonl").read().decode()  # type: ignore[union-attr]
    assert "metrics/curve.jsonl" in about["cut_to_their_last_bytes"]
    assert [json.loads(line)["finished"] for line in curve.splitlines()][-1] == 11


def test_no_secret_gets_into_a_bundle(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "canary-environment")
    with (run / "config" / "resolved.yaml").open("a") as file:
        file.write("# hub_token: canary-comment\nextra:\n  password: canary config with spaces\n")
    for name in ("env.json", "plan.json"):
        (run / name).write_text(
            json.dumps({"command": ["paceline", "x.api_key=canary-argument"], "secret": "canary-json"})
        )
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "x", "reason": "GET https://me:canary-url@host/x?token=canary-query"}) + "\n")
    with (run / "logs" / "attempt_1" / "run.log").open("a") as file:
        file.write("sent Authorization: Bearer canary.bearer\nit was canary-environment\nhf_canarycanarycanarycanary\n")
    (run / "logs" / "attempt_1" / "crash.json").write_text(json.dumps({"stack": 'raise E("password=canary-stack")'}))
    (run / "metrics" / "steps.jsonl").write_text('{"step": 1, "wandb_api_key": "canary-metrics"}\n')
    write_bundle(run, tmp_path / "bundle.tar.gz")
    with tarfile.open(tmp_path / "bundle.tar.gz") as file:
        texts = {member.name: file.extractfile(member).read().decode() for member in file}  # type: ignore[union-attr]
    assert not {name: text for name, text in texts.items() if "canary" in text}
    assert "***" in texts["run/logs/attempt_1/run.log"]

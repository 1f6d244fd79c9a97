"""`paceline monitor` on the command line, and the options of a run."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import dump, parse
from launch.exits import run_command

ROOT = Path(__file__).parents[3]


def paceline(*arguments: str) -> int:
    from launch.cli import app

    return run_command(lambda: app(["monitor", *arguments], standalone_mode=False))


def test_files_for_prometheus_and_grafana_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paceline("--write", str(tmp_path), "--port", "9001") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grafana", "prometheus.yml", "rules.yml"]
    assert "127.0.0.1:9001" in (tmp_path / "prometheus.yml").read_text()
    assert "wrote" in capsys.readouterr().out


def test_finished_run_is_written_to_tensorboard(written, capsys: pytest.CaptureFixture[str]) -> None:
    written.step(1)
    written.end()
    assert paceline(str(written.path), "--sink", "tensorboard") == 0
    assert list((written.path / "tensorboard").iterdir())


def test_mistakes_are_one_line_with_their_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str], written) -> None:
    assert paceline() == 2
    assert paceline(str(tmp_path)) == 3
    assert paceline(str(written.path), "--sink", "mlflow") == 2
    assert paceline(str(written.path), "--port", "99999") == 2
    assert paceline(str(written.path), "--listen", "192.0.2.1") == 3
    assert paceline("--write", "/proc/there") == 6
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "error: monitor needs a RUN, as in `paceline monitor runs/smoke-20260101-120000`",
        f"error: {tmp_path} is not a run directory; `paceline train CONFIG` makes one under runs/",
        "error: sink 'mlflow' is none of tensorboard, wandb",
        "error: Invalid value for '--port': Input should be less than or equal to 65535; see paceline --help",
        "error: 192.0.2.1 is no address of this machine; name one that is",
        "error: cannot write /proc/there: No such file or directory",
    ]


def test_listening_prints_a_login_url_until_ctrl_c_ends_it(written) -> None:
    command = [sys.executable, "-m", "launch.cli", "monitor", str(written.path), "--listen", "0.0.0.0", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PACELINE_MONITOR_TOKEN"}
    # tests that a script runs in the background ignore Ctrl-C, and what they start would as well
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hub = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    try:
        assert hub.stdout is not None
        assert re.fullmatch(r"monitor http://[^/]+:\d+/login\?token=[\w-]{32}\n", hub.stdout.readline())
    finally:
        hub.send_signal(signal.SIGINT)
        assert hub.wait(300) == 0


def test_sinks_and_port_are_options_of_a_run() -> None:
    config = parse("data: {name: chain_sum}", ["monitor.sinks=[tensorboard,wandb]", "monitor.port=8470"])
    assert config.monitor.sinks == ("tensorboard", "wandb")
    assert parse(dump(config)) == config
    with pytest.raises(ConfigError, match=r"monitor.sinks\[0\]='mlflow': expected one of tensorboard, wandb"):
        parse("data: {name: chain_sum}", ["monitor.sinks=[mlflow]"])
    with pytest.raises(ConfigError, match="monitor.sinks='wandb': expected a list"):
        parse("data: {name: chain_sum}", ["monitor.sinks=wandb"])
    with pytest.raises(ConfigError, match="monitor.port=70000: must be at most 65535"):
        parse("data: {name: chain_sum}", ["monitor.port=70000"])

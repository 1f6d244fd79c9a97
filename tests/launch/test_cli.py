"""The command line as a user meets it: what it says, what it leaves behind, how it exits."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from configs import faults
from configs.errors import DataError, DivergedError, PreemptedError
from configs.load import load
from configs.schema import Config
from launch import logs
from launch.cli import app
from launch.exits import run_command
from rl.rundir import RunDir, read_status

TASK = "data.name=chain_sum"


@pytest.fixture
def paceline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs a command line in this process, in an empty folder, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("data: {name: chain_sum}\nrun: {dir: run}\n")
    root, on_term, raises = logging.getLogger(), signal.getsignal(signal.SIGTERM), logging.raiseExceptions
    handlers, level, environ = root.handlers, root.level, dict(os.environ)
    yield lambda *arguments: run_command(lambda: app(list(arguments), standalone_mode=False))
    root.handlers, logging.raiseExceptions = handlers, raises
    root.setLevel(level)
    logging.captureWarnings(False)
    signal.signal(signal.SIGTERM, on_term)
    os.environ.clear()
    os.environ.update(environ)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Callable[..., None]:
    """Replaces the training behind the command by a function of (config, run, resume, progress)."""

    def replace(body: Callable[..., None]) -> None:
        def train_run(config: Any, run: RunDir, *, resume: bool, progress: Any) -> None:
            body(config, run, resume, progress)

        monkeypatch.setitem(sys.modules, "launch.cluster", SimpleNamespace(train_run=train_run))

    monkeypatch.setattr("rollout.pretrained.resolve", lambda name: tiny_model_dir)
    replace(lambda *_: None)
    return replace


def exit_record(run: str = "run") -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(run) / "EXIT.json").read_text())
    return record


def test_help_takes_a_second_of_computing_at_most() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; sys.argv[1:] = ['--help']; from launch.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of its own, not of the clock's; several times as much where caches and cores are shared
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert all(command in result.stdout for command in ("train", "resume", "plan", "export", "status"))


def test_every_help_shows_all_of_its_options_texts() -> None:
    """Brackets in one would be Rich's markup: left out, or an error."""

    def check(command: Any, name: str) -> None:
        result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "300"})
        assert result.exit_code == 0, (name, result.exception)
        for parameter in command.params:
            text = (getattr(parameter, "help", None) or "").split("\n")[0]
            assert text in result.output, (name, text)
        for sub, inner in getattr(command, "commands", {}).items():
            check(inner, f"{name} {sub}")

    check(typer.main.get_command(app), "")


def test_a_command_that_ends_leaves_nothing_to_be_searched_for_cycles() -> None:
    code = (
        "import atexit, gc, sys; from launch.cli import main; sys.argv[1:] = ['--help']; "
        "atexit.register(lambda: print('frozen', gc.get_freeze_count())); main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert int(result.stdout.rpartition("frozen ")[2]) > 10_000


def test_command_line_imports_nothing_heavy() -> None:
    code = "import sys, launch.cli; print(sorted({'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian"], 2, "error: No such command 'trian'"),
        (["train", "--bad"], 2, "error: No such option: --bad; see paceline --help"),
        (["train"], 2, "error: train needs a CONFIG"),
        (["train", "train.steps=3"], 2, "error: train needs a CONFIG"),
        (["train", "nope.yaml"], 2, "error: config file nope.yaml does not exist"),
        (["train", "tiny.yaml", "train.stepz=3"], 2, "error: unknown key train.stepz; did you mean train.steps?"),
        (["train", "tiny.yaml", "train.steps=many"], 2, "error: train.steps='many': expected an integer"),
        (["train", "tiny.yaml", "steps"], 2, "error: override 'steps' is not of the form a.b=c"),
        (["plan", "tiny.yaml", "train.steps=0"], 2, "error: train.steps=0: must be at least 1"),
        (["resume", "nowhere"], 3, "error: nowhere is not a run directory"),
        (["train", "--resume", "nowhere", "train.steps=5"], 3, "error: nowhere is not a run directory"),
        (["status", "nowhere"], 3, "error: nowhere is not a run directory"),
        (["export", "nowhere", "--policy", "out"], 3, "error: nowhere is not a run directory"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    paceline: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert paceline(*arguments) == code
    shown = capsys.readouterr()
    assert shown.err.startswith(said)
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert os.listdir() == ["tiny.yaml"]


def test_two_mistakes_are_two_lines(paceline: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert paceline("train", "tiny.yaml", "train.stepz=3", "rollout.group_size=1") == 2
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error", "error"]


def test_finished_run_says_so_everywhere(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    training(lambda config, run, resume, progress: progress.message(f"{config.train.steps} {resume}"))
    assert paceline("train", "tiny.yaml", "train.steps=7") == 0
    out = capsys.readouterr().out
    assert "run directory run\n" in out and "\n7 False\n" in out
    assert "paceline export run --policy OUT" in out
    assert exit_record() == exit_record() | {"code": 0, "reason": "done", "attempt": 1}
    assert json.loads(Path("run/plan.json").read_text())["steps"] == 7
    assert Path("run/config/input.yaml").read_text() == Path("tiny.yaml").read_text()
    assert paceline("status", "run") == 0
    assert "done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("data.jsonl is empty"), 8, "data.jsonl is empty"),
        (DivergedError("loss is nan"), 5, "loss is nan"),
        (PreemptedError("asked to stop"), 75, "asked to stop; `paceline resume run` goes on"),
        (KeyboardInterrupt(), 130, "interrupted; `paceline resume run` goes on"),
        (MemoryError(), 4, "out of memory (MemoryError); lower train.micro_tokens"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "out of memory (CUDA out of memory); lower"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 6, "the disk is full"),
        (ExceptionGroup("rewards", [DataError("reward failed")]), 8, "reward failed"),
    ],
)
def test_failed_run_reports_code_and_reason(
    paceline: Callable[..., int],
    training: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    training(fail)
    assert paceline("train", "tiny.yaml") == code
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert exit_record()["code"] == code
    assert exit_record()["reason"].startswith(said)
    assert Path("run/logs/attempt_1/crash.json").exists() == (code not in (75, 130))


def test_bug_leaves_its_traceback_in_the_run(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def buggy(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    training(buggy)
    assert paceline("train", "tiny.yaml") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ZeroDivisionError: division by zero; the traceback is in run/logs/attempt_1/crash.log")
    assert "in buggy" in Path("run/logs/attempt_1/crash.log").read_text()
    assert exit_record()["code"] == 1


def test_a_fault_for_a_worker_that_is_not_there_is_refused_before_anything_is_written(
    paceline: Callable[..., int],
    training: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training(lambda *_: pytest.fail("it trains"))
    monkeypatch.setenv("PACELINE_FAULT", "rollout.cycle@2:1:kill")
    for options, there in (
        (("compute.backend=ray", "compute.workers=2"), "workers 0 to 1"),
        ((), "no workers"),
    ):
        assert paceline("train", "tiny.yaml", *options) == 2
        assert f"PACELINE_FAULT: @2 is nobody here; this run has {there}, and driver" in capsys.readouterr().err
    assert os.listdir() == ["tiny.yaml"]
    faults.arm("")


def test_a_process_asked_to_stop_before_it_trains_can_go_on(
    paceline: Callable[..., int], training: Callable[..., None]
) -> None:
    def waits_in_ray(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            sys.exit(1)  # what Ray makes of it

    training(waits_in_ray)
    assert paceline("train", "tiny.yaml") == 75  # what launchers start again
    assert exit_record()["code"] == 75
    assert "`paceline resume run` goes on" in exit_record()["reason"]


def test_ctrl_c_outside_a_run_exits_130(
    paceline: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rl.rundir.read_status", interrupted)
    assert paceline("status", "run") == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "scale", "--help"], ["plan", "smoke"]])
def test_a_reader_that_has_seen_enough_is_no_bug(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGPIPE and "Broken pipe" not in errors and "error" not in errors, errors


def test_existing_run_directory_is_left_alone(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert paceline("train", "tiny.yaml") == 0
    assert paceline("train", "tiny.yaml") == 3
    assert "`paceline resume run` goes on with it" in capsys.readouterr().err
    assert exit_record()["code"] == 0


def test_directory_in_use_is_refused(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDir.create(load(Path("tiny.yaml")), ""):
        assert paceline("resume", "run") == 3
        assert paceline("train", "tiny.yaml") == 3
    assert capsys.readouterr().err.count(f"in use by process {os.getpid()}") == 2
    assert not Path("run/EXIT.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["resume", "run", "train.steps=9"],
        ["train", "--resume", "run", "train.steps=9"],
        ["train", "tiny.yaml", "train.steps=9", "--resume", "run"],
    ],
)
def test_resume_goes_on_with_the_overrides(
    paceline: Callable[..., int], training: Callable[..., None], arguments: list[str]
) -> None:
    seen: list[tuple[int, bool, int]] = []
    assert paceline("train", "tiny.yaml") == 0

    def take_up(config: Config, run: RunDir, resume: bool, progress: object) -> None:
        run.write_config(config)
        seen.append((config.train.steps, resume, run.attempt))

    training(take_up)
    assert paceline(*arguments) == 0
    assert paceline("resume", "run") == 0
    assert seen == [(9, True, 2), (9, True, 3)]


def test_missing_model_leaves_no_run_directory(
    paceline: Callable[..., int], training: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from configs.errors import PreflightError

    def missing(name: str) -> Path:
        raise PreflightError(f"no model {name}")

    monkeypatch.setattr(sys.modules["rollout.pretrained"], "resolve", missing)
    assert paceline("train", "tiny.yaml") == 3
    assert os.listdir() == ["tiny.yaml"]


def test_workers_that_this_machine_cannot_hold_leave_no_run_directory_and_a_run_as_it_was(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["compute.backend=ray", "compute.placement=separate", "compute.rollout_workers=4000"]
    assert paceline("train", "tiny.yaml", *many) == 4
    assert "compute.workers=1 and compute.rollout_workers=4000 need 4001 CPUs" in capsys.readouterr().err
    assert os.listdir() == ["tiny.yaml"]
    assert paceline("train", "tiny.yaml") == 0
    assert paceline("resume", "run", *many) == 4
    assert not Path("run/logs/attempt_2").exists() and exit_record()["code"] == 0


def test_libraries_write_to_the_log_and_our_warnings_are_shown_too(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(*_: Any) -> None:
        warnings.warn("a library sighs", stacklevel=1)
        logging.getLogger("DeepSpeed").warning("accelerator chatter")
        logging.getLogger("rollout.engine").warning("graph capture failed")
        logging.getLogger("rl.data").info("10 rows")

    training(noisy)
    assert paceline("train", "tiny.yaml") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "warning: graph capture failed\n" in shown.out
    assert "sighs" not in shown.out and "chatter" not in shown.out
    log = Path("run/logs/attempt_1/run.log").read_text()
    assert all(text in log for text in ("a library sighs", "accelerator chatter", "graph capture failed", "10 rows"))


def test_status_of_a_killed_run_says_so(paceline: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(load(Path("tiny.yaml")), "")
    run.write_status(state="running", step=3, total_steps=9, record={"reward_mean": 0.5, "loss": None})
    assert paceline("status", "run") == 0
    assert f"running (process {os.getpid()}" in capsys.readouterr().out
    run.close()  # as the kernel does for a killed process
    assert read_status(Path("run"))["alive"] is False
    assert paceline("status", "run") == 0
    out = capsys.readouterr().out
    assert "died before it could say why; `paceline resume run` goes on" in out
    assert "3 of 9" in out


def test_plan_shows_sizes_and_writes_nothing(
    paceline: Callable[..., int], training: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert paceline("plan", "tiny.yaml", "rollout.max_new_tokens=600") == 0
    out = capsys.readouterr().out
    assert "rollouts a step" in out and "64" in out
    assert "warning: data.max_prompt_tokens + rollout.max_new_tokens = 1624 exceeds" in " ".join(out.split())
    assert os.listdir() == ["tiny.yaml"]


def test_hugging_faces_kernels_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from configs.errors import PreflightError

    logs.check_kernels()
    spec = SimpleNamespace(origin=str(tmp_path / "site-packages" / "kernels" / "__init__.py"))
    monkeypatch.setattr(logs, "find_spec", lambda name: spec)
    with pytest.raises(PreflightError, match="Hugging Face's package `kernels` .*site-packages.*`pip uninstall"):
        logs.check_kernels()

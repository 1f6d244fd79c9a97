"""The run directory: one writer, whole files, and what survives a crash."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.errors import PreflightError, StorageError
from configs.load import parse
from configs.schema import Config
from rl.rundir import RunDir, read_status

HOLD = """
import os, sys, time
from pathlib import Path
from rl.rundir import RunDir
run = RunDir.open(Path(sys.argv[1]))
if len(sys.argv) > 2 and os.fork() == 0:
    os.write(1, b"forked\\n")  # at once: print may write the end of a line by itself, and the parent writes too
    sys.stdout.close()
    time.sleep(3600)
os.write(1, b"%d\\n" % os.getpid())
time.sleep(3600)
"""


def config_for(path: Path) -> Config:
    return parse("data: {name: chain_sum}", [f"run.dir={path}"])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    made = RunDir.create(config_for(tmp_path / "run"), "data: {name: chain_sum}\n")
    yield made
    made.close()


@pytest.fixture
def holder(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """Another live process that holds the run directory."""
    run.close()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_new_run_directory_is_complete(run: RunDir) -> None:
    names = {entry.name for entry in run.path.iterdir()} - {".lock"}
    assert names == {"config", "logs", "metrics", "samples", "checkpoints", "env.json", "STATUS.json", "events.jsonl"}
    assert (run.path / "config" / "input.yaml").read_text() == "data: {name: chain_sum}\n"
    assert parse((run.path / "config" / "resolved.yaml").read_text()) == config_for(run.path)
    assert json.loads((run.path / "env.json").read_text())["packages"]["torch"]
    assert run.logs == run.path / "logs" / "attempt_1"
    assert run.logs.is_dir()


def test_default_directory_is_named_after_the_run_and_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse("data: {name: chain_sum}", ["run.name=sweep"])
    runs = [RunDir.create(config, "") for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == Path("runs") and run.path.name.startswith("sweep-") for run in runs)


def test_existing_run_directory_is_refused_with_the_remedy(run: RunDir) -> None:
    run.close()
    with pytest.raises(PreflightError, match=rf"{run.path} already exists.*paceline resume {run.path}.*run\.dir"):
        RunDir.create(config_for(run.path), "")


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PreflightError, match="not empty"):
        RunDir.create(config_for(tmp_path), "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_that_is_no_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="is not a run directory"):
        RunDir.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_names_the_process(run: RunDir, holder: subprocess.Popen[str]) -> None:
    for attempt in (lambda: RunDir.open(run.path), lambda: RunDir.create(config_for(run.path), "")):
        with pytest.raises(PreflightError, match=f"in use by process {holder.pid}"):
            attempt()
    status = read_status(run.path)
    assert status["alive"]
    assert status["pid"] == holder.pid


def test_killed_process_frees_the_directory_at_once(run: RunDir, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert read_status(run.path)["alive"] is False
    with RunDir.open(run.path) as again:
        assert again.attempt == 3


def test_forked_child_does_not_keep_the_lock(run: RunDir) -> None:
    run.close()
    command = [sys.executable, "-c", HOLD, str(run.path), "fork"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    # in either order; until the child has begun it keeps what it was forked with
    assert "forked\n" in [process.stdout.readline() for _ in range(2)]
    process.kill()
    process.wait()
    try:
        RunDir.open(run.path).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the child that outlived its parent


def test_status_keeps_what_an_update_does_not_name(run: RunDir) -> None:
    run.write_status(state="running", step=3)
    run.write_status(step=4)
    status = read_status(run.path)
    assert (status["state"], status["step"], status["attempt"], status["alive"]) == ("running", 4, 1, True)


def test_exit_is_recorded_and_a_new_attempt_clears_it(run: RunDir) -> None:
    run.write_exit(5, "diverged")
    assert json.loads((run.path / "EXIT.json").read_text())["code"] == 5
    run.close()
    with RunDir.open(run.path):
        assert not (run.path / "EXIT.json").exists()
        assert read_status(run.path)["state"] == "starting"
        assert "exit_code" not in read_status(run.path)


def test_numbers_that_are_not_finite_become_null(run: RunDir) -> None:
    run.append_metrics("steps", {"step": 1, "loss": float("nan"), "parts": [float("inf"), 1.0]})
    assert lines_of(run.path / "metrics" / "steps.jsonl") == [{"step": 1, "loss": None, "parts": [None, 1.0]}]


def test_resumed_run_holds_each_step_once(run: RunDir) -> None:
    for step in range(1, 6):
        run.append_metrics("steps", {"step": step})
        run.append_metrics("warmstart", {"step": 10 * step})
        run.write_samples(step, [{"text": "a", "reward": 1.0}])
    run.truncate_after(3)
    for step in range(4, 7):
        run.append_metrics("steps", {"step": step})
    assert [line["step"] for line in lines_of(run.path / "metrics" / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines_of(run.path / "metrics" / "warmstart.jsonl")] == [10, 20, 30, 40, 50]
    assert sorted(path.name for path in (run.path / "samples").iterdir()) == [f"step_{n}.parquet" for n in (1, 2, 3)]


def test_run_that_starts_over_keeps_no_metrics(run: RunDir) -> None:
    run.append_metrics("eval", {"step": 0})
    run.append_metrics("warmstart", {"step": 1})
    run.truncate_after(0)  # resumed from the boundary before the first step
    assert lines_of(run.path / "metrics" / "eval.jsonl") and lines_of(run.path / "metrics" / "warmstart.jsonl")
    run.truncate_after(None)
    assert lines_of(run.path / "metrics" / "eval.jsonl") == lines_of(run.path / "metrics" / "warmstart.jsonl") == []


def test_line_torn_by_a_crash_is_cut_and_spoils_no_other(run: RunDir) -> None:
    path = run.path / "metrics" / "steps.jsonl"
    run.append_metrics("steps", {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    run.append_metrics("steps", {"step": 2})
    run.truncate_after(2)
    assert [line["step"] for line in lines_of(path)] == [1, 2]


def test_samples_are_a_row_a_rollout(run: RunDir) -> None:
    rows = [{"prompt_id": "p", "sample": index, "reward": index / 2, "text": "héllo"} for index in range(3)]
    run.write_samples(7, rows)
    assert pq.read_table(run.path / "samples" / "step_7.parquet").to_pylist() == rows


def test_full_disk_is_a_storage_error_and_old_files_stand(small_disk: Path) -> None:
    run = RunDir.create(config_for(small_disk / "run"), "")
    run.write_samples(1, [{"text": "small"}])
    with pytest.raises(StorageError, match=r"cannot write .*step_1\.parquet: No space left.*bytes free"):
        run.write_samples(1, [{"text": os.urandom(80_000).hex()}])
    assert pq.read_table(run.path / "samples" / "step_1.parquet").to_pylist() == [{"text": "small"}]
    assert len(list((run.path / "samples").iterdir())) == 1
    with pytest.raises(StorageError, match=r"steps\.jsonl: No space left"):
        for step in range(10_000):
            run.append_metrics("steps", {"step": step})
    with pytest.raises(StorageError, match=r"STATUS\.json|EXIT\.json"):
        run.write_exit(6, "disk full")
    assert read_status(run.path)["state"] == "starting"
    run.close()


def test_full_disk_at_the_start_leaves_no_half_run(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 60_000)
    with pytest.raises(StorageError, match="No space left"):
        RunDir.create(config_for(small_disk / "run"), "")
    assert not (small_disk / "run").exists()


def test_failed_write_names_path_and_reason(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*STATUS\.json: Input/output error"):
        run.write_status(step=1)
    assert read_status(run.path)["state"] == "starting"

"""The run directory: everything a run leaves behind, in one folder that one process at a time may write.

RUN/config/{input,resolved}.yaml  env.json  plan.json  STATUS.json  EXIT.json
    logs/attempt_N/*.log  events.jsonl  quarantine.jsonl  metrics/*.jsonl  samples/step_N.parquet
    trace/step_N.json.gz  checkpoints/
"""

import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.errors import PreflightError, StorageError
from configs.faults import hit
from configs.load import dump
from configs.redact import redact, redacted
from configs.schema import Config
from rl.environment import environment

# Their lines count warm-start steps, all of which lie before training step 1.
_BEFORE_TRAINING = ("warmstart",)
_LOCK_PATIENCE_S = 0.5  # `paceline status` holds the lock for an instant


class RunDir:
    """A run directory this process holds the lock of, and the attempt it is making there."""

    def __init__(self, path: Path, lock: int) -> None:
        """Begin an attempt in a locked directory; create and open are the ways to get here."""
        self.path = path
        self._lock = lock
        # A forked child would keep the lock alive after this process is killed.
        os.register_at_fork(after_in_child=self.close)
        with storing(path):
            for name in ("config", "logs", "metrics", "samples", "checkpoints"):
                (path / name).mkdir(exist_ok=True)
            attempts = [int(log.name.removeprefix("attempt_")) for log in (path / "logs").glob("attempt_*")]
            self.attempt = max(attempts, default=0)
        _write_json(path / "env.json", {"time": now()} | environment())
        self.begin_attempt()

    @classmethod
    def create(cls, config: Config, input_yaml: str) -> "RunDir":
        """A new run directory at run.dir, or at runs/NAME-TIME. Raises PreflightError if it is taken."""
        path = _claim(config)
        lock = _take_lock(path)
        try:
            run = cls(path, lock)
            _write(path / "config" / "input.yaml", redact(input_yaml).encode())
            run.write_config(config)
        except StorageError:
            shutil.rmtree(path, ignore_errors=True)  # it was empty, and half a run directory is of no use
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run directory, to go on in. Raises PreflightError if it is none or in use."""
        require_run(path)
        return cls(path, _take_lock(path))

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def logs(self) -> Path:
        """This attempt's log folder."""
        return self.path / "logs" / f"attempt_{self.attempt}"

    def begin_attempt(self) -> None:
        """Number a new attempt, with logs of its own; nothing says any more how the one before ended."""
        with storing(self.path):
            self.attempt += 1
            self.logs.mkdir()
            (self.path / "EXIT.json").unlink(missing_ok=True)
        begun = {"state": "starting", "pid": os.getpid(), "host": socket.gethostname(), "attempt": self.attempt}
        _write_json(self.path / "STATUS.json", begun | {"updated": now()})
        self.append_event("attempt")

    def close(self) -> None:
        """Give the lock up."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write_config(self, config: Config) -> None:
        """Make this the configuration that a later resume takes up."""
        _write(self.path / "config" / "resolved.yaml", dump(config).encode())

    def add_environment(self, **fields: Any) -> None:
        """Add what was found out after the start to env.json."""
        path = self.path / "env.json"
        _write_json(path, _read_json(path) | fields)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """plan.json: what was derived from the configuration."""
        _write_json(self.path / "plan.json", plan)

    def write_status(self, **fields: Any) -> None:
        """Update these fields of STATUS.json, atomically: a reader never sees half of it."""
        path = self.path / "STATUS.json"
        status = _read_json(path) if path.exists() else {}
        _write_json(path, status | fields | {"updated": now()})

    def append_event(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl; events of all attempts stay."""
        event = {"time": now(), "attempt": self.attempt, "event": kind, **redacted(fields)}
        _append(self.path / "events.jsonl", event)

    def append_metrics(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to metrics/NAME.jsonl. The record holds "step"; numbers that are not finite become null."""
        assert "step" in record, f"metrics {name} without a step cannot be cut on resume"
        path = self.path / "metrics" / f"{name}.jsonl"
        with storing(path):
            hit("metrics.append")
        _append(path, record)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """samples/step_N.parquet, one row a rollout."""
        import pyarrow as pa  # a reward worker that imports this module has no use for it
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer)
        path = self.path / "samples" / f"step_{step}.parquet"
        with storing(path):
            hit("samples.write")
        _write(path, buffer.getvalue().to_pybytes())

    def truncate_after(self, step: int | None) -> None:
        """Cut metrics, samples and traces of later steps, and lines a crash tore, so that each step stands there once.

        None: of all steps, and what came before the first; the run starts over.
        """
        for path in (self.path / "metrics").glob("*.jsonl"):
            with storing(path):
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _is_up_to(line, step, name=path.stem)]
            if kept != lines:
                _write(path, "".join(kept).encode())
        for path in (*self.path.glob("samples/step_*.parquet"), *self.path.glob("trace/step_*.json.gz")):
            if step is None or int(path.name.removeprefix("step_").partition(".")[0]) > step:
                with storing(path):
                    path.unlink()

    def write_exit(self, code: int, reason: str) -> None:
        """EXIT.json and the final STATUS.json: how this attempt ended."""
        _write_json(self.path / "EXIT.json", {"code": code, "reason": reason, "attempt": self.attempt, "time": now()})
        self.write_status(state="done" if code == 0 else "stopped", exit_code=code, reason=reason)
        self.append_event("exit", code=code, reason=reason)


def read_status(path: Path) -> dict[str, Any]:
    """STATUS.json, and "alive": whether a process holds the run directory. Takes no lasting lock."""
    require_run(path)
    status = _read_json(path / "STATUS.json")
    with storing(path / ".lock", verb="read"):
        lock = os.open(path / ".lock", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return status | {"alive": True}
    finally:
        os.close(lock)
    return status | {"alive": False}


def require_run(path: Path) -> None:
    """Raise PreflightError unless the path is a run directory."""
    if not (path / "config" / "resolved.yaml").is_file() or not (path / "STATUS.json").is_file():
        raise PreflightError(f"{path} is not a run directory; `paceline train CONFIG` makes one under runs/")


def now() -> str:
    """The time, UTC, to the millisecond, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def storing(path: Path, *, verb: str = "write") -> Iterator[None]:
    """Turn an OSError inside into a StorageError that names path, reason and, on a full disk, the free bytes."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            reason += f" ({shutil.disk_usage(folder).free} bytes free); free some, or set another run.dir"
        raise StorageError(f"cannot {verb} {path}: {reason}") from error


def _claim(config: Config) -> Path:
    """Make the folder for a new run."""
    if config.run.dir:
        path = Path(config.run.dir).expanduser()
        with storing(path, verb="create"):
            path.mkdir(parents=True, exist_ok=True)
            taken = any(path.iterdir())
        if taken:
            if (path / ".lock").exists():
                os.close(_take_lock(path))  # in use is the better reason
            remedy = f"`paceline resume {path}` goes on with it, or set another run.dir"
            raise PreflightError(f"run directory {path} already exists and is not empty; {remedy}")
        return path
    stem = f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in itertools.count(1):  # runs of one sweep start within a second
        path = Path("runs") / (stem if suffix == 1 else f"{stem}-{suffix}")
        with storing(path, verb="create"):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
        return path
    raise AssertionError("unreachable")


def _take_lock(path: Path) -> int:
    """The file descriptor of RUN/.lock, locked until it is closed or this process ends."""
    with storing(path / ".lock"):
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            holder = os.pread(lock, 32, 0).decode().strip() or "unknown"
            os.close(lock)
            raise PreflightError(
                f"run directory {path} is in use by process {holder}; stop it first, or set another run.dir"
            ) from None
    with storing(path / ".lock"):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _is_up_to(line: str, step: int | None, *, name: str) -> bool:
    """Whether a metrics line belongs to a step that is not done again."""
    try:
        own_step = json.loads(line)["step"]
    except json.JSONDecodeError:
        return False
    return step is not None and (name in _BEFORE_TRAINING or own_step <= step)


def _write(path: Path, data: bytes) -> None:
    """Replace the file in one go: its old content stands until the new one is on the disk."""
    staged = path.with_name(f".{path.name}.partial")
    with storing(path):
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(_finite(redacted(value)), indent=2) + "\n").encode())


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line; one that a crash tore before it is ended first, so that it spoils nothing after it."""
    with storing(path), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(_finite(record)).encode() + b"\n")


def _read_json(path: Path) -> dict[str, Any]:
    with storing(path, verb="read"):
        text = path.read_text(encoding="utf-8")
    try:
        value: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise StorageError(f"{path} is not valid JSON ({error}); delete it and resume the run") from None
    return value


def _finite(value: Any) -> Any:
    """The value with null for numbers JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

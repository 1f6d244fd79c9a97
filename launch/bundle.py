"""`paceline bundle`: what someone needs to see of a run in order to help, in one file without secrets.

No weights, no samples and no data: configuration, environment, plan, status, events, metrics, logs and crash reports.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from configs.errors import PreflightError
from configs.redact import redact
from rl.rundir import storing

TAKEN = ("*.json", "events.jsonl", "config/*.yaml", "metrics/*.jsonl", "logs/*/*.log", "logs/*/*.json")
MAX_BYTES = 16 << 20  # of a file, its end: what happened last is what is asked about


def write_bundle(run: Path, out: Path) -> list[str]:
    """Write RUN's bundle to a file that does not exist yet; the names in it. Raises PreflightError and StorageError."""
    if out.exists():
        raise PreflightError(f"{out} exists; name another file with --out")
    staged = out.with_name(f".{out.name}.partial")
    root = run.resolve().name
    names, cut = [], []
    with storing(out):
        staged.unlink(missing_ok=True)  # of one that was killed, or a link that another user laid there
    try:
        with (
            storing(out),
            open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            tarfile.open(fileobj=file, mode="w:gz") as bundle,
        ):
            for path in taken(run):
                text, is_whole = read_end(path)
                name = path.relative_to(run).as_posix()
                names.append(name)
                cut += [] if is_whole else [name]
                add(bundle, f"{root}/{name}", redact(text), modified=path.stat().st_mtime)
            about = {"run": root, "files": names, "cut_to_their_last_bytes": cut, "max_bytes": MAX_BYTES}
            add(bundle, f"{root}/BUNDLE.json", json.dumps(about, indent=2) + "\n", modified=0)
        with storing(out):
            staged.rename(out)
    finally:
        staged.unlink(missing_ok=True)
    return names


def taken(run: Path) -> Iterator[Path]:
    """The files of the run that belong in a bundle; nothing that a link leads to."""
    root = run.resolve()
    for pattern in TAKEN:
        for path in sorted(run.glob(pattern)):
            if path.is_file() and path.resolve() == root / path.relative_to(run):
                yield path


def read_end(path: Path) -> tuple[str, bool]:
    """A text file, or the whole lines at its end that are not too much; whether that is all."""
    with storing(path, verb="read"), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_BYTES))
        data = file.read(MAX_BYTES)
    if size > MAX_BYTES:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", errors="replace"), size <= MAX_BYTES


def add(bundle: tarfile.TarFile, name: str, text: str, *, modified: float) -> None:
    """Put a text into the archive."""
    data = text.encode()
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), int(modified), 0o600
    bundle.addfile(info, io.BytesIO(data))

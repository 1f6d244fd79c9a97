"""Checkpoints that are whole or absent: staged, hashed, fsynced, renamed.

ROOT/step_N/ holds what the run put there and MANIFEST.json: the step, and the size and SHA-256 of every file.
A folder gets that name only when all of it is on the disk, so a process killed at any moment leaves the older
checkpoints as they were, and at worst a ROOT/.staging-* folder that the next start removes.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.errors import StorageError

MANIFEST = "MANIFEST.json"
STAGING = ".staging-"

log = logging.getLogger(__name__)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    prefix, _, number = path.name.partition("_")
    assert prefix == "step" and number.isdecimal(), f"{path} is not a checkpoint folder"
    return int(number)


class CheckpointStore:
    """The checkpoints under one folder, the newest `keep` of them."""

    def __init__(self, root: Path, keep: int) -> None:
        assert keep > 0, keep
        self.root = root
        self.keep = keep
        self.clean()

    def write(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Have fill write files into an empty folder, make that the checkpoint of the step, drop those beyond keep.

        A step that has a sound checkpoint keeps it. Raises StorageError, nothing changed, when the disk refuses.
        """
        final = self.root / f"step_{step}"
        if final.exists():
            if is_sound(final):
                return final
            set_aside(final)
        staging = self.root / f"{STAGING}{final.name}"
        try:
            staging.mkdir(parents=True)
            fill(staging)
            seal(staging, step)
            os.rename(staging, final)
            fsync(self.root)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise _storage_error(final, error) from error
            raise
        self._prune()
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint whose files match their hashes; those that do not are renamed step_N.corrupt."""
        for path in reversed(self._checkpoints()):
            if is_sound(path):
                return path
            aside = set_aside(path)
            log.warning("checkpoint %s does not match its hashes; kept as %s, trying an older one", path, aside.name)
        return None

    def clean(self) -> None:
        """Remove what an interrupted write or removal left behind."""
        for leftover in self.root.glob(f"{STAGING}*"):
            shutil.rmtree(leftover)

    def _checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted((path for path in self.root.glob("step_*") if path.name[5:].isdecimal()), key=step_of)

    def _prune(self) -> None:
        """Remove all but the newest; under another name first, so that half of one never looks like a checkpoint."""
        for path in self._checkpoints()[: -self.keep]:
            doomed = path.with_name(f"{STAGING}old-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def seal(folder: Path, step: int) -> None:
    """Write the manifest of everything in the folder, and put files and folders on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "step": step,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(path)


def is_sound(folder: Path) -> bool:
    """Whether every file the manifest lists is there, whole and unchanged."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(
            (folder / name).stat().st_size == entry["bytes"] and sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint so that nothing takes it for one, and return its new path."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.corrupt{number or ''}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises OSError, which safetensors hides in an error of its own."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    """What went wrong and what to do about it, in one line."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot write checkpoint {path}: {reason}; check that run.dir is writable")
    home = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(home).free
    return StorageError(
        f"cannot write checkpoint {path}: {reason} ({free:,} bytes free); "
        "free some space, lower checkpoint.keep, or set run.dir to another disk, then resume"
    )

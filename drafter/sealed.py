"""Folders that are whole or known not to be: a manifest of sizes and hashes, and everything on the disk."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.errors import StorageError
from configs.faults import hit

MANIFEST = "MANIFEST.json"
STAGING = ".staging-"  # what a folder is called until it is whole


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of everything in the folder, facts first, and put files and folders on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = facts | {
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
        },
    }
    hit("checkpoint.manifest")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(path)


def is_sound(folder: Path) -> bool:
    """Whether every file the manifest lists is there, whole and unchanged."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(
            (folder / name).resolve().is_relative_to(folder.resolve())  # a manifest may come from anywhere
            and (folder / name).stat().st_size == entry["bytes"]
            and sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Put a file, or a folder's list of names, on the disk."""
    hit("checkpoint.fsync")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises OSError, which safetensors hides in an error of its own."""
    hit("checkpoint.file")
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def storage_error(path: Path, error: OSError) -> StorageError:
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


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    prefix, _, number = folder.name.partition("_")
    assert prefix == "step" and number.isdecimal(), f"{folder} is not a checkpoint folder"
    return int(number)


def step_folders(root: Path) -> list[Path]:
    """Folders root/step_N, oldest first."""
    return sorted((path for path in root.glob("step_*") if path.name[5:].isdecimal()), key=step_of)


def newest(root: Path) -> Path | None:
    """The newest whole folder root/step_N, None where there is none. Changes nothing."""
    return next((folder for folder in reversed(step_folders(root)) if is_sound(folder)), None)

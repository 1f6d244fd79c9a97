"""Checkpoints that are whole or absent: staged, hashed, fsynced, renamed.

ROOT/step_N/ holds what the run put there and MANIFEST.json: the step, and the size and SHA-256 of every file.
A folder gets that name only when all of it is on the disk, so a process killed at any moment leaves the older
checkpoints as they were, and at worst a ROOT/.staging-* folder that the next start removes.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from configs.faults import hit
from drafter.sealed import STAGING, fsync, seal, step_folders, storage_error
from drafter.sealed import is_sound as is_sound
from drafter.sealed import step_of as step_of
from drafter.sealed import write_tensors as write_tensors

log = logging.getLogger(__name__)


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
            hit("checkpoint.stage")
            staging.mkdir(parents=True)
            fill(staging)
            seal(staging, step=step)
            hit("checkpoint.rename")
            os.rename(staging, final)
            fsync(self.root)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise storage_error(final, error) from error
            raise
        self._prune()
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint whose files match their hashes; those that do not are renamed step_N.corrupt."""
        for path in reversed(step_folders(self.root)):
            if is_sound(path):
                return path
            aside = set_aside(path)
            log.warning("checkpoint %s does not match its hashes; kept as %s, trying an older one", path, aside.name)
        return None

    def clean(self) -> None:
        """Remove what an interrupted write or removal left behind."""
        for leftover in self.root.glob(f"{STAGING}*"):
            hit("checkpoint.clean")
            shutil.rmtree(leftover)

    def _prune(self) -> None:
        """Remove all but the newest; under another name first, so that half of one never looks like a checkpoint.

        What cannot be removed takes room, no more: the newest is whole, and the run goes on.
        """
        for path in step_folders(self.root)[: -self.keep]:
            doomed = path.with_name(f"{STAGING}old-{path.name}")
            try:
                hit("checkpoint.clean")
                os.rename(path, doomed)
                hit("checkpoint.clean")
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("checkpoint %s could not be removed and takes room: %s", path.name, error)


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint so that nothing takes it for one, and return its new path."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.corrupt{number or ''}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside

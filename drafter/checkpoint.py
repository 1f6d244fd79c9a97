"""The drafter's checkpoints: its own tensors alone, written by a thread while training goes on.

FOLDER/drafter.json           the record: shape of the head, version served, steps trained, failures, why it is off
       served.safetensors     the head as it is served, under its export names; absent before the first is published
       last_good.safetensors  the head served before it, which is served again should this one turn out worse
       training.safetensors   the trained copy and its optimiser's moments
       MANIFEST.json          sizes and hashes
The policy's tensors, its embedding among them, are never in it.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file

from configs.errors import StorageError
from configs.faults import hit
from drafter.sealed import STAGING, fsync, is_sound, seal, storage_error, write_tensors

RECORD = "drafter.json"
SUFFIX = ".safetensors"
# the only memory that is pinned: to pin the 4.8 GB of an 8B policy's drafter held an update up by a second on an H100
PIECE_BYTES = 1 << 24
WRITE_S = 1800.0  # a head of 2 GB at 1 MB/s: a disk that is slower does not answer

Tensors = Mapping[str, torch.Tensor]


class CheckpointWriter:
    """Writes one checkpoint at a time. The caller is held up while copies are enqueued, no longer.

    A GPU's tensors are copied where they are, at the speed of its memory; the writing thread fetches them on a stream
    of its own, beside what the caller computes.
    """

    def __init__(self) -> None:
        self._piece: torch.Tensor | None = None  # what fetched bytes pass through
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, folder: Path, files: Mapping[str, Tensors], record: Mapping[str, Any]) -> float:
        """Start to write a folder that will appear when it is whole; returns the seconds this call took.

        files: tensors by file, without its suffix. What is on the device now is written, whatever overwrites it later
        on this stream. Raises StorageError where the checkpoint before could not be written.
        """
        start = perf_counter()
        self.wait()
        copies = {file: _copy(tensors) for file, tensors in files.items()}
        copied = None
        if any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values()):
            copied = torch.cuda.Event()
            copied.record()
        self._thread = threading.Thread(target=self._write, args=(folder, copies, dict(record), copied), daemon=True)
        self._thread.start()
        return perf_counter() - start

    @property
    def writing(self) -> bool:
        """Whether what was begun is still on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises StorageError where it could not be written."""
        if self._thread is not None:
            self._thread.join(WRITE_S)
            if self._thread.is_alive():
                raise StorageError(f"the disk has not taken the drafter's checkpoint for {WRITE_S:g} s; see to run.dir")
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _fetch(self, copies: dict[str, dict[str, torch.Tensor]], copied: torch.cuda.Event) -> None:
        """Put host memory in the place of what lies on the GPU, once it has been copied there."""
        (device,) = {tensor.device for tensors in copies.values() for tensor in tensors.values() if tensor.is_cuda}
        if self._piece is None:
            self._piece = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.Stream(device)
        stream.wait_event(copied)
        with torch.cuda.stream(stream):
            for tensors in copies.values():
                for name, copy in tensors.items():
                    if copy.is_cuda:
                        tensors[name] = fetched(copy, self._piece, stream.synchronize)

    def _write(
        self,
        folder: Path,
        copies: dict[str, dict[str, torch.Tensor]],
        record: dict[str, Any],
        copied: torch.cuda.Event | None,
    ) -> None:
        staging = folder.with_name(f"{STAGING}{folder.name}")
        try:
            if copied is not None:
                self._fetch(copies, copied)
            shutil.rmtree(staging, ignore_errors=True)  # of an interrupted write
            staging.mkdir(parents=True)
            for file, tensors in copies.items():
                write_tensors(staging / f"{file}{SUFFIX}", tensors)
            hit("checkpoint.file")
            (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            seal(staging)
            shutil.rmtree(folder, ignore_errors=True)
            hit("checkpoint.rename")
            os.rename(staging, folder)
            fsync(folder.parent)
        except Exception as error:  # handed to the next begin or wait: a thread has nobody else to tell
            shutil.rmtree(staging, ignore_errors=True)
            self._error = storage_error(folder, error) if isinstance(error, OSError) else error


def fetched(tensor: torch.Tensor, piece: torch.Tensor, arrived: Callable[[], None]) -> torch.Tensor:
    """The tensor on the host, contiguous, through piece [S] uint8, which holds what was sent once arrived returns."""
    source = tensor.contiguous().reshape(-1).view(torch.uint8)
    target = torch.empty(tensor.shape, dtype=tensor.dtype)
    to = target.reshape(-1).view(torch.uint8)
    for start in range(0, len(source), len(piece)):
        part = source[start : start + len(piece)]
        piece[: len(part)].copy_(part, non_blocking=True)
        arrived()
        to[start : start + len(part)].copy_(piece[: len(part)])
    return target


def _copy(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """The record, and tensors by file as begin was given them. Raises StorageError where the folder is not whole."""
    if not is_sound(folder):
        raise StorageError(f"{folder} holds no drafter checkpoint that matches its hashes; take an older one")
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return record, {path.name.removesuffix(SUFFIX): load_file(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}

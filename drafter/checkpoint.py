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
from collections.abc import Mapping
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
WRITE_S = 1800.0  # a head of 2 GB at 1 MB/s: a disk that is slower does not answer

Tensors = Mapping[str, torch.Tensor]


class CheckpointWriter:
    """Writes one checkpoint at a time. The caller is held up while copies are enqueued, no longer.

    A GPU's tensors are copied where they are, at the speed of its memory; the writing thread fetches them on a stream
    of its own, beside what the caller computes, into pinned memory, which is kept for the next ones.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
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
        stream = torch.cuda.Stream(device)
        stream.wait_event(copied)
        with torch.cuda.stream(stream):
            fetched = {
                (file, name): self._buffer(file, name, copy).copy_(copy, non_blocking=True)
                for file, tensors in copies.items()
                for name, copy in tensors.items()
                if copy.is_cuda
            }
        stream.synchronize()  # no copy on the device is let go of before
        for (file, name), tensor in fetched.items():
            copies[file][name] = tensor

    def _buffer(self, file: str, name: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[file, name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return buffer

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


def _copy(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """The record, and tensors by file as begin was given them. Raises StorageError where the folder is not whole."""
    if not is_sound(folder):
        raise StorageError(f"{folder} holds no drafter checkpoint that matches its hashes; take an older one")
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return record, {path.name.removesuffix(SUFFIX): load_file(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}

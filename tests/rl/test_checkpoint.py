import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import drafter.sealed
from configs.errors import StorageError
from rl.checkpoint import CheckpointStore, step_of, write_tensors


class Killed(BaseException):
    """The process dies here: no handler for errors runs."""


def fill_with(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "trainer").mkdir()
        (folder / "trainer" / "params").write_text(text * 100)
        (folder / "loop.json").write_text(text)

    return fill


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def test_written_checkpoint_is_the_latest_with_its_files_and_manifest(store: CheckpointStore) -> None:
    assert store.latest() is None
    path = store.write(3, fill_with("three"))
    assert (store.latest(), step_of(path)) == (path, 3)
    assert (path / "trainer" / "params").read_text() == "three" * 100
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["step"] == 3
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "loop.json": 5,
        "trainer/params": 500,
    }


def test_only_the_newest_are_kept_counted_not_spelt(store: CheckpointStore) -> None:
    for step in (8, 9, 10):
        store.write(step, fill_with(str(step)))
    assert names(store) == ["step_10", "step_9"]


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "no manifest", "bad manifest"])
def test_damaged_checkpoint_is_set_aside_for_an_older_one(
    store: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.write(1, fill_with("one"))
    newest = store.write(2, fill_with("two"))
    file, manifest = newest / "trainer" / "params", newest / "MANIFEST.json"
    match damage:
        case "changed":
            file.write_text("owt" * 100)
        case "shorter":
            file.write_text("two")
        case "missing":
            file.unlink()
        case "no manifest":
            manifest.unlink()
        case "bad manifest":
            manifest.write_text(manifest.read_text()[:-9])
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest is not None and step_of(latest) == 1
    assert "step_2.corrupt" in caplog.text
    assert names(store) == ["step_1", "step_2.corrupt"]
    assert store.write(2, fill_with("again")).name == "step_2"


def test_manifest_that_names_a_file_elsewhere_is_not_believed(store: CheckpointStore) -> None:
    newest = store.write(1, fill_with("one"))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    entry = manifest["files"].pop("loop.json")
    (newest / "loop.json").rename(store.root / "loop.json")
    (newest / "MANIFEST.json").write_text(json.dumps(manifest | {"files": {"../loop.json": entry}}))
    assert store.latest() is None


def test_checkpoint_that_cannot_be_removed_ends_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    store.write(1, fill_with("one"))
    store.write(2, fill_with("two"))
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        newest = store.write(3, fill_with("three"))
    assert store.latest() == newest
    assert "step_1 could not be removed" in caplog.text
    monkeypatch.undo()
    assert names(CheckpointStore(store.root, keep=2)) == ["step_2", "step_3"]


def test_step_that_has_a_sound_checkpoint_keeps_it(store: CheckpointStore) -> None:
    path = store.write(1, fill_with("first"))
    assert store.write(1, fill_with("second")) == path
    assert (path / "loop.json").read_text() == "first"


def calls_that_change_the_disk(monkeypatch: pytest.MonkeyPatch, die_at: int) -> Iterator[int]:
    """Patch every write, fsync, rename and removal of rl.checkpoint to die at its die_at-th call; count them."""
    count = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == die_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    while True:
        yield count


def test_kill_at_any_write_leaves_a_loadable_latest(tmp_path: Path) -> None:
    survived = False
    for die_at in range(1, 100):
        root = tmp_path / str(die_at)
        root.mkdir()
        store = CheckpointStore(root, keep=1)
        store.write(1, fill_with("one"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            counter = calls_that_change_the_disk(monkeypatch, die_at)
            next(counter)
            try:
                store.write(2, fill_with("two"))
            except Killed:
                pass
            else:
                survived = next(counter) < die_at
        restarted = CheckpointStore(root, keep=1)
        latest = restarted.latest()
        assert latest is not None, f"nothing left after dying at call {die_at}"
        text = {1: "one", 2: "two"}[step_of(latest)]
        assert (latest / "trainer" / "params").read_text() == text * 100
        assert all(name in ("step_1", "step_2") for name in names(restarted))
        if survived:
            break
    assert survived and die_at > 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_refusing_disk_changes_nothing_and_says_what_to_do(store: CheckpointStore, number: int) -> None:
    older = store.write(1, fill_with("one"))

    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageError) as caught:
        store.write(2, fill)
    assert str(store.root / "step_2") in str(caught.value) and "\n" not in str(caught.value)
    assert ("bytes free" in str(caught.value)) == (number == errno.ENOSPC)
    assert names(store) == ["step_1"] and store.latest() == older


def test_bug_while_filling_is_not_dressed_as_a_storage_error(store: CheckpointStore) -> None:
    def fill(folder: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        store.write(1, fill)
    assert names(store) == []


def test_full_disk_under_safetensors_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "missing" / "x.safetensors", {"x": torch.zeros(2)})
    monkeypatch.setattr(drafter.sealed, "save_file", save_file)
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC

"""The drafter's checkpoints: whole or absent, written beside the training they belong to."""

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import drafter.checkpoint
from configs.errors import StorageError
from drafter.checkpoint import CheckpointWriter, fetched, read
from drafter.sealed import newest


def files() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "served": {"fc.weight": torch.randn(4, 12).bfloat16(), "d2t": torch.arange(7)},
        "training": {"fc.weight": torch.randn(4, 12), "exp_avg.fc.weight": torch.randn(4, 12)},
    }


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    writer, saved = CheckpointWriter(), files()
    stall_s = writer.begin(tmp_path / "step_3", saved, {"version": 2})
    writer.wait()
    record, loaded = read(tmp_path / "step_3")
    assert record == {"version": 2} and loaded.keys() == saved.keys() and stall_s > 0
    for file, tensors in saved.items():
        assert loaded[file].keys() == tensors.keys()
        assert all(torch.equal(loaded[file][name], tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3"]


def test_training_goes_on_while_the_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    write = drafter.checkpoint.write_tensors

    def held_up(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert go_on.wait(timeout=60)
        write(path, tensors)

    monkeypatch.setattr(drafter.checkpoint, "write_tensors", held_up)
    writer, weight = CheckpointWriter(), torch.zeros(4)
    for step in (1, 2, 3):
        go_on.clear()
        weight.fill_(step)
        writer.begin(tmp_path / f"step_{step}", {"training": {"w": weight}}, {})
        weight.zero_()  # the next update
        assert not (tmp_path / f"step_{step}").exists()
        go_on.set()
        writer.wait()
        assert torch.equal(read(tmp_path / f"step_{step}")[1]["training"]["w"], torch.full((4,), float(step)))


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 9),
    st.booleans(),
)
def test_what_passes_in_pieces_arrives_whole(dtype: torch.dtype, shape: list[int], size: int, turned: bool) -> None:
    tensor = torch.randint(0, 2 if dtype == torch.bool else 99, shape).to(dtype)
    tensor = tensor.mT if turned and len(shape) > 1 else tensor
    waits: list[int] = []
    whole = fetched(tensor, torch.full((size,), 255, dtype=torch.uint8), lambda: waits.append(1))
    assert torch.equal(whole, tensor) and whole.dtype == dtype and whole.is_contiguous()
    assert len(waits) == -(-tensor.nbytes // size), "each piece is waited for"


@pytest.mark.gpu
def test_what_training_overwrites_on_the_gpu_is_not_what_is_written(tmp_path: Path) -> None:
    writer, weight = CheckpointWriter(), torch.zeros(1 << 22, device="cuda")
    for step in (1, 2, 3):
        weight.fill_(step)
        writer.begin(tmp_path / f"step_{step}", {"training": {"w": weight, "on_host": torch.ones(2)}}, {})
        for _ in range(20):  # updates, and memory that is asked for again while copies are on their way
            weight.add_(torch.full_like(weight, 7.0))
        writer.wait()
        written = read(tmp_path / f"step_{step}")[1]["training"]
        assert bool((written["w"] == step).all()) and torch.equal(written["on_host"], torch.ones(2))


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    for step in (9, 10):
        writer.begin(tmp_path / f"step_{step}", files(), {"version": step})
    writer.wait()
    record = tmp_path / "step_10" / "drafter.json"
    record.write_text(json.dumps({"version": 1}))
    assert newest(tmp_path) == tmp_path / "step_9"
    with pytest.raises(StorageError, match="step_10"):
        read(tmp_path / "step_10")
    assert newest(tmp_path / "nothing") is None


def test_a_refusing_disk_is_told_to_the_next_who_asks_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    writer = CheckpointWriter()
    writer.begin(blocked / "step_1", files(), {})
    with pytest.raises(StorageError, match="step_1"):
        writer.wait()
    writer.begin(tmp_path / "step_2", files(), {})
    writer.wait()
    assert newest(tmp_path) == tmp_path / "step_2"

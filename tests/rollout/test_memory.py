"""Memory is what the machine has and what its control group leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout import memory
from rollout.engine import NativeEngine
from rollout.memory import available_bytes, cache_budget, memory_limit


@pytest.fixture
def control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    return tmp_path


def test_without_a_control_group_or_a_limit_the_machine_counts(control_group: Path) -> None:
    machine = memory_limit()
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert machine == int(total.split()[1]) * 1024
    (control_group / "memory.max").write_text("max\n")
    (control_group / "memory.current").write_text("1000\n")
    assert memory_limit() == machine
    assert 1000 < available_bytes("cpu") <= machine


def test_a_control_group_bounds_what_there_is_and_what_is_left(control_group: Path) -> None:
    (control_group / "memory.max").write_text("1000000\n")
    (control_group / "memory.current").write_text("400000\n")
    assert memory_limit() == 1_000_000
    assert available_bytes("cpu") == 600_000
    assert cache_budget("cpu") == 250_000


def test_the_engine_affords_a_cache_within_the_control_group(
    control_group: Path, make_engine: Callable[..., NativeEngine]
) -> None:
    (control_group / "memory.max").write_text(f"{4 * 9 * make_engine()._workspace._bytes_per_block()}\n")
    assert make_engine()._workspace._affordable_blocks() == 9


@pytest.mark.parametrize(("kept", "halved"), [(0, 500), (400, 700)])
def test_half_of_what_is_left_of_a_gpu_may_be_cache_and_what_torch_keeps_for_later_is_left_too(
    kept: int, halved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 2100)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 2100 + kept)
    assert available_bytes("cuda") == 1000 + kept
    assert cache_budget("cuda:0") == halved
    assert cache_budget("cuda:0", reserved=200) == halved - 100
    assert cache_budget("cuda", reserved=2000) == 0

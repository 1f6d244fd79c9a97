"""Room for workers on a machine, before anything is started."""

import os
from pathlib import Path

import pytest

from configs.errors import ResourceError
from configs.load import parse
from launch import room
from launch.room import num_cpus, require_room, shortage

RAY = ["compute.backend=ray", "compute.workers=2"]
SEPARATE = [*RAY, "compute.placement=separate", "compute.rollout_workers=3"]


def test_what_a_cluster_has_too_little_of_is_counted() -> None:
    each = {"CPU": 1.0, "GPU": 1.0}
    assert shortage({"CPU": 16.0, "GPU": 2.0, "memory": 1e9}, each, 2) == ""
    assert shortage({"CPU": 2.0}, each, 3) == "3 CPUs and there are 2, 3 GPUs and there are 0"


@pytest.mark.parametrize(
    ("options", "cpus", "said"),
    [
        ([], 1, ""),
        (RAY, 2, ""),
        (RAY, 1, "compute.workers=2 need 2 CPUs and there are 1 on this machine; ask for fewer"),
        (SEPARATE, 5, ""),
        (SEPARATE, 4, "compute.workers=2 and compute.rollout_workers=3 need 5 CPUs and there are 4 on this machine"),
    ],
)
def test_workers_that_a_machine_cannot_hold_are_refused_unless_there_is_a_cluster(
    options: list[str], cpus: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse("data: {name: chain_sum}", options)
    monkeypatch.setattr(room, "num_cpus", lambda: cpus)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if said:
        with pytest.raises(ResourceError, match=said):
            require_room(config, device="cpu")
    else:
        require_room(config, device="cpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    require_room(config, device="cpu")


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cpus_are_those_that_the_control_group_leaves(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(room, "CONTROL_GROUP", tmp_path)
    monkeypatch.delenv("RAY_USE_MULTIPROCESSING_CPU_COUNT", raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert num_cpus() == cpus
    monkeypatch.setenv("RAY_USE_MULTIPROCESSING_CPU_COUNT", "1")
    assert num_cpus() == 8

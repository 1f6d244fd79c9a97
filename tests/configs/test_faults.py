"""Faults on demand: what the variable may say, and when they happen."""

import errno
import os
from collections.abc import Iterator

import pytest
import torch

from configs import faults
from configs.errors import ConfigError


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm("")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nowhere:1:kill", "nowhere"),
        ("train.backward:1:explode", "explode"),
        ("train.backward:0:kill", "nth='0'"),
        ("train.backward:many:kill", "many"),
        ("train.backward@me:1:kill", "@me"),
        ("rollout.cycle:1:nan", "train.backward and drafter.step"),
        ("train.backward:kill", "train.backward:kill"),
    ],
)
def test_what_is_no_fault_is_refused_with_what_there_is(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match="PACELINE_FAULT") as caught:
        faults.arm(text)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_worker_that_a_run_has_not_is_refused_by_its_number() -> None:
    faults.arm("train.backward@1:1:kill,rollout.cycle@driver:1:kill,data.load:1:raise")
    faults.require_processes(2)
    with pytest.raises(ConfigError, match=r"PACELINE_FAULT: @1 is nobody here; .* workers 0 to 0, and driver"):
        faults.require_processes(1)
    with pytest.raises(ConfigError, match="no workers, and driver"):
        faults.require_processes(0)
    faults.arm("")
    faults.require_processes(0)


def test_a_fault_happens_at_its_hit_of_its_point_in_its_process_alone() -> None:
    faults.arm("train.backward@1:2:raise", process="1")
    faults.hit("drafter.step")
    assert faults.hit("train.backward") is None
    with pytest.raises(faults.FaultError, match=r"train\.backward, hit 2, in 1"):
        faults.hit("train.backward")
    assert faults.hit("train.backward") is None
    assert faults.counts() == {"drafter.step": 1, "train.backward": 3}
    faults.arm("train.backward@1:1:raise", process="0")
    assert faults.hit("train.backward") is None


def test_after_a_recovery_only_what_goes_on_happening_does() -> None:
    faults.arm("train.backward:1:nan,drafter.step:2+:nan", recovery=1)
    assert faults.hit("train.backward") is None
    assert [faults.hit("drafter.step") for _ in range(3)] == [None, "nan", "nan"]


def test_a_full_disk_and_exhausted_memory_are_raised_as_the_system_raises_them() -> None:
    faults.arm("metrics.append:1:enospc,graph.capture:1:oom")
    with pytest.raises(OSError) as caught:
        faults.hit("metrics.append")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(torch.OutOfMemoryError):
        faults.hit("graph.capture")


def test_without_the_variable_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.arm()
    assert faults.hit("train.backward") is None
    assert not faults.counts()
    assert faults.VARIABLE not in os.environ

"""`paceline bench idle` before its workers start."""

import pytest
import torch

from configs.errors import ResourceError
from launch import bench_idle

JOB = bench_idle.Job("tiny", None, running=1, prompt_len=4, new_tokens=4, batch_tokens=8, rounds=1, seed=0)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a single GPU, and no cluster."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("one_gpu")
def test_one_gpu_is_too_few_and_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_idle, "start_actors", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(ResourceError, match="2 workers .* sees 1 here.*--device cpu"):
        bench_idle.run(JOB, device="auto", dtype="auto")


@pytest.mark.usefixtures("one_gpu")
def test_a_cluster_and_a_cpu_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_idle.check_devices("cpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    bench_idle.check_devices("cuda")

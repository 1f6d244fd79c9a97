"""TensorBoard and Weights & Biases hold what the run's files hold."""

import threading
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launch.monitor import sinks
from launch.monitor.sinks import feed, require_sinks, tagged


def over() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return [(int(event.step), float(found_value(event))) for event in found.Tensors(tag)]


def found_value(event) -> float:
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(event.tensor_proto).item()


def test_tensorboard_holds_every_step(written) -> None:
    for step in (1, 2, 3):
        written.step(step)
    feed(written.path, ["tensorboard"], over())
    feed(written.path, ["tensorboard"], over())  # again: written anew, not twice
    assert dict(scalars(written.path / "tensorboard", "reward/mean")) == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert [step for step, _ in scalars(written.path / "tensorboard", "seconds/rollout")] == [1, 2, 3]


def test_steps_done_again_replace_the_first_ones(written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "POLL_S", 0.02)
    seen: list[str] = []

    class Notebook:
        def restart(self) -> None:
            seen.append("restart")
            restarted.set()

        def write(self, step: int, numbers: dict[str, float]) -> None:
            seen.append(f"{step}: {numbers['reward/mean']}")
            if step == 2:
                wrote.set()

        def close(self) -> None:
            seen.append("close")

    wrote, restarted, stop = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(sinks, "make_sink", lambda name, reader: Notebook())
    written.step(1)
    written.step(2)
    feeding = threading.Thread(target=feed, args=(written.path, ["tensorboard"], stop))
    feeding.start()
    assert wrote.wait(300)
    written.run.truncate_after(1)
    assert restarted.wait(300)
    written.step(2, reward_mean=0.9)
    stop.set()
    feeding.join(300)
    assert seen[:3] == ["1: 0.1", "2: 0.2", "restart"]
    # the run cuts its files one by one: a look in between finds the steps uncut as yet, and there is another restart
    last = len(seen) - seen[::-1].index("restart")
    assert seen[last:] == ["1: 0.1", "2: 0.9", "close"]


def test_wandb_keeps_an_offline_run(written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    written.step(1)
    written.step(2)
    feed(written.path, ["wandb"], over())
    (kept,) = (written.path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"reward/mean" in kept.read_bytes()


def test_wandb_without_a_login_says_what_to_do(written, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match="wandb: No API key configured. Or set WANDB_MODE=offline"):
        feed(written.path, ["wandb"], over())


def test_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'paceline\[wandb\]'"):
        require_sinks(["wandb"])
    with pytest.raises(ConfigError, match="none of tensorboard, wandb"):
        require_sinks(["mlflow"])


def test_tags_group_what_belongs_together() -> None:
    record = {
        "step": 3,
        "loss": 0.5,
        "seconds_rollout": 2.0,
        "seconds": 4.0,
        "drafter_version": 2,
        "drafter_off": "why",
    }
    assert tagged(record) == {"train/loss": 0.5, "seconds/rollout": 2.0, "train/seconds": 4.0, "drafter/version": 2.0}


def test_a_step_that_comes_while_the_sinks_are_made_is_written_though_the_run_is_over_by_then(
    written, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, seen = threading.Event(), []

    class Notebook:
        def write(self, step: int, numbers: dict[str, float]) -> None:
            seen.append(step)

        def close(self) -> None:
            """Nothing is kept."""

    def make(name: str, reader: object) -> Notebook:
        written.step(2)
        stop.set()
        return Notebook()

    monkeypatch.setattr(sinks, "make_sink", make)
    written.step(1)
    feed(written.path, ["tensorboard"], stop)
    assert seen == [1, 2]

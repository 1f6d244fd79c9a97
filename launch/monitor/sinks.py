"""A run's steps in TensorBoard and in Weights & Biases, written from its files beside it or after it."""

import hashlib
import shutil
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from configs.errors import ConfigError
from launch.monitor.reader import RunReader
from launch.monitor.tail import Record

SINKS = ("tensorboard", "wandb")
POLL_S = 1.0


class Sink(Protocol):
    """Somewhere that shows numbers over steps."""

    def restart(self) -> None:
        """What was written holds no more: a resumed run does its last steps again."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A step's numbers, by tag."""

    def close(self) -> None:
        """Everything is to be on the disk, or on its way."""


class TensorBoard:
    """Event files in RUN/tensorboard, written anew whenever a sink starts: they are a copy of the run's own files."""

    def __init__(self, path: Path) -> None:
        self._folder = path / "tensorboard"
        self._open()

    def restart(self) -> None:
        """Throw the event files away."""
        self._writer.close()
        self._open()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A scalar a number."""
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _open(self) -> None:
        from tensorboard.summary import Writer

        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = Writer(str(self._folder))


class WeightsAndBiases:
    """A run of the project "paceline", named after ours and kept in RUN/wandb; WANDB_MODE=offline sends nothing.

    It goes on under a resume, and keeps the first numbers it was given for a step.
    """

    def __init__(self, path: Path, *, config: Record, identity: str) -> None:
        """identity: of the run, the same in every attempt of it and in no other run of that name.

        Raises ConfigError where W&B refuses, as without a login.
        """
        import wandb

        self._wandb = wandb
        name = path.resolve().name
        mark = hashlib.sha256(identity.encode()).hexdigest()[:8]
        try:
            self._run = wandb.init(
                project="paceline", name=name, id=f"{name}-{mark}", dir=str(path), config=config, resume="allow"
            )
        except wandb.Error as error:
            raise ConfigError(f"wandb: {error} Or set WANDB_MODE=offline, which sends nothing.") from error
        self._last = 0

    def restart(self) -> None:
        """Nothing can be taken back; steps that are done again are the same."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """One line of its history."""
        if step > self._last:
            self._run.log(numbers, step=step)
            self._last = step

    def close(self) -> None:
        """Wait until all is sent, or stored where it is offline."""
        self._run.finish()
        self._wandb.teardown()  # its own process writes the file at its end


def require_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError where the package of one is not installed."""
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"sink {name!r} is none of {', '.join(SINKS)}")
        if find_spec(name) is None:
            raise ConfigError(f"the {name} sink needs a package that is not installed; pip install 'paceline[{name}]'")


def feed(path: Path, names: Sequence[str], until: threading.Event) -> None:
    """Write a run's steps to these sinks as they come, until told to stop; all that are there by then are written."""
    reader = RunReader(path)
    reader.poll()
    sinks = [make_sink(name, reader) for name in names]
    done = 0
    try:
        while True:
            over = until.is_set()  # before the look: what is there when it is set is seen
            _, cut = reader.poll()
            if cut:
                done = 0
                for sink in sinks:
                    sink.restart()
            for record in reader.steps[done:]:
                for sink in sinks:
                    sink.write(record["step"], tagged(record))
            done = len(reader.steps)
            if over:
                return
            until.wait(POLL_S)
    finally:
        for sink in sinks:
            sink.close()


def make_sink(name: str, reader: RunReader) -> Sink:
    """A sink by its name in SINKS."""
    if name == "tensorboard":
        return TensorBoard(reader.path)
    begun = str(reader.events[0]) if reader.events else ""  # the first attempt's line stays through all others
    return WeightsAndBiases(reader.path, config=reader.config, identity=begun)


def tagged(record: Record) -> dict[str, float]:
    """The numbers of a step's record under tags that both sinks group by what stands before the slash."""
    return {tag_of(name): float(value) for name, value in record.items() if name != "step" and is_number(value)}


def tag_of(name: str) -> str:
    """seconds_rollout becomes seconds/rollout, and so for drafter and reward; the rest is train."""
    head, _, rest = name.partition("_")
    return f"{head}/{rest}" if rest and head in ("seconds", "drafter", "reward") else f"train/{name}"


def is_number(value: Any) -> bool:
    """Whether a record's value is a number to show; null stands for one that is not finite."""
    return isinstance(value, int | float) and not isinstance(value, bool)

"""A kill at any write, fsync, rename or removal of a checkpoint: the newest whole one is taken up, bit for bit.

One process holds trainer, drafter and loop; a child forked from it begins the second save and is killed at one place.
Places are the points of configs.faults, and what Python's audit hooks tell of: files opened for writing, folders made,
names changed and removed.
"""

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs import faults
from configs.load import parse
from configs.schema import Config
from drafter.learner import Learner
from drafter.sealed import is_sound
from launch.cluster import make_lessons
from launch.drafting import make_drafting
from rl.batch import pack
from rl.checkpoint import CheckpointStore, step_of
from rl.loop import Loop
from rl.trainer import DeepSpeedTrainer
from rl.types import Group
from rollout.model import load_policy
from rollout.strategy import make_chooser
from rollout.types import Prompt, Rollout, SpecStats

POINTS = [point for point in faults.POINTS if point.startswith("checkpoint.")]
REMOVALS = ("os.remove", "os.rmdir")
EVENTS = ("open", "os.mkdir", "os.rename", *REMOVALS)
KEEP = 1  # so that the save removes the checkpoint before it, too


class Engine:
    """An engine whose state is a number."""

    version = 0

    def activity(self) -> list[Any]:
        return []

    def update(self, version: int) -> int:
        self.version = version
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version = state["version"]


class Subject:
    """A loop over a real trainer and a real drafter, which trains by batches of random groups."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.config = config(model)
        policy = load_policy(model, device="cpu", dtype="float32")
        self.trainer = DeepSpeedTrainer(policy, self.config.train, total_steps=8, temperature=1.0, device="cpu")
        chooser = make_chooser(self.config.spec, device="cpu", seed=0)
        learner = make_drafting(self.config, policy, chooser).learner
        assert learner is not None
        self.learner: Learner = learner
        self.learner.begin(torch.ones(policy.config.vocab_size, dtype=torch.int64))
        self.root = folder
        self.loop = self.make_loop()

    def make_loop(self) -> Loop:
        quiet = SimpleNamespace(phase=lambda name: None, message=print)
        run = SimpleNamespace(path=self.root, append_event=lambda *_, **__: None)
        return Loop(
            config=self.config,
            run=run,
            data=None,
            engine=Engine(),
            trainer=self.trainer,
            rewards=None,
            tokenizer=None,
            stop_token_ids=(),
            store=CheckpointStore(self.root / "checkpoints", keep=KEEP),
            progress=quiet,
            stop_requested=None,
            lessons=make_lessons(self.config, self.learner, Path(self.config.model)),
        )

    def advance(self) -> None:
        """One step of policy and drafter."""
        self.trainer.step(pack(groups(seed=self.loop.step)))
        with torch.no_grad():
            for value in self.learner._parameters().values():
                value += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(self.loop.step))
        self.loop.step += 1
        self.loop.engine.update(self.loop.step)

    def save(self) -> None:
        self.loop.save(self.loop.engine.state_dict())

    def restore(self) -> Path:
        """As a run that starts again does: clean up, find the newest whole checkpoint, take it up."""
        store = CheckpointStore(self.root / "checkpoints", keep=KEEP)
        newest = store.latest()
        assert newest is not None, "no checkpoint is left"
        self.loop = self.make_loop()
        self.loop.restore(newest)
        return newest

    def digest(self, again: Path) -> dict[str, str]:
        """What a checkpoint of the present state would hold, by file."""
        self.loop.store = CheckpointStore(again, keep=9)
        shutil.rmtree(again / f"step_{self.loop.step}", ignore_errors=True)
        self.save()
        folder = again / f"step_{self.loop.step}"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def groups(seed: int) -> list[Group]:
    """Two prompts with two random responses each."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for index in range(2):
        rollouts = []
        for sample in range(2):
            tokens = torch.randint(3, 250, (8,), generator=random).tolist()
            rollouts.append(Rollout(f"p{index}", sample, tokens, [-5.0] * 8, [(seed, 8)], "stop", SpecStats(1, 0, 0)))
        made.append(Group(Prompt(f"p{index}", [5, 6, 7], ""), rollouts, [0.0, 1.0], [-1.0, 1.0]))
    return made


def config(model: Path) -> Config:
    """ZeRO 0: a forked child has no threads for collectives."""
    options = {
        "data.name": "none",
        "compute.device": "cpu",
        "compute.dtype": "float32",
        "spec.source": "eagle",
        "drafter.draft_vocab": "100",
        "drafter.window": "16",
        "train.zero_stage": "0",
        "train.lr": "0.001",
    }
    return parse(f"model: {model}", [f"{key}={value}" for key, value in options.items()])


def in_child(do: Callable[[], None]) -> int:
    """Fork, do, and return how the child ended: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_hit(subject: Subject, point: str, nth: int) -> int:
    """A save in a child that is killed at this hit of a point."""

    def save() -> None:
        faults.arm(f"{point}:{nth}:kill")
        subject.save()

    sys.stderr.flush()
    return in_child(save)


def killed_at_event(subject: Subject, nth: int) -> int:
    """A save in a child that is killed just before its nth change of the disk that Python tells of."""
    root, count = str(subject.root), 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event != "open" or "r" not in str(args[1] or "r")
        # what shutil.rmtree removes is named from its folder
        if event in EVENTS and writes and (event in REMOVALS or str(args[0]).startswith(root)):
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    def save() -> None:
        sys.addaudithook(watch)
        subject.save()

    return in_child(save)


def snapshot(subject: Subject, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(subject.root, folder)


@pytest.fixture
def subject(tmp_path: Path, tiny_model_dir: Path) -> Subject:
    return Subject(tmp_path / "run", tiny_model_dir)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses a GPU cannot be forked")
def test_whatever_write_is_the_last_the_newest_whole_checkpoint_is_taken_up(subject: Subject, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a forked child has no others
    again = tmp_path / "again"
    expected: dict[int, dict[str, str]] = {}
    subject.advance()
    subject.save()
    before = tmp_path / "before"
    snapshot(subject, before)
    expected[1] = subject.digest(again)
    subject.advance()
    expected[2] = subject.digest(again)
    assert expected[1] != expected[2]

    def try_all(kill: Callable[[int], int]) -> list[int]:
        """Kill at every place, one after the other; the steps that were then taken up."""
        taken = []
        for nth in range(1, 1000):
            shutil.rmtree(subject.root)
            shutil.copytree(before, subject.root)
            subject.loop = subject.make_loop()
            subject.restore()
            subject.advance()
            code = kill(nth)
            if code == 0:
                return taken
            assert code == -signal.SIGKILL
            newest = subject.restore()
            assert is_sound(newest) and subject.digest(again) == expected[step_of(newest)], f"place {nth}"
            assert not list((subject.root / "checkpoints").glob(".staging-*"))
            taken.append(step_of(newest))
        raise AssertionError("a save has no thousand places")

    hits = {point: try_all(lambda nth, point=point: killed_at_hit(subject, point, nth)) for point in POINTS}
    events = try_all(lambda nth: killed_at_event(subject, nth))
    print({point: len(taken) for point, taken in hits.items()}, "audited:", len(events))
    assert all(hits.values()), f"points that a save never reaches: {[p for p, taken in hits.items() if not taken]}"
    # before the rename the old one, after it the new one, and never back
    assert events == sorted(events) and set(events) == {1, 2}
    assert set(hits["checkpoint.clean"]) == {2} and set(hits["checkpoint.stage"]) == {1}

"""Workers that cannot do without one another end together, and the error names the first, without a cluster."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from launch import pulse
from launch.adapters import lost
from launch.pulse import Life, Pulse

Answer = Callable[[int], Life | Exception]  # to the question of this number


class Worker:
    """A worker's handle: what it answers to each question, and whether it was killed."""

    def __init__(self, name: str, answer: Answer) -> None:
        self.name, self._answer = name, answer
        self.asked = 0
        self.killed = threading.Event()
        self.alive = SimpleNamespace(remote=self.next)

    def next(self) -> Any:
        self.asked += 1
        return [ray.exceptions.RayActorError() if self.killed.is_set() else self._answer(self.asked)]


def well(name: str) -> Worker:
    return Worker(name, lambda _: Life(name, "host", 1))


def dies(name: str) -> Worker:
    """After its second answer."""
    return Worker(name, lambda asked: Life(name, "host", 7) if asked < 3 else ray.exceptions.RayActorError())


def fails(name: str) -> Worker:
    """From its second answer on."""
    return Worker(name, lambda asked: Life(name, "host", 7, "" if asked < 2 else "KeyError: 3"))


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray of lists, whose one item is the answer or the error; no time passes between questions."""

    def wait(refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return list(refs), []

    def get(ref: list[Any]) -> Any:
        if isinstance(ref[0], Exception):
            raise ref[0]
        return ref[0]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda worker: worker.killed.set())
    monkeypatch.setattr(pulse, "ASK_S", 0.001)
    monkeypatch.setattr(pulse, "FAILED_S", 0.01)
    for known in ("_known", "_silent", "_ended_with"):
        monkeypatch.setattr(pulse, known, {})


def said(worker: Worker) -> str:
    """What whoever waits for a worker is told once it is gone."""
    return str(lost(SimpleNamespace(actor_id=worker.name)))


@pytest.mark.parametrize(("broken", "why"), [(dies, "died"), (fails, "failed (KeyError: 3)")])
def test_a_team_ends_with_the_first_of_its_ranks_which_is_named(broken: Callable[[str], Worker], why: str) -> None:
    workers = [well("trainer"), well("a"), broken("b"), well("c"), well("d")]
    watching = Pulse(workers, silence_s=600, teams=[(1, 2), (3, 4)])
    assert workers[1].killed.wait(60)
    watching.stop()
    assert [worker.killed.is_set() for worker in (workers[0], *workers[3:])] == [False] * 3
    assert said(workers[1]).startswith(f"worker 2, rank 1 of team 0 (process 7 on host) {why}")


def test_a_worker_of_no_team_is_gone_alone() -> None:
    workers = [dies("a"), well("b")]
    watching = Pulse(workers, silence_s=600)
    while workers[1].asked < 20:
        assert not workers[1].killed.is_set()
    watching.stop()
    assert not workers[1].killed.is_set()


def test_a_worker_is_known_as_soon_as_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[Sequence[Any]] = [[]]  # of the first look; of all others whoever was asked
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (answered.pop() if answered else list(refs), []))
    monkeypatch.setattr(pulse, "ASK_S", 600.0)
    watching = Pulse([well("a")], silence_s=600)
    while "a" not in pulse._known:
        assert watching._thread.is_alive()
    watching.stop()
    assert pulse.who("a") == ("worker 0", Life("a", "host", 1))

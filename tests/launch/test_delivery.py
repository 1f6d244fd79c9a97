"""Who is sent the policy, and when, without a cluster."""

from collections.abc import Sequence
from typing import Any

import pytest
import ray

from configs.errors import PreflightError, ResourceError
from launch.delivery import Delivery
from launch.fleet import Fleet, WorkerLostError
from rollout.transfer import StaleWeightsError, Transfer


class Actor:
    """A worker's handle, which answers at once. script: what a method raises, or returns, next."""

    def __init__(self, layout: str = "same") -> None:
        self.answers: dict[str, Any] = {"layout": layout, "listen": ("host", 1), "join": None, "receive": None}
        self.answers["send"] = Transfer(1, 1000, 7, 0.1)
        self.script: dict[str, list[Any]] = {}
        self.called: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)

    def times(self, method: str) -> int:
        return sum(name == method for name, _ in self.called)


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *args: Any) -> Any:
        self.actor.called.append((self.name, args))
        scripted = self.actor.script.get(self.name)
        return [scripted.pop(0) if scripted else self.actor.answers[self.name]]


class Trained:
    changes = 0


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray of lists, whose one item is the answer or the error."""

    def wait(refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return list(refs), []

    def get(ref: Any) -> Any:
        (answer,) = ref if len(ref) == 1 and not isinstance(ref[0], list) else ref[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)


def deliver(trainer: Actor, engines: list[Actor], *, others: tuple[Actor, ...] = ()) -> tuple[Delivery, Trained, Fleet]:
    trained, fleet = Trained(), Fleet([None for _ in engines], slots=1, learns=False, first=1)  # type: ignore[misc]
    made = Delivery([trainer, *others], engines, fleet, trained, device="cpu", bucket_bytes=64)
    return made, trained, fleet


def test_a_policy_that_has_not_changed_is_not_sent() -> None:
    trainer, engines = Actor(), [Actor(), Actor()]
    delivery, trained, _ = deliver(trainer, engines)
    assert delivery.bring(0) == 0
    assert not trainer.called
    trained.changes += 1
    assert delivery.bring(1) == 1000
    assert delivery.bring(1) == 0
    trained.changes += 1
    delivery.bring(2)
    assert [args for name, args in engines[1].called if name == "receive"] == [(1, 64), (2, 64)]
    assert engines[1].times("join") == trainer.times("join") == 1  # one group for both


def test_every_rank_of_a_team_receives_and_one_that_is_lost_takes_its_team() -> None:
    trainer, engines = Actor(), [Actor() for _ in range(4)]
    engines[1].script["receive"] = [WorkerLostError("rank 1 of team 0 died")]
    engines[3].script["receive"] = [StaleWeightsError("cut short")]
    fleet = Fleet([None, None], slots=1, learns=False, first=1, team=2)  # type: ignore[list-item]
    trained = Trained()
    delivery = Delivery([trainer], engines, fleet, trained, device="cpu", bucket_bytes=64)
    trained.changes += 1
    assert delivery.bring(1) == 1000
    assert list(fleet.lost) == [0] and fleet.number(1) == 3
    assert [each.times("receive") for each in engines] == [1, 1, 2, 2]
    worlds = [[args[1:3] for name, args in each.called if name == "join"] for each in engines]
    assert worlds == [[(1, 5)], [(2, 5)], [(3, 5), (1, 3)], [(4, 5), (2, 3)]]  # its rank, and of how many


def test_every_rank_of_the_trainers_takes_part() -> None:
    trainer, second, engine = Actor(), Actor(), Actor()
    second.answers["send"] = None
    delivery, trained, _ = deliver(trainer, [engine], others=(second,))
    trained.changes += 1
    delivery.bring(1)
    assert second.times("send") == 1 and second.times("join") == 0


def test_an_engine_lost_on_the_way_is_done_without() -> None:
    trainer, engines = Actor(), [Actor(), Actor(), Actor()]
    engines[1].script["receive"] = [WorkerLostError("it died")]
    engines[2].script["receive"] = [StaleWeightsError("cut short")]
    trainer.script["send"] = [StaleWeightsError("connection closed")]
    delivery, trained, fleet = deliver(trainer, engines)
    trained.changes += 1
    assert delivery.bring(1) == 1000
    assert list(fleet.lost) == [1]
    assert [each.times("receive") for each in engines] == [2, 1, 2]
    worlds = [args[1:3] for name, args in engines[2].called if name == "join"]
    assert worlds == [(3, 4), (2, 3)]  # its rank, and of how many


def test_trainers_that_cannot_send_end_the_run() -> None:
    trainer, engine = Actor(), Actor()
    engine.script["receive"] = [StaleWeightsError("cut short")]
    trainer.script["send"] = [WorkerLostError("the first trainer died")]
    delivery, trained, _ = deliver(trainer, [engine])
    trained.changes += 1
    with pytest.raises(WorkerLostError, match="the first trainer died"):
        delivery.bring(1)


def test_a_transfer_that_failed_is_made_again_over_a_new_group() -> None:
    trainer, engine = Actor(), Actor()
    engine.script["receive"] = [StaleWeightsError("checksum")]
    delivery, trained, fleet = deliver(trainer, [engine])
    trained.changes += 1
    with pytest.raises(StaleWeightsError, match="checksum"):
        delivery.bring(1)
    assert not fleet.lost
    assert delivery.bring(1) == 1000
    assert engine.times("join") == 2


def test_without_engines_there_is_nobody_to_send_to() -> None:
    engine = Actor()
    engine.script["receive"] = [WorkerLostError("it died")]
    delivery, trained, _ = deliver(Actor(), [engine])
    trained.changes += 1
    with pytest.raises(ResourceError, match="no worker is left"):
        delivery.bring(1)


def test_policies_of_other_shapes_are_refused_before_anything_is_sent() -> None:
    trainer, engine = Actor(), Actor(layout="other")
    delivery, trained, _ = deliver(trainer, [engine])
    trained.changes += 1
    with pytest.raises(PreflightError, match="worker 1 has other parameters"):
        delivery.bring(1)
    assert trainer.times("send") == 0


def test_an_engine_that_hangs_is_called_by_its_number_among_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, engine = Actor(), Actor()
    delivery, trained, fleet = deliver(trainer, [engine])
    answered = ray.wait
    hung = "receive"
    monkeypatch.setattr(ray, "wait", lambda refs, **how: ([], refs) if engine.times(hung) else answered(refs, **how))
    trained.changes += 1
    with pytest.raises(WorkerLostError, match="no worker is left that samples"):
        delivery.bring(1)
    assert str(fleet.lost[0]).startswith("worker 1 has not answered receive")  # worker 0 is the trainer

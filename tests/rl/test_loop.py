"""Who learns when, in a loop of fakes."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.load import parse
from rl.checkpoint import CheckpointStore
from rl.loop import Loop
from rl.metrics import Stopwatch
from rl.rundir import RunDir
from rollout.types import Prompt, Rollout, Sampling, SpecStats

PROMPTS = [Prompt(id=f"p{index}", token_ids=[1], answer="") for index in range(3)]
ROLLOUT = Rollout("p0", 0, [5], [0.0], [(0, 1)], "stop", SpecStats(1, 0, 0))


class Quiet:
    """Stands for engine, data, rewards, tokenizer, trainer and progress: does what is asked, at once."""

    temperatures: list[float]

    def __init__(self) -> None:
        self.temperatures = []

    def heldout(self, count: int) -> list[Prompt]:
        return PROMPTS[:count]

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
        self.temperatures.append(sampling.temperature)
        for prompt in prompts:
            yield replace(ROLLOUT, prompt_id=prompt.id)

    async def score(self, prompt: Prompt, rollout: Rollout) -> dict[str, float]:
        await asyncio.sleep(0)
        return {"task": 1.0}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return ""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: []


class Lessons:
    """Counts how often there was time to learn. It is its own learner."""

    off = ""
    awaited = 0
    loaded: object = None

    @property
    def learner(self) -> "Lessons":
        return self

    def save(self, folder: Path) -> float:
        folder.mkdir()
        return 0.001

    def saved(self) -> None:
        pass

    def load(self, folder: Path) -> None:
        assert folder.is_dir()

    def state_dict(self) -> dict[str, Any]:
        return {"off": "3 failures"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    async def while_awaited(self, scores: Sequence[asyncio.Future[Any]]) -> None:
        self.awaited += 1


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    config = parse("data: {name: x}", [f"run.dir={tmp_path / 'run'}", "eval.every=1", "eval.num_prompts=3"])
    quiet: Any = Quiet()
    lessons: Any = Lessons()
    return Loop(
        config=config,
        run=RunDir.create(config, ""),
        data=quiet,
        engine=quiet,
        trainer=quiet,
        rewards=quiet,
        tokenizer=quiet,
        stop_token_ids=(2,),
        store=CheckpointStore(tmp_path / "checkpoints", keep=1),
        progress=quiet,
        stop_requested=threading.Event(),
        lessons=lessons,
    )


def test_the_drafter_learns_while_rewards_are_awaited_and_never_in_an_evaluation(loop: Loop) -> None:
    async def run() -> None:
        await loop.evaluate("base")
        await loop.evaluate("rl")
        assert lessons.awaited == 0
        stream = loop.engine.generate(PROMPTS, loop.sampling(0))
        await loop.collect(PROMPTS, stream, Stopwatch(), total=3, lessons=loop.lessons)

    lessons: Any = loop.lessons
    with loop.run:
        asyncio.run(run())
    assert lessons.awaited == 1
    engine: Any = loop.engine
    assert engine.temperatures == [0.0, 0.0, 1.0]


def test_an_interrupt_ends_the_sampling_and_is_passed_on(loop: Loop) -> None:
    ended: list[str] = []

    async def endless() -> AsyncGenerator[Rollout]:
        try:
            await asyncio.Event().wait()
            yield ROLLOUT
        finally:
            ended.append("closed")

    async def run() -> None:
        sampling = asyncio.create_task(anext(loop.until_stopped(endless())))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it waits for a rollout now
        sampling.cancel()  # what asyncio makes of Ctrl-C
        with pytest.raises(asyncio.CancelledError):
            await sampling

    with loop.run:
        asyncio.run(run())
    assert ended == ["closed"]


def test_a_resumed_loop_hands_its_lessons_what_they_saved(loop: Loop) -> None:
    lessons: Any = loop.lessons
    with loop.run:
        loop.save({})
        saved = loop.store.latest()
        assert saved is not None
        loop.restore(saved)
    assert lessons.loaded == lessons.state_dict()

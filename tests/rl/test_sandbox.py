"""The reward pool: what it returns, what it survives, and that nothing outlives it."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from configs.errors import ConfigError, DataError
from configs.schema import RewardConfig
from rl.process import Worker
from rl.sandbox import RewardPool
from rollout.types import Prompt, Rollout, SpecStats

T = TypeVar("T")

# What a prompt's answer says is done to the reward: each test chooses one misfortune.
REWARD = """
    import os, signal, sys, time

    def act(prompt, rollout):
        match prompt.answer:
            case "raise": raise KeyError("no\\nluck")
            case "hang":
                while True: pass
            case "regex":
                import re  # holds the interpreter lock throughout
                re.fullmatch("(a+)+b", "a" * 64)
            case "sleepers":
                import subprocess
                child = subprocess.Popen(["sleep", "1000"])
                open(prompt.task["file"], "w").write(str(child.pid))
                time.sleep(1000)
            case "exit": os._exit(3)
            case "sys.exit":
                print("giving up", file=sys.stderr)
                sys.exit(4)
            case "segfault": os.kill(os.getpid(), signal.SIGSEGV)
            case "memory": bytearray(10 ** 12)
            case "hoard":
                global hoard
                hoard = []
                while True: hoard.append(bytearray(2 ** 20))
            case "chatter":
                for _ in range(1000): print("x" * 1000)
            case "nan": return float("nan")
            case "text": return "good"
            case "stdin": return float(sys.stdin.read() == "")
            case "core":
                import resource
                return float(resource.getrlimit(resource.RLIMIT_CORE)[0])
            case "modules": return float("torch" in sys.modules)
            case "pid": return os.getpid()
        return 0.5

    def echo(prompt, rollout):
        assert isinstance(rollout.version_spans[0], tuple) and rollout.spec.accepted == 2
        return sum(rollout.token_ids) + sum(rollout.logprobs) + len(prompt.token_ids)
"""


@pytest.fixture(autouse=True)
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample_reward.py").write_text(textwrap.dedent(REWARD))
    monkeypatch.syspath_prepend(tmp_path)


def config(*functions: str, **options: Any) -> RewardConfig:
    names = functions or ("sample_reward:act",)
    return RewardConfig(**{"functions": dict.fromkeys(names, 1.0), "workers": 1, "timeout_s": 60.0, **options})


def prompt(answer: str, **task: Any) -> Prompt:
    return Prompt(f"prompt {answer}", [1, 2, 3], answer, {"question": "?", **task})


ROLLOUT = Rollout(
    prompt_id="p",
    sample=0,
    token_ids=[4, 5],
    logprobs=[-0.5, -1.5],
    version_spans=[(0, 2)],
    finish="stop",
    spec=SpecStats(forwards=1, proposed=3, accepted=2),
    text="<answer>0.5</answer>",
)


def with_pool(options: RewardConfig, act: Callable[[RewardPool], Awaitable[T]]) -> T:
    async def run() -> T:
        async with RewardPool(options) as pool:
            return await act(pool)

    return asyncio.run(run())


def score(options: RewardConfig, *answers: str) -> list[dict[str, float]]:
    async def act(pool: RewardPool) -> list[dict[str, float]]:
        return [await pool.score(prompt(answer), ROLLOUT) for answer in answers]

    return with_pool(options, act)


def has_ended(pid: int, *, within_s: float = 60.0) -> bool:
    """Whether the process ends in time; waits on its descriptor instead of asking repeatedly."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], within_s)[0])
    finally:
        os.close(fd)


def test_every_function_gives_its_unweighted_part() -> None:
    functions = ("math", "format", "sample_reward:act", "sample_reward:echo")
    (parts,) = score(config(*functions), "0.5")
    assert parts == {"math": 1.0, "format": 1.0, "sample_reward:act": 0.5, "sample_reward:echo": 10.0}


def test_a_worker_is_kept_warm_without_torch_input_or_core_dumps() -> None:
    first, second, stdin, core, modules = score(config(), "pid", "pid", "stdin", "core", "modules")
    assert first == second
    assert [part["sample_reward:act"] for part in (stdin, core, modules)] == [1.0, 0.0, 0.0]


FATAL = [
    ("exit", "exited with code 3"),
    ("sys.exit", "exited with code 4: giving up"),
    ("segfault", "killed by SIGSEGV"),
    ("hoard", "MemoryError (reward.memory_mb=1024)"),
]
HARMLESS = [
    ("raise", "KeyError: 'no\\nluck'"),
    ("memory", "MemoryError (reward.memory_mb=1024)"),
    ("nan", "ValueError: returned nan, not a finite number"),
    ("text", "TypeError: returned 'good', not a number"),
]


@pytest.mark.parametrize(("answer", "detail"), FATAL + HARMLESS)
def test_a_failing_reward_stops_the_run_naming_itself_and_the_prompt(answer: str, detail: str) -> None:
    with pytest.raises(DataError) as caught:
        score(config(memory_mb=1024), answer)
    expected = f"reward 'sample_reward:act' failed on prompt 'prompt {answer}': {detail}"
    assert str(caught.value).startswith(expected)
    assert "reward.on_error=zero" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", ["hang", "regex"])
def test_a_reward_that_hangs_is_killed(answer: str) -> None:
    with pytest.raises(DataError, match="'sample_reward:act' failed .*: no answer within 0.3 s"):
        score(config(timeout_s=0.3), answer)


def test_zero_mode_counts_failures_keeps_the_other_parts_and_goes_on() -> None:
    functions = ("format", "sample_reward:act", "sample_reward:echo")
    answers = ["fine", "exit", "raise", "fine", "nan", "exit", "segfault", "hoard", "fine"]

    async def act(pool: RewardPool) -> None:
        for answer in answers:
            parts = await pool.score(prompt(answer), ROLLOUT)
            assert parts == {
                "format": 1.0,
                "sample_reward:act": 0.5 if answer == "fine" else 0.0,
                "sample_reward:echo": 10.0,
            }
        assert pool.failures == {
            "sample_reward:act: exited with code 3": 2,
            "sample_reward:act: KeyError": 1,
            "sample_reward:act: ValueError": 1,
            "sample_reward:act: killed by SIGSEGV": 1,
            "sample_reward:act: MemoryError": 1,
        }

    with_pool(config(*functions, on_error="zero", memory_mb=1024), act)


def test_a_killed_worker_takes_its_children_along(tmp_path: Path) -> None:
    file = tmp_path / "child"

    async def act(pool: RewardPool) -> asyncio.Task[dict[str, float]]:
        scoring = asyncio.create_task(pool.score(prompt("sleepers", file=str(file)), ROLLOUT))
        while not file.exists() or not file.read_text():
            await asyncio.sleep(0.01)
        return scoring  # under way while the pool closes

    with_pool(config(timeout_s=1000.0), act)
    assert has_ended(int(file.read_text()))


def test_a_formula_nobody_can_evaluate_scores_zero_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monster = Rollout("p", 0, [1], [0.0], [(0, 1)], "stop", ROLLOUT.spec, "<answer>9^{9^{9^{9^{9}}}}</answer>")
    call = Worker.call

    def impatient(worker: Worker, function: str, given: Prompt, rollout: Rollout, *, timeout_s: float) -> float:
        # short for the monster alone: a busy machine may take its time over the others
        return call(worker, function, given, rollout, timeout_s=0.5 if rollout is monster else timeout_s)

    monkeypatch.setattr(Worker, "call", impatient)

    async def act(pool: RewardPool) -> None:
        assert await pool.score(prompt("0.5"), ROLLOUT) == {"math": 1.0}
        assert await pool.score(prompt("0.5"), monster) == {"math": 0.0}
        assert sum(pool.failures.values()) == 1
        assert await pool.score(prompt("0.5"), ROLLOUT) == {"math": 1.0}

    with_pool(config("math", memory_mb=1024), act)


def test_output_of_a_reward_blocks_nothing() -> None:
    assert score(config(), "chatter", "fine") == [{"sample_reward:act": 0.5}] * 2


def test_a_busy_event_loop_does_not_look_like_a_hanging_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, call = threading.Event(), Worker.call

    def heard(*args: Any, **options: Any) -> float:
        try:
            return call(*args, **options)
        finally:
            answered.set()

    monkeypatch.setattr(Worker, "call", heard)

    async def act(pool: RewardPool) -> dict[str, float]:
        scoring = asyncio.create_task(pool.score(prompt("fine"), ROLLOUT))
        await asyncio.sleep(0)
        assert answered.wait(100)  # the loop stands still
        loop = asyncio.get_running_loop()
        before = loop.time
        monkeypatch.setattr(loop, "time", lambda: before() + 1000)  # and has done so for longer than rewards may take
        return await scoring

    assert with_pool(config(timeout_s=60.0), act) == {"sample_reward:act": 0.5}


def test_many_rollouts_share_the_workers() -> None:
    async def act(pool: RewardPool) -> set[float]:
        parts = await asyncio.gather(*(pool.score(prompt("pid"), ROLLOUT) for _ in range(200)))
        assert len(pool.worker_pids) == 2
        return {part["sample_reward:act"] for part in parts} - set(pool.worker_pids)

    assert with_pool(config(workers=2), act) == set()


def test_closing_kills_workers_in_the_middle_of_a_call() -> None:
    async def act(pool: RewardPool) -> tuple[list[int], asyncio.Task[dict[str, float]]]:
        task = asyncio.create_task(pool.score(prompt("hang"), ROLLOUT))
        await asyncio.sleep(0)
        return pool.worker_pids, task

    pids, _ = with_pool(config(timeout_s=1000.0), act)
    assert len(pids) == 1
    assert all(has_ended(pid) for pid in pids)


def test_no_worker_outlives_a_killed_driver() -> None:
    driver = """
        import asyncio, sys
        from configs.schema import RewardConfig
        from rl.sandbox import RewardPool
        from rollout.types import Prompt, Rollout, SpecStats

        async def main():
            config = RewardConfig(functions={"sample_reward:act": 1.0}, workers=2, timeout_s=1000)
            async with RewardPool(config) as pool:
                rollout = Rollout("p", 0, [1], [0.0], [(0, 1)], "stop", SpecStats(1, 0, 0))
                asyncio.create_task(pool.score(Prompt("p", [1], "regex"), rollout))
                await asyncio.sleep(0)
                print(*pool.worker_pids, flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """
    boot = f"import sys; sys.path[:] = {sys.path!r}\n" + textwrap.dedent(driver)
    with subprocess.Popen([sys.executable, "-c", boot], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(process.pid, signal.SIGKILL)
    assert all(has_ended(pid) for pid in pids)


def test_too_little_memory_to_start_says_which_key_to_raise() -> None:
    with pytest.raises(ConfigError, match="did not start: .*raise reward.memory_mb=64"):
        score(config("task", memory_mb=64), "fine")

"""The reward of programs: what it reads, what it gives, and what happens where it cannot run."""

import asyncio
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, Mock

import pytest

from configs.errors import DataError, PreflightError
from configs.schema import Config, DataConfig, RewardConfig, RunConfig
from rl import cell, lockdown
from rl.cell import Cell, CellError, check_sandbox
from rl.code import CodeReward, extract_program, parse_tests, same_output
from rl.reward import check_rewards
from rl.rundir import RunDir
from rl.sandbox import RewardPool
from rl.tables import _Reader, open_rows
from rollout.types import Prompt, Rollout, SpecStats


@pytest.fixture(autouse=True)
def some_sandbox() -> None:
    try:
        check_sandbox()
    except PreflightError as error:
        if os.environ.get("PACELINE_CI") == "1":
            raise
        pytest.skip(str(error))


def prompt(tests: Any) -> Prompt:
    return Prompt("p", [1], "", {"question": "?", "tests": tests})


def response(program: str) -> Rollout:
    text = f"Let me see.\n```python\n{textwrap.dedent(program)}\n```\nThat is it."
    return Rollout("p", 0, [1], [0.0], [(0, 1)], "stop", SpecStats(forwards=1, proposed=0, accepted=0), text)


def options(**values: Any) -> RewardConfig:
    return RewardConfig(**{"functions": {"code": 1.0}, "workers": 1, "timeout_s": 60.0, "memory_mb": 1024, **values})


def score(config: RewardConfig, *cases: tuple[Any, str]) -> list[float]:
    async def run() -> list[float]:
        async with RewardPool(config) as pool:
            return [(await pool.score(prompt(tests), response(program)))["code"] for tests, program in cases]

    return asyncio.run(run())


# tests, a program that passes them, and one that does not
PROBLEMS: dict[str, tuple[Any, str, str]] = {
    "statements": (["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "add = int.__add__", "add = lambda a, b: 3"),
    "input and output": (
        [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4"}],
        "print(sum(map(int, input().split())))",
        "print(3)",
    ),
    "JSON of inputs and outputs": (
        json.dumps({"inputs": ["3\n", "4\n"], "outputs": ["0.5\n", "1.0\n"]}),
        "if __name__ == '__main__':\n    print((int(input()) - 2) * 0.5, end='  \\n\\n')",
        "def never(): print(input())",
    ),
    "a method that changes its argument": (
        ["rows = [3, 1, 2]\nassert Solution().order(rows) is None\nassert rows == [1, 2, 3]"],
        "class Solution:\n    def order(self, rows): rows.sort()",
        "class Solution:\n    def order(self, rows): return sorted(rows)",
    ),
    "a checker of a candidate": (
        ["def check(f):\n    assert f((1, 2.5)) == {(1, 2.5): {1}}\n    assert not f(())\ncheck(f)"],
        "def f(x): return {x: {1}} if x else {}",
        "def f(x): return {1}",
    ),
    "an iterator, an object and its state": (
        ["assert list(count(3)) == [0, 1, 2]", "s = Stack()\ns.push(b'x')\nassert len(s) == 1 and s.items == [b'x']"],
        """
        def count(n): yield from range(n)
        class Stack:
            def __init__(self): self.items = []
            def push(self, x): self.items.append(x)
            def __len__(self): return len(self.items)
        """,
        "def count(n): return range(n + 1)",
    ),
    "an object that is true": (
        ["assert find('a1')", "assert not find('a')", "assert find('a1').group() == '1'"],
        "import re\ndef find(text): return re.search('[0-9]', text)",
        "import re\ndef find(text): return re.compile('[0-9]')",
    ),
    "an error that is expected": (
        [
            "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False",
            "assert math.isclose(f(3), 1 / 3)",
        ],
        "import math\ndef f(x): return 1 / x",
        "import math\ndef f(x): return 1 / (x or 1)",
    ),
    "deep recursion on a large stack": (
        [{"input": "20000", "output": "20000"}],
        """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(1 << 27)
        def deep(n): return n and 1 + deep(n - 1)
        threading.Thread(target=lambda: print(deep(int(input())))).start()
        """,
        "def deep(n): return 1 + deep(n - 1)\nprint(deep(int(input())))",
    ),
    "numbers of thousands of digits": (
        ["import math\nassert f(2000) == math.factorial(2000)"],
        "import math\nf = math.factorial",
        "f = lambda n: 10 ** 5735",
    ),
    "an iterator that ends": (
        ["it = f(2)\nassert [next(it), next(it), next(it, 'over')] == [0, 1, 'over']"],
        "def f(n): yield from range(n)",
        "def f(n): yield from range(n + 1)",
    ),
    "output at exit": (
        [{"input": "", "output": "bye"}],
        "import atexit\natexit.register(print, 'bye')\nraise SystemExit",
        "print('bye')\nraise SystemExit(1)",
    ),
    "a package of this environment": (["assert f([1, 2]) == 1.5"], "import numpy\nf = numpy.mean", "f = sum"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_tests_passed_is_one_and_less_is_nothing(name: str, warm: Callable[[Any, str], float]) -> None:
    tests, right, wrong = PROBLEMS[name]
    assert warm(tests, right) == 1.0
    assert warm(tests, wrong) == 0.0
    assert warm(tests, "this is no Python") == 0.0


@pytest.fixture(scope="module")
def warm() -> Any:
    """A score by one pool for all."""
    with asyncio.Runner() as runner:
        pool = RewardPool(options())
        runner.run(pool.__aenter__())
        assert pool.sandbox is not None and pool.sandbox[0] in ("bubblewrap", "landlock")
        pids = pool.worker_pids
        yield lambda tests, program: runner.run(pool.score(prompt(tests), response(program)))["code"]
        assert pool.worker_pids == pids and not pool.failures
        pool.close()


def test_the_share_of_tests_passed_can_be_the_reward() -> None:
    calls = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 4", "assert f(4) == 4"]
    pairs = [{"input": str(n), "output": str(n % 3)} for n in range(4)]
    assert score(options(tests="share"), (calls, "def f(x): return x"), (pairs, "print(input())")) == [0.75, 0.75]


def test_tests_out_of_time_are_tests_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"input": str(n), "output": str(n)} for n in (0, 1000, 2)]
    program = "import time\nn = input()\ntime.sleep(int(n))\nprint(n)"
    reward = CodeReward(options(tests="share", timeout_s=100.0))
    # the deadline, 80 s; then what is left of it for each test: all, half a second, nothing
    monkeypatch.setattr("rl.code.time", SimpleNamespace(monotonic=iter([0.0, 0.0, 79.5, 80.0]).__next__))
    assert reward(prompt(pairs), response(program)) == 1 / 3
    reward._cell.close()


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (None, "tests are None, not a list"),
        ([], "there are no tests"),
        ("assert True", "tests are no JSON"),
        (["assert f(1) =="], "test 1 is no Python: invalid syntax"),
        (["assert f(object())"], "a test passes the program a object; only plain values can be sent"),
        (["assert f(1)", {"input": "", "output": ""}], "there is the test 'assert f"),
        ([{"input": "1", "output": 1}], "there is the test {'input': '1', 'output': 1}"),
    ],
)
def test_tests_that_cannot_be_run_stop_the_run(tests: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        score(options(), (tests, "def f(x): return x"))
    assert "reward 'code' failed on prompt 'p'" in str(caught.value) and reason in str(caught.value)


# tests that no right program fails, and one that makes them look as if they were at fault
BLAMES = {
    "a list of objects": (
        "assert back(list(there(2))) == 2",
        "def there(x): return iter([object()])\ndef back(x): return 2",
    ),
    "a module": ("assert apply(twice, 2) == 4", "import math as twice\ndef apply(f, x): return 4"),
    "a module's function": ("assert apply(Some.sqrt, 4) == 2", "import math as Some\ndef apply(f, x): return 2"),
    "a root of -1": ("assert back(there(2) ** 0.5) == 2", "def there(x): return -1\ndef back(x): return 2"),
}


@pytest.mark.parametrize("name", BLAMES)
def test_a_program_cannot_make_its_tests_end_the_run(name: str) -> None:
    test, program = BLAMES[name]
    assert score(options(), ([test], program)) == [0.0]


def test_a_program_cannot_end_its_tests_loop() -> None:
    test = "assert all(map(lambda n: f(n) == n * n, range(3)))"
    assert score(options(), ([test], "def f(n): return n * n"), ([test], "def f(n): raise StopIteration")) == [1.0, 0.0]


def test_honest_programs_among_hostile_ones_get_what_they_earn() -> None:
    honest = "def f(x): return x"
    hostile = [
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "import os\nos.kill(-1, 9)",
        "import os\nos._exit(0)",
        "x = bytearray(10 * 2**30)",
    ]

    async def run() -> None:
        async with RewardPool(options(workers=2, timeout_s=12.0)) as pool:
            pids = set(pool.worker_pids)
            scores = [
                pool.score(prompt(["assert f(1) == 1"]), response(text)) for bad in hostile for text in (bad, honest)
            ]
            assert [parts["code"] for parts in await asyncio.gather(*scores)] == [0.0, 1.0] * len(hostile)
            assert set(pool.worker_pids) == pids and not pool.failures

    asyncio.run(run())


def test_a_lost_sandbox_costs_a_worker_and_is_counted() -> None:
    async def run() -> None:
        async with RewardPool(options()) as pool:
            (worker,) = pool.worker_pids
            innermost = chain(worker, length=3 if pool.sandbox == ("bubblewrap", ANY) else 2)[-1]
            ending = os.pidfd_open(innermost)
            os.kill(innermost, signal.SIGKILL)
            assert select.select([ending], [], [], 60)[0]
            os.close(ending)
            tests = ["assert f(1) == 1"]
            assert await pool.score(prompt(tests), response("def f(x): return x")) == {"code": 0.0}
            assert sum(pool.failures.values()) == 1
            assert await pool.score(prompt(tests), response("def f(x): return x")) == {"code": 1.0}

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_nothing_of_a_cell_outlives_who_started_it(kind: str, program: Callable[[str], str]) -> None:
    if kind == "bubblewrap":
        program("bwrap")
    starter = f"""
        import os, sys
        from rl.cell import Cell
        cell = Cell({kind!r}, memory_mb=512)
        print(cell.pid, flush=True)
        cell.feed("import time; time.sleep(1000)", "", timeout_s=1000)
    """
    boot = f"import sys; sys.path[:] = {sys.path!r}\n" + textwrap.dedent(starter)
    with subprocess.Popen([sys.executable, "-c", boot], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        top = int(process.stdout.readline())
        endings = [os.pidfd_open(pid) for pid in chain(top, length=3 if kind == "bubblewrap" else 2)]
        os.kill(process.pid, signal.SIGKILL)
    for ending in endings:
        assert select.select([ending], [], [], 60)[0]
        os.close(ending)


def chain(pid: int, *, length: int) -> list[int]:
    """The process, its child and so on, once there are so many (a test that waits for ever is ended by its timeout)."""
    found = [pid]
    while len(found) < length:
        children = Path(f"/proc/{found[-1]}/task/{found[-1]}/children").read_text().split()
        found += [int(child) for child in children[:1]]
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_is_held_as_well(program: Callable[[str], str]) -> None:
    python = program("/usr/bin/python3")  # not the one of this environment, which may be root's alone
    source = Path(cell.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in (
            *(f"rl/{name}.py" for name in ("cell", *cell.MODULES)),
            "configs/__init__.py",
            "configs/errors.py",
        ):
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, Path(folder) / name)
        code = "import sys; sys.version_info < (3, 11) and sys.exit(77)\nfrom rl.cell import KINDS, check_sandbox\n"
        code += "for kind in KINDS: print(*check_sandbox(kind))"
        command = [python, "-c", code]
        done = subprocess.run(
            command, cwd=folder, user=65534, group=65534, extra_groups=[], capture_output=True, text=True
        )
    if done.returncode == 77:
        pytest.skip("the system's Python is older than 3.11")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("bubblewrap") and second.startswith("landlock")
    assert "as this user, 65534: a foreign file, the network and a fork were refused" in first


def test_without_any_sandbox_the_run_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(lockdown, "supported", lambda: False)
    with pytest.raises(PreflightError) as caught:
        check_rewards(options())
    message = str(caught.value)
    assert "no list of system calls for this processor" in message and "install bubblewrap" in message
    assert "reward.sandbox=none" in message and "\n" not in message
    assert check_sandbox("none")[0] == "none"


def test_a_sandbox_that_lets_something_through_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "PROBE", "print('refused')")
    with pytest.raises(
        PreflightError, match="landlock: a program was not refused a foreign file, the network or a fork"
    ):
        check_sandbox("landlock")


def test_the_run_directory_says_which_sandbox_it_was(tmp_path: Path) -> None:
    with RunDir.create(Config(run=RunConfig(dir=str(tmp_path / "run"))), "") as run:
        run.add_environment(sandbox={"kind": "landlock", "detail": ""})
    found = json.loads((tmp_path / "run" / "env.json").read_text())
    assert found["sandbox"]["kind"] == "landlock" and found["packages"]["torch"]


def test_unconfined_programs_run_only_by_name() -> None:
    assert RewardConfig().sandbox == "auto"
    assert score(options(sandbox="none"), (["assert f(1) == 1"], "def f(x): return x")) == [1.0]


def test_a_cell_says_why_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "MODULES", ("__init__",))
    with pytest.raises(CellError, match="No module named 'rl.enter'"):
        Cell("none", memory_mb=512)


def test_a_cell_that_does_not_start_keeps_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what other tests left
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch, pytest.raises(CellError, match="bwrap is not installed"):
        patch.setattr(shutil, "which", lambda name: None)
        Cell("bubblewrap", memory_mb=512)
    with monkeypatch.context() as patch, pytest.raises(CellError, match="cannot start /nowhere/"):
        patch.setattr(sys, "base_prefix", "/nowhere")
        Cell("none", memory_mb=512)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\nor\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nwhich prints\n```text\n1\n```", "a\n"),
        ("a = 1", None),
        ("```python\na", None),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, program: str | None) -> None:
    assert extract_program(text) == program


def test_outputs_are_compared_line_by_line_and_numbers_by_value() -> None:
    assert same_output("1 2 \n\n", "1 2")
    assert same_output("0.50 1e1", "0.5 10")
    assert same_output("", "\n")
    assert not same_output("1\n2", "1 2")
    assert not same_output("yes", "Yes")
    assert not same_output("1", "1\n1") and not same_output("1\n1", "1")
    assert same_output("a\r\nb", "a\nb")
    assert not same_output("1 " * 1000, "1")


def test_a_flood_of_lines_is_compared_one_by_one() -> None:
    flood = "10\n" * 100_000
    tracemalloc.start()
    try:
        assert not same_output(flood, "10\n20\n")
        assert tracemalloc.get_traced_memory()[1] < 8 * len(flood)
    finally:
        tracemalloc.stop()


def test_tests_travel_from_a_files_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Add.", "tests": ["assert add(1, 2) == 3"]}))
    config = DataConfig(source="file", name=str(tmp_path / "rows.jsonl"), answer_field="")
    _, rows = open_rows(config)
    ((line, row),) = rows
    problem = _Reader(config, Mock(), "rows.jsonl").problem(line, row)
    assert parse_tests(problem.task["tests"]) == ["assert add(1, 2) == 3"]

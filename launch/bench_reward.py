"""Rewards of model-written programs per second: a warm sandbox against a fresh, unconfined Python for every test."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

from rich.table import Table

from configs.errors import ConfigError
from configs.schema import RewardConfig
from launch.bench_report import WrongResultError, plain_table, provenance, say, spread
from rl.cell import check_sandbox
from rl.sandbox import RewardPool
from rollout.types import Prompt, Rollout, SpecStats

NUM_TESTS = 5
# programs as a policy writes them, small: what is measured is what surrounds them
RIGHT = {
    "statements": "def count(text):\n    return {c: text.count(c) for c in set(text)}\n",
    "input and output": "import sys\nrows = sys.stdin.read().split()\nprint(sum(map(int, rows)))\n",
}
WRONG = {"statements": "def count(text):\n    return {}\n", "input and output": "print(input())\n"}
TESTS: dict[str, list[Any]] = {
    "statements": [f"assert count({'ab' * n!r}) == {{'a': {n}, 'b': {n}}}" for n in range(1, NUM_TESTS + 1)],
    "input and output": [{"input": f"{n} 1\n2\n", "output": f"{n + 3}\n"} for n in range(NUM_TESTS)],
}


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: rewards a round, by kind of tests, sandbox and number of workers."""

    workers: tuple[int, ...]
    sandboxes: tuple[str, ...]
    rewards: int
    rounds: int


def run(job: Job) -> dict[str, Any]:
    """Find every sandbox sound, score right and wrong programs, then time; JSON-able.

    Raises ConfigError, PreflightError, WrongResultError.
    """
    kinds = ("bubblewrap", "landlock", "none")
    if unknown := set(job.sandboxes) - set(kinds):
        raise ConfigError(f"--sandboxes names {min(unknown)!r}; choose among {', '.join(kinds)}")
    found = {kind: check_sandbox(cast(Any, kind))[1] for kind in job.sandboxes}
    rows = []
    for tests in TESTS:
        say(f"{tests}: a fresh Python for every test")
        rows.append({"tests": tests, "sandbox": "a Python start a test", "workers": 1, **_starts(tests, job)})
        for kind in job.sandboxes:
            for workers in job.workers:
                say(f"{tests}: {kind}, workers={workers}")
                measured = asyncio.run(_pool(tests, kind, workers, job))
                rows.append({"tests": tests, "sandbox": kind, "workers": workers, **measured})
    return {
        "what": f"rewards of programs per second, {NUM_TESTS} tests each",
        **provenance(device="cpu", seed=0),
        "load_average_before": os.getloadavg()[0],
        "sandboxes": found,
        "rewards_a_round": job.rewards,
        "rows": rows,
    }


async def _pool(tests: str, kind: str, workers: int, job: Job) -> dict[str, Any]:
    config = RewardConfig(functions={"code": 1.0}, workers=workers, timeout_s=60.0, sandbox=cast(Any, kind))
    prompt = Prompt("p", [1], "", {"question": "?", "tests": TESTS[tests]})
    rates = []
    async with RewardPool(config) as pool:

        async def score(program: str) -> float:
            return (await pool.score(prompt, _response(program)))["code"]

        if [await score(RIGHT[tests]), await score(WRONG[tests])] != [1.0, 0.0]:
            raise WrongResultError(f"{kind}: a right program must score 1 and a wrong one 0")
        for _ in range(job.rounds):
            begun = perf_counter()
            scores = await asyncio.gather(*(score(RIGHT[tests]) for _ in range(job.rewards)))
            rates.append(job.rewards / (perf_counter() - begun))
            if scores != [1.0] * job.rewards or pool.failures:
                raise WrongResultError(f"{kind}: {sum(scores):g} of {job.rewards} right programs scored 1")
    return {"per_second": spread(rates), "milliseconds_a_worker": spread([1000 * workers / rate for rate in rates])}


def _starts(tests: str, job: Job) -> dict[str, Any]:
    """The plain way: a new interpreter for each of a program's tests, one after another, nothing confined."""
    rates = []
    for _ in range(job.rounds):
        num_programs = max(1, job.rewards // 20)  # it is slow
        begun = perf_counter()
        for _ in range(num_programs):
            for test in TESTS[tests]:
                program, given = RIGHT[tests], ""
                if isinstance(test, str):
                    program += test
                else:
                    given = test["input"]
                command = [sys.executable, "-c", program]
                done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
                if done.returncode or (given and done.stdout != test["output"]):
                    raise WrongResultError(f"a right program failed: {done.stderr}")
        rates.append(num_programs / (perf_counter() - begun))
    return {"per_second": spread(rates), "milliseconds_a_worker": spread([1000 / rate for rate in rates])}


def _response(program: str) -> Rollout:
    text = f"```python\n{program}```\n"
    return Rollout("p", 0, [1], [0.0], [(0, 1)], "stop", SpecStats(forwards=1, proposed=0, accepted=0), text)


def table(result: dict[str, Any]) -> Table:
    """Rewards per second and milliseconds of a worker's time each, by kind of tests, sandbox and workers."""
    headings: Sequence[str] = ("tests", "sandbox", "workers", "rewards/s", "min", "max", "ms each")
    shown = plain_table(f"{result['what']}, {result['cpus']} cores", headings)
    for row in result["rows"]:
        rates = row["per_second"]
        shown.add_row(
            row["tests"],
            row["sandbox"],
            str(row["workers"]),
            *(f"{rates[which]:.1f}" for which in ("median", "min", "max")),
            f"{row['milliseconds_a_worker']['median']:.1f}",
        )
    return shown

"""A pool of reward workers that can be killed: a reward that hangs, dies or eats memory costs its worker alone.

This bounds time and memory and keeps faults out of the driver. It hides neither files nor the network from a reward;
the reward "code" runs the policy's programs in a cell of their own (rl/cell.py), which does.
"""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from configs.errors import DataError
from configs.schema import RewardConfig
from rl.cell import check_sandbox
from rl.process import RewardError, Worker
from rollout.types import Prompt, Rollout

# A formula can be written that no computer evaluates, a program that takes its sandbox along. The answer is wrong, as
# with math-verify's own time limit, and a policy that finds one must not end the run; the pool counts it.
MAY_FAIL = ("math", "code")


class RewardPool:
    """Scores rollouts in config.workers processes; an async context manager that ends with all of them killed.

    failures counts, by "function: kind", what was scored 0: everything that fails under on_error="zero", and
    formulas that exhaust math-verify's time or memory and programs that end their sandbox always.
    sandbox: where the policy's programs run, and a line about it; None where none are run.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        # A thread a worker: its clock is right however long the event loop is busy. The threads live until close,
        # which matters because a worker dies with the thread that started it (PR_SET_PDEATHSIG).
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")
        self._seats: SimpleQueue[Worker | None] = SimpleQueue()
        for _ in range(config.workers):
            self._seats.put(None)
        self._workers: set[Worker] = set()
        self._closing = False
        self.failures: Counter[str] = Counter()
        self.sandbox: tuple[str, str] | None = None

    @property
    def worker_pids(self) -> list[int]:
        """Processes now alive or starting."""
        return [worker.pid for worker in self._workers]

    async def __aenter__(self) -> Self:
        """Start every worker. Raises ConfigError when one cannot start, PreflightError without a sandbox for "code"."""
        loop = asyncio.get_running_loop()
        if "code" in self._config.functions:
            kind, detail = await loop.run_in_executor(self._threads, check_sandbox, self._config.sandbox)
            self.sandbox = kind, detail
            self._config = replace(self._config, sandbox=kind)  # workers need not look again
        try:
            starts = [loop.run_in_executor(self._threads, self._start) for _ in range(self._config.workers)]
            workers = await asyncio.gather(*starts)
        except BaseException:
            self.close()
            raise
        for worker in workers:
            self._seats.get()
            self._seats.put(worker)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def score(self, prompt: Prompt, rollout: Rollout) -> dict[str, float]:
        """Each function's unweighted value, by name; reward.timeout_s bounds each function.

        Raises DataError naming function, prompt and cause when one fails and on_error is "stop".
        """
        loop = asyncio.get_running_loop()
        parts, failures = await loop.run_in_executor(self._threads, self._score, prompt, rollout)
        self.failures.update(failures)
        return parts

    def close(self) -> None:
        """Kill every worker; calls in flight fail."""
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in list(self._workers):
            self._discard(worker)

    def _score(self, prompt: Prompt, rollout: Rollout) -> tuple[dict[str, float], list[str]]:
        """One rollout on a free worker, in one of as many threads as there are workers."""
        parts: dict[str, float] = {}
        failures: list[str] = []
        worker = self._seats.get()
        try:
            for name in self._config.functions:
                if self._closing:
                    raise DataError("the reward pool is closed")
                worker = worker or self._start()
                try:
                    parts[name] = worker.call(name, prompt, rollout, timeout_s=self._config.timeout_s)
                except RewardError as failure:
                    if failure.fatal:
                        self._discard(worker)
                        worker = None
                    if self._config.on_error == "stop" and not (failure.fatal and name in MAY_FAIL):
                        raise DataError(
                            f"reward {name!r} failed on prompt {prompt.id!r}: {failure.detail}; mend it, or set "
                            "reward.on_error=zero to count such rollouts and score them 0"
                        ) from failure
                    parts[name] = 0.0
                    failures.append(f"{name}: {failure.kind}")
        finally:
            self._seats.put(worker)
        return parts, failures

    def _start(self) -> Worker:
        worker = Worker(self._config)
        self._workers.add(worker)
        return worker

    def _discard(self, worker: Worker) -> None:
        worker.close()
        self._workers.discard(worker)

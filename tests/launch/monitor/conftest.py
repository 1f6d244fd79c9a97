"""A run directory written by the run's own code, step by step, and a hub that serves it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn

from configs.schema import Config, DataConfig, MonitorConfig, RunConfig
from launch.monitor.guard import Guard
from launch.monitor.hub import make_app
from launch.monitor.serve import Door, bind, open_door
from rl.rundir import RunDir


class WrittenRun:
    """A run that goes on for as long as this process holds its directory; times lie in the past, a second apart."""

    def __init__(self, run: RunDir, model: Path) -> None:
        self.run = run
        self.path = run.path
        self.model = model
        self.begun = time.time() - 1000.0

    def step(self, step: int, *, total: int = 8, **fields: object) -> None:
        """A whole training step: curve, lanes, samples, record and status."""
        begin = self.begun + 10 * step
        for tick in range(9):
            self.point(step, begin + tick / 2, running=8 - tick, finished=tick)
        for worker in (0, 1):
            self.lane(step, worker, "prefill", begin, begin + 0.5)
            self.lane(step, worker, "decode", begin + 0.5, begin + 3.5 + worker)
            self.lane(step, worker, "train", begin + 5.0, begin + 8.0)
        record = {
            "step": step, "total_steps": total, "time": begin + 9.0, "reward_mean": 0.1 * step, "reward_std": 0.3,
            "response_len_mean": 10.0, "response_len_max": 20, "truncated_fraction": 0.25, "num_rollouts": 8,
            "tokens": 80, "tokens_per_s": 16.0, "accept_length": 1.6, "draft_tokens": 60, "draft_accept_rate": 0.5,
            "accept_length_suffix": 2.5, "draft_share_suffix": 0.4, "loss": 0.01, "grad_norm": 1.0, "lr": 1e-5,
            "entropy": 0.5, "kl": 0.0, "clip_fraction": 0.0, "prob_diff_mean": 0.001, "prob_diff_max": 0.1,
            "seconds": 9.0, "seconds_rollout": 4.5, "seconds_train": 3.0, "seconds_tail": 0.5, "reward_failures": 0,
            "reward_hist": {"edges": [0.0, 0.5, 1.0], "counts": [5, 3]},
            "response_len_hist": {"edges": [0, 8, 16, 24], "counts": [2, 4, 2]},
        }  # fmt: skip
        self.run.write_samples(step, [self.row(step, number) for number in range(8)])
        self.run.append_metrics("steps", record | fields)
        self.run.write_status(state="running", step=step, total_steps=total, record=record | fields)

    def row(self, step: int, number: int) -> dict[str, object]:
        """One rollout's row: the text "say N" in bytes, its last two drafted."""
        text = f"say {number}"
        ids = [byte_id(letter) for letter in text.encode()]
        return {
            "prompt_id": f"p{number // 4}", "sample": number % 4, "question": f"what is {number}?", "answer": "7",
            "text": text, "reward": float(number == 7), "advantage": 0.0, "num_tokens": 5 + number, "finish": "stop",
            "forwards": 3, "accepted": 2, "token_ids": ids, "drafted": [False] * (len(ids) - 2) + [True, True],
        }  # fmt: skip

    def point(self, step: int, at: float, *, running: int, finished: int) -> None:
        """A line of the curve; drafts begin when half of the sequences are done."""
        strategy = "suffix d4 k1 v4" if finished > 3 else "off"
        worker = {"running": running, "waiting": 0, "strategy": strategy, "cycles": {}, "preempted": 0}
        workers = [worker, {**worker, "running": 0}]
        point = {"step": step, "time": at, "finished": finished, "total": 8, "tokens": 10 * finished}
        self.line("curve", point | {"workers": workers})

    def lane(self, step: int, worker: int, kind: str, begin: float, end: float) -> None:
        """A span of a worker."""
        self.line("lanes", {"step": step, "worker": worker, "kind": kind, "begin": begin, "end": end})

    def line(self, name: str, record: dict[str, object]) -> None:
        """A line as rl.recorder writes it."""
        with (self.path / "metrics" / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def end(self, code: int = 0, reason: str = "done") -> None:
        """The run ends and lets go of its directory."""
        self.run.write_exit(code, reason)
        self.run.close()


def byte_id(byte: int) -> int:
    """A byte's token in tests/conftest.py's tokenizer, whose alphabet is sorted by the symbols of bytes."""
    from tokenizers import pre_tokenizers

    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbol = pre.pre_tokenize_str(bytes([byte]).decode("latin-1"))[0][0]
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(symbol[-1]) + 3


@pytest.fixture
def written(tmp_path: Path, tiny_model_dir: Path) -> Iterator[WrittenRun]:
    """A new run of the tiny model, without a step yet."""
    config = Config(
        model=str(tiny_model_dir),
        run=RunConfig(name="watched", dir=str(tmp_path / "run")),
        data=DataConfig(name="chain_sum"),
        monitor=MonitorConfig(),
    )
    with RunDir.create(config, "") as run:
        yield WrittenRun(run, tiny_model_dir)


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    """Serves a run on a free port in a thread until the test ends: serving(path, token=...) gives its origin."""
    with ExitStack() as stack:
        yield lambda path, **door: stack.enter_context(served(path, replace(open_door(""), **door)))


@contextmanager
def served(path: Path, door: Door) -> Iterator[str]:
    """The origin of a hub as launch.monitor.serve makes it."""
    listener = bind("127.0.0.1", [0])
    app = Guard(make_app(path), hosts=door.hosts, any_address=door.any_address, token=door.token)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the hub did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()

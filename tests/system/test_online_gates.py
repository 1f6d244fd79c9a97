"""Gates that learn in a run: from its own verifications, without changing a sample, across checkpoints."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.load import parse
from configs.schema import Config
from drafter.buffer import is_heldout
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import read_gates, write_gates
from launch.cluster import make_gate_lessons
from launch.parts import _make_engine
from rl import gate_lessons
from rl.checkpoint import CheckpointStore
from rl.gate_lessons import GateLessons
from rl.loop import GATES, Loop
from rollout import gate_sampler
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.types import Prompt, Rollout, Sampling

HELD = [f"p{number}" for number in range(40) if is_heldout(f"p{number}")][:2]
PROMPTS = [
    Prompt(id=name, token_ids=[3 + (7 * n + 31 * number) % 250 for n in range(80 + number)], answer="")
    for number, name in enumerate([*HELD, "p0", "p1"])
]
SPARSE = [
    "sparse.mode=draft", "sparse.selector=gate", "sparse.select_block=16", "sparse.budget_tokens=48",
    "sparse.sinks=0", "sparse.window=0", "sparse.depth=4",
]  # fmt: skip
Written = dict[tuple[str, int], Rollout]


@pytest.fixture
def gates(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder of gates that pick badly: there is something to learn."""
    model_config = load_policy(tiny_model_dir, device="cpu", dtype="float32").config
    found = Gates(GateConfig.of(model_config, select_block=16), seed=1).requires_grad_(False)
    found.key_weight += torch.randn(found.key_weight.shape, generator=torch.Generator().manual_seed(0))
    (tmp_path / "gates").mkdir()
    write_gates(tmp_path / "gates", found, model_config=model_config, base_model="tiny", dtype=torch.float32)
    return tmp_path / "gates"


@pytest.fixture
def make(tiny_model_dir: Path, gates: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., "Run"]:
    monkeypatch.setattr(gate_sampler, "WATCH_EVERY", 1)
    monkeypatch.setattr(gate_lessons, "LR", 1e-2)
    return lambda *overrides: Run(tiny_model_dir, gates, *overrides)


class Run:
    """The engine of a run and, where gates learn, their lessons."""

    def __init__(self, model: Path, gates: Path, *overrides: str) -> None:
        options = [
            *SPARSE,
            f"sparse.gate={gates}",
            f"model={model}",
            "spec.source=off",
            "spec.choice=fixed",
            "rollout.max_running=6",
        ]
        self.config: Config = parse("data: {name: chain_sum}\n", [*options, *overrides])
        self.policy = load_policy(model, device="cpu", dtype="float32")
        self.engine: NativeEngine = _make_engine(self.config, self.policy, None)[0]
        self.lessons: GateLessons | None = make_gate_lessons(self.config, self.engine)
        self.step = 0

    def sample(self) -> Written:
        sampling = Sampling(
            num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=1, step=self.step, temperature=0.7
        )

        async def collect() -> list[Rollout]:
            return [rollout async for rollout in self.engine.generate(PROMPTS, sampling)]

        return {(rollout.prompt_id, rollout.sample): rollout for rollout in asyncio.run(collect())}

    def advance(self) -> dict[str, Any]:
        """The lesson of a step; its figures. The policy changes a little, as an update would have it."""
        record = {} if self.lessons is None else self.lessons.take()
        self.step += 1
        with torch.no_grad():
            for parameter in self.policy.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(self.step))
                parameter += 1e-3 * noise
        self.engine.update(self.step)
        return record

    @property
    def served(self) -> dict[str, torch.Tensor]:
        assert self.lessons is not None
        return {name: tensor.clone() for name, tensor in self.lessons.learner.served.state_dict().items()}

    def loop(self, folder: Path) -> Loop:
        """A loop that saves and restores, without a drafter or a policy that trains."""
        (folder / "metrics").mkdir(exist_ok=True)
        quiet: Any = SimpleNamespace(phase=lambda name: None, message=print)
        run: Any = SimpleNamespace(path=folder, append_event=lambda *_, **__: None)
        trainer: Any = SimpleNamespace(save=lambda folder: None, load=lambda folder: None)
        nothing: Any = None
        return Loop(
            config=self.config, run=run, data=nothing, engine=self.engine, trainer=trainer, rewards=nothing,
            tokenizer=nothing, stop_token_ids=(), store=CheckpointStore(folder / "checkpoints", keep=1),
            progress=quiet, stop_requested=threading.Event(), gates=self.lessons,
        )  # fmt: skip


@pytest.mark.parametrize("layers", [[], ["sparse.layers.0.selector=verified"]], ids=["all layers", "some"])
def test_gates_that_learn_change_no_sample_and_are_served_only_where_they_find_more(
    layers: list[str], make: Callable[..., Run]
) -> None:
    learning, still = make("sparse.learn=true", *layers), make(*layers)
    assert still.lessons is None
    figures = []
    for _ in range(3):
        before = learning.served
        given, expected = learning.sample(), still.sample()
        assert {key: rollout.token_ids for key, rollout in given.items()} == {
            key: rollout.token_ids for key, rollout in expected.items()
        }
        assert all(torch.equal(learning.served[name], tensor) for name, tensor in before.items()), "between steps alone"
        record = learning.advance()
        still.advance()
        changed = any(not torch.equal(learning.served[name], tensor) for name, tensor in before.items())
        assert changed == (record["gate_outcome"] == "published")
        assert changed == (record["gate_recall"] > record["gate_served_recall"])
        figures.append(record)
    assert "published" in {record["gate_outcome"] for record in figures}
    assert all(record["gate_samples"] and record["gate_updates"] for record in figures)


def test_an_evaluation_teaches_nothing(make: Callable[..., Run]) -> None:
    run = make("sparse.learn=true")
    sampling = Sampling(num_samples=1, max_new_tokens=24, stop_token_ids=(2,), seed=1, step=-1, temperature=0.0)

    async def collect() -> int:
        return len([rollout async for rollout in run.engine.generate(PROMPTS, sampling)])

    assert asyncio.run(collect()) == len(PROMPTS)
    assert run.lessons is not None and run.lessons.take()["gate_samples"] == 0


def test_nothing_that_older_gates_described_is_found_after_a_publication(make: Callable[..., Run]) -> None:
    run = make("sparse.learn=true")
    run.sample()
    assert run.engine._workspace.pool._block_of, "prompts are found again"
    run.engine.gates_changed()
    assert not run.engine._workspace.pool._block_of


def test_a_resumed_run_goes_on_with_the_gates_it_learned(make: Callable[..., Run], tmp_path: Path) -> None:
    first = make("sparse.learn=true")
    for _ in range(3):
        first.sample()
        first.advance()
    loop = first.loop(tmp_path)
    loop.step = first.step
    loop.save(first.engine.state_dict())
    checkpoint = loop.store.latest()
    assert checkpoint is not None
    second = make("sparse.learn=true")
    assert any(not torch.equal(second.served[name], tensor) for name, tensor in first.served.items())
    second.loop(tmp_path).restore(checkpoint)
    assert all(torch.equal(second.served[name], tensor) for name, tensor in first.served.items())
    as_plugin = read_gates(checkpoint / GATES, second.policy.config).state_dict()
    assert all(torch.equal(as_plugin[name], tensor) for name, tensor in first.served.items())
    assert first.lessons is not None and second.lessons is not None
    trained = second.lessons.learner.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in first.lessons.learner.state_dict().items())
    with torch.no_grad():
        for given, own in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
            own.copy_(given)
    second.step = first.step
    assert {key: each.token_ids for key, each in second.sample().items()} == {
        key: each.token_ids for key, each in first.sample().items()
    }


@pytest.mark.slow
def test_two_workers_agree_on_gates_publish_them_together_and_lose_one_at_the_cost_of_what_it_learned(
    tiny_model_dir: Path, gates: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("gates_in_workers.py")
    result = subprocess.run(
        [sys.executable, script, tiny_model_dir, gates],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    steps, version = told["steps"], 0
    for step in steps:
        assert step["same"] and step["num_rollouts"] == 16 and step["proposed"] > 0
        assert step["record"]["gate_samples"] and step["record"]["gate_updates"]
        version += step["record"]["gate_outcome"] == "published"
        assert step["record"]["gate_version"] == version
        assert {served_version for served_version, _ in step["served"]} == {version}
        assert len({digest for _, digest in step["served"]}) == 1
    both, alone = steps[:3], steps[3:]
    assert all(min(step["tokens_by_worker"]) > 0 and len(step["served"]) == 2 for step in both)
    assert "published" in {step["record"]["gate_outcome"] for step in both}
    assert told["lost"] == [1] and all(len(step["served"]) == 1 for step in alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        [],
        ["compute.backend=ray", "compute.workers=2"],
        ["compute.backend=ray", "compute.placement=separate", "compute.bucket_mb=1"],
    ],
    ids=["inline", "colocated", "separate"],
)
def test_a_run_teaches_its_gates_saves_them_and_is_resumed(
    recipe: Path, tiny_model_dir: Path, gates: Path, tmp_path: Path, paceline: Callable[..., Any], where: list[str]
) -> None:
    options = [
        "spec.source=off",
        "rollout.max_new_tokens=160",
        "warmstart.steps=0",
        "eval.every=0",
        "sparse.learn=true",
    ]
    done: subprocess.CompletedProcess[str] = paceline(
        "train", recipe, *SPARSE, *options, *where, f"sparse.gate={gates}", "train.steps=2"
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    model_config = load_policy(tiny_model_dir, device="cpu", dtype="float32").config
    read_gates(run / "checkpoints" / "step_2" / GATES, model_config)
    done = paceline("resume", run, "train.steps=3")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    published = [record["gate_outcome"] == "published" if "gate_outcome" in record else False for record in records]
    assert [record["gate_version"] for record in records] == [sum(published[: step + 1]) for step in range(3)]
    assert sum(record["gate_samples"] for record in records) > 0
    assert (run / "checkpoints" / "step_3" / GATES / gate_lessons.TRAINING).is_file()

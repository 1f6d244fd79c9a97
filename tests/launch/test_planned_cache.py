"""The KV cache that is planned is the one that a run makes: it is derived from what is free beside the same things."""

import asyncio
import gc
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import launch.plan
import rollout.memory
import rollout.workspace
from configs.load import parse
from drafter.export import write_drafter
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from drafter.layouts import Origin
from launch.cluster import make_gate_lessons
from launch.drafting import starting_head
from launch.parts import build_worker
from launch.plan import Plan, derive
from rollout.types import Prompt, Sampling

SMALL = ["data.max_prompt_tokens=60", "rollout.max_new_tokens=20", "compute.device=cpu", "compute.dtype=float32"]
HEAD = ["spec.source=eagle", "spec.top_k=1", "drafter.draft_vocab=200", "drafter.buffer_mb=64"]
GATES = ["sparse.mode=draft", "sparse.selector=gate", "sparse.select_block=16", "sparse.sinks=0", "sparse.window=16"]
CASES = {
    "drafts of siblings": [],
    "shared optimiser states": ["compute.dtype=bfloat16", "train.zero_stage=1"],
    "a whole copy": ["compute.dtype=bfloat16", "train.zero_stage=3"],
    "states on the host": ["compute.dtype=bfloat16", "train.offload=rollout"],
    "a reference": ["train.kl_coef=0.1"],
    "a head that begins": HEAD,
    "a head that goes on": [*HEAD, "drafter.init=TRAINED/head"],
    "a head that stays as it is": [*HEAD, "drafter.init=TRAINED/head", "drafter.train=false"],
    "gates that learn": [*GATES, "sparse.gate=TRAINED/gates", "sparse.learn=true"],
    "drafts in eight bits": ["sparse.mode=draft", "sparse.weights=int8"],
}


@pytest.fixture(scope="module")
def trained(deep_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a head and gates for the deep model."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("head", "gates"):
        (folder / name).mkdir()
    policy = AutoConfig.from_pretrained(deep_model_dir)
    head = starting_head(parse("data: {name: chain_sum}", [*SMALL, *HEAD]), policy)
    origin = Origin("policy", [], "0" * 64, 1, policy.num_hidden_layers)
    write_drafter(folder / "head", head, layout="eagle3", dtype=torch.float32, origin=origin)
    gates = Gates(GateConfig.of(policy, select_block=16))
    write_gates(folder / "gates", gates, model_config=policy, base_model="deep", dtype=torch.float32)
    return folder


def held() -> dict[int, int]:
    """Bytes of every storage that this process holds, by address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_takes_off_the_caches_budget_what_a_run_holds_when_it_makes_its_cache(
    case: str, deep_model_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [each.replace("TRAINED", str(trained)) for each in CASES[case]]
    config = parse("data: {name: chain_sum}", [f"model={deep_model_dir}", *SMALL, *overrides])
    before = held()
    gc.freeze()  # what is there already is looked through no more
    taken_off: list[int] = []  # by the plan, then held by the run

    def planned(device: str, *, reserved: int) -> int:
        taken_off.append(reserved)
        return 1 << 30

    def made(device: str) -> int:
        taken_off.append(sum(size for place, size in held().items() if place not in before))
        return 1 << 30

    monkeypatch.setattr(launch.plan, "cache_budget", planned)
    monkeypatch.setattr(rollout.workspace, "cache_budget", made)
    derive(config, AutoConfig.from_pretrained(deep_model_dir))
    engine, trainer, learner = build_worker(config, deep_model_dir, device="cpu", dtype=config.compute.dtype)
    lessons = make_gate_lessons(config, engine)
    sampling = Sampling(num_samples=1, max_new_tokens=4, stop_token_ids=(), seed=0, step=0)

    async def first() -> None:
        async with aclosing(engine.generate([Prompt("a", [5, 6, 7], "")], sampling)) as rollouts:
            await anext(rollouts)

    asyncio.run(first())
    on_host = 0 if trainer._shelf is None else trainer._shelf._host.nbytes
    assert (learner is not None, lessons is not None) == ("a head" in case, case == "gates that learn")
    assert taken_off[1] - on_host == pytest.approx(taken_off[0], rel=0.002)


@pytest.mark.parametrize("init", [[], ["drafter.init=TRAINED/head"]], ids=["begins", "goes on"])
def test_of_a_gpu_the_cache_takes_its_share_before_what_lessons_of_the_head_take(
    init: list[str], deep_model_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.plan, "resolve_compute", lambda _: ("cuda", "bfloat16"))
    monkeypatch.setattr(launch.plan, "available_bytes", lambda device: 10_000_000)
    monkeypatch.setattr(rollout.memory, "available_bytes", lambda device: 10_000_000)
    overrides = [*SMALL, *HEAD, *(each.replace("TRAINED", str(trained)) for each in init)]

    def planned(*more: str) -> Plan:
        config = parse("data: {name: chain_sum}", [*overrides, "rollout.max_running=1000", *more])
        return derive(config, AutoConfig.from_pretrained(deep_model_dir))

    fixed = ["rollout.prompts_per_step=200", "drafter.batch_tokens=256", "drafter.feature_window=64"]
    small, large = planned(*fixed), planned(*fixed, "drafter.batch_tokens=2048", "drafter.buffer_mb=128")
    assert 0 < small.kv_blocks == large.kv_blocks < small.rollouts_per_step * 5, "bound by memory"
    one, other = small.memory["worker"], large.memory["worker"]
    assert other.always["drafter"] == one.always["drafter"]
    more = other.always["drafter's lessons"] - one.always["drafter's lessons"]
    assert other.total - one.total == more + (64 << 20) and more > 0
    before = ("weights", "optimiser", "gradients", "drafter", "gates", "8-bit copy")
    reserved = sum(one.always[name] for name in before)
    assert small.kv_blocks == (10_000_000 - reserved) // 2 // (one.always["KV cache"] // small.kv_blocks)

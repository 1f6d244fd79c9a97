"""The parts of measurements: agreement that notices a wrong engine, peers that fail, drafts that never match."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError, PreflightError
from drafter.types import OFF, Strategy
from launch import bench_gain
from launch.agreement import drift, verify
from launch.bench_attention import ancestor_bits, two_chains
from launch.bench_clock import compare
from launch.bench_cycle import FOUR, UNLIKELY, Job, graph_memory, hopeless_tree
from launch.bench_drift import diverge, summary
from launch.bench_peer import Peer
from launch.bench_report import WrongResultError, in_turns, spread, step_weight_bytes
from launch.bench_rollout import SPECULATIVE, Timed, generate, make_engine, random_prompts, sampling, step_ms
from launch.geometry import Subject, geometry, random_policy
from rollout.engine import NativeEngine
from rollout.graphs import GraphPool
from rollout.speculate import depths
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Sampling

# Stands in for vLLM: as talkative on standard output, and samples what it is asked for.
VLLM = """
from types import SimpleNamespace as Space
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 1.0 and ignore_eos
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, max_model_len, enable_prefix_caching, **settings):
        print("INFO making an engine")
        assert not enable_prefix_caching
        self.llm_engine = Space(model_config=Space(get_vocab_size=lambda: 1000))
    def generate(self, prompts, how, use_tqdm):
        print("INFO generating")
        assert all(0 <= token < 1000 for prompt in prompts for token in prompt["prompt_token_ids"])
        return [Space(outputs=[Space(token_ids=[1] * how.max_tokens)]) for _ in prompts]
"""


@pytest.mark.parametrize(("name", "billions"), [("smollm2-135m", 0.135), ("qwen3-1.7b", 2.03), ("qwen3-8b", 8.19)])
def test_a_geometry_has_the_parameters_of_its_name(name: str, billions: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


def test_a_random_policy_follows_its_seed_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, same, other = (random_policy("tiny", device="cpu", dtype="float32", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [next(model.parameters()) for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not first.training
    with pytest.raises(ConfigError, match="tiny"):
        geometry("tinier")


def test_an_engine_that_computes_something_else_is_not_timed() -> None:
    model, other = (random_policy("tiny", device="cpu", dtype="float32", seed=seed) for seed in (1, 2))
    engine = make_engine(model, max_running=6, tokens_each=128, chooser=FixedChooser(OFF))
    assert verify(engine, model, seed=0)["agreement"] == 1.0
    with pytest.raises(WrongResultError, match="training forward"):
        verify(engine, other, seed=0)


def test_a_result_that_differs_is_not_timed() -> None:
    ones = torch.ones(4)
    compare(ones, ones + 1e-7, "equal")
    for wrong in (ones * 1.1, ones * torch.nan):
        with pytest.raises(WrongResultError, match="what"):
            compare(wrong, ones, "what")


def test_drift_between_rollouts_and_another_policy_is_seen() -> None:
    model, other = (random_policy("tiny", device="cpu", dtype="float32", seed=seed) for seed in (1, 2))
    engine = make_engine(model, max_running=4, tokens_each=128, chooser=FixedChooser(OFF))
    prompts, how = random_prompts(2, 9, 512, seed=3), sampling(12, seed=4)
    rollouts = generate(engine, prompts, how).rollouts
    assert drift(model, prompts, rollouts, how)["max"] < 1e-4
    assert drift(other, prompts, rollouts, how)["mean"] > 1e-3


def test_where_rollouts_part_the_gap_and_the_two_best_are_told() -> None:
    model = random_policy("tiny", device="cpu", dtype="float32", seed=1)
    engine = make_engine(model, max_running=4, tokens_each=128, chooser=FixedChooser(OFF))
    prompts, how = random_prompts(1, 9, 512, seed=3), sampling(12, seed=4)
    (plain,) = generate(engine, prompts, how).rollouts
    key = (plain.prompt_id, plain.sample)
    assert diverge(model, prompts, {key: plain}, {key: plain}, how) == []
    changed = plain.token_ids[:5] + [(plain.token_ids[5] + 1) % 512] + plain.token_ids[6:]
    parted = type(plain)(**{name: getattr(plain, name) for name in plain.__slots__} | {"token_ids": changed})
    (found,) = diverge(model, prompts, {key: plain}, {key: parted}, how)
    assert found.index == 5
    assert found.gap > 0
    told = summary({key: plain}, {key: parted}, [found])
    assert told["compared"] == 6
    assert told["agreement"] == pytest.approx(5 / 6)
    assert told["rollouts_equal"] == 0


def test_a_step_is_what_the_longer_run_takes_more() -> None:
    class Clock:
        name = "clock"
        seeds: list[int] = []

        def seconds(self, *, batch: int, prompt_len: int, new_tokens: int, seed: int) -> float:
            self.seeds.append(seed)
            return 1.0 + 0.003 * new_tokens

    assert step_ms(Clock(), batch=2, prompt_len=8, new_tokens=10, seed=5) == pytest.approx(3.0)
    assert len(set(Clock.seeds)) == 2  # the second run's prompts are new


@pytest.mark.parametrize("strategy", [SPECULATIVE, *FOUR])
def test_hopeless_drafts_fill_every_strategy_they_measure(strategy: Strategy) -> None:
    tokens, parents = hopeless_tree(strategy)
    assert len(tokens) == strategy.num_verify
    assert set(tokens) <= set(UNLIKELY)
    levels = depths(parents)
    assert max(levels) == min(strategy.depth, strategy.num_verify)
    assert len({(parent, token) for parent, token in zip(parents, tokens, strict=True)}) == len(tokens)


def test_every_strategys_graphs_are_captured_at_every_batch_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[Any, ...]] = []
    run = GraphPool.run

    def seen(pool: GraphPool, key: tuple[Any, ...], launch: Callable[[], None]) -> float:
        keys.append(key)
        return run(pool, key, launch)

    monkeypatch.setattr(GraphPool, "run", seen)
    model = random_policy("tiny", device="cpu", dtype="float32", seed=0)
    job = Job(batches=(), graph_batch=9, prompt_len=64, new_tokens=1, rounds=1, seed=0)
    assert graph_memory(model, job)["batches"] == [1, 2, 3, 4, 6, 8]
    batches = [8, 6, 4, 3, 2, 1]
    first_uses = list(dict.fromkeys(key[1:3] for key in keys if key[0] == "target"))
    assert first_uses == [(batch, strategy.num_verify) for strategy in FOUR for batch in batches]
    first_uses = list(dict.fromkeys(key[1:3] for key in keys if key[0] == "draft"))
    assert first_uses == [(strategy, batch) for strategy in FOUR for batch in batches]


def test_a_tree_of_two_chains_sees_along_each() -> None:
    parents = two_chains(5, depth=3)
    assert parents == [-1, 0, 1, -1, 3]
    assert ancestor_bits(parents) == [0b1, 0b11, 0b111, 0b1000, 0b11000]


def test_a_spread_keeps_every_round() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}


def test_a_step_reads_the_input_embedding_only_where_it_makes_the_logits() -> None:
    tied = random_policy("tiny", device="cpu", dtype="float32", seed=0)
    assert step_weight_bytes(tied) == sum(p.numel() * 4 for p in tied.parameters())
    embedding = tied.get_input_embeddings().weight.numel() * 4
    tied.config.tie_word_embeddings = False
    assert step_weight_bytes(tied) == sum(p.numel() * 4 for p in tied.parameters()) - embedding


def test_sides_take_turns_to_be_first_after_a_round_that_does_not_count() -> None:
    assert list(in_turns("ab", 2)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_engines_whose_gains_are_taken_sample_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[list[list[int]]] = []

    def kept(engine: NativeEngine, prompts: Sequence[Prompt], how: Sampling) -> Timed:
        timed = generate(engine, prompts, how)
        sampled.append(sorted(rollout.token_ids for rollout in timed.rollouts))
        return timed

    monkeypatch.setattr("launch.bench_gain.generate", kept)
    subject = Subject.load("tiny", None, device="cpu", dtype="float32", seed=0)
    bench_gain.run(subject, bench_gain.Job(batches=(3,), new_tokens=6, rounds=1, seed=0))
    calls = bench_gain.calls_each(3)
    timed = sampled[-2 * 3 * calls :]  # two rounds of three engines; before them graphs are captured
    first, second = (
        [timed[start : start + calls] for start in range(begin, begin + 3 * calls, calls)] for begin in (0, 3 * calls)
    )
    assert first == [first[0]] * 3 and second == [second[0]] * 3
    assert first[0] != second[0]


def test_random_prompts_are_new_ones_each_time() -> None:
    first, second = (random_prompts(2, 4, 50, seed=1) for _ in range(2))
    assert len({prompt.id for prompt in (*first, *second)}) == 4
    assert [prompt.token_ids for prompt in first] == [prompt.token_ids for prompt in second]


def test_the_peers_script_answers_orders_on_a_clean_stdout(tmp_path: Path) -> None:
    package, about = tmp_path / "vllm", tmp_path / "vllm-0.26.0.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text(VLLM)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    job = {"model": "m", "load_format": "dummy", "max_len": 64, "max_num_seqs": 4, "memory": 0.5, "kv_bytes": None}
    with Peer(Path(sys.executable), job, environment={"PYTHONPATH": str(tmp_path)}) as peer:
        assert peer.ready["versions"]["vllm"] == "0.26.0"
        assert peer.ready["settings"]["load_format"] == "dummy"
        assert peer.seconds(batch=3, prompt_len=5, new_tokens=7, seed=1) > 0


def test_a_peer_that_ends_is_reported_with_its_last_word(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nraise SystemExit('out of luck')\n")
    python.chmod(0o755)
    with Peer(python, {}) as peer, pytest.raises(PreflightError, match="ended with 1: out of luck"):
        _ = peer.ready

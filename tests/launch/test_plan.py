"""The plan: sizes that follow from a configuration."""

from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import drafter.export
import launch.memory
import launch.plan
import rollout.memory
from configs.errors import ConfigError, PacelineError, PreflightError
from configs.load import parse
from drafter.eagle import EagleConfig, EagleHead
from drafter.export import write_drafter
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from drafter.layouts import Origin
from launch.memory import Memory
from launch.plan import Plan, derive, table
from launch.shares import count_parameters
from rl.rundir import RunDir
from rollout.model import forward_packed


@pytest.fixture
def model_config(tiny_model_dir: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(tiny_model_dir)


def plan_for(model_config: PretrainedConfig, *overrides: str) -> Plan:
    small = ["data.max_prompt_tokens=100", "rollout.max_new_tokens=28", "compute.device=cpu", "compute.dtype=float32"]
    return derive(parse("data: {name: chain_sum}", [*small, *overrides]), model_config)


def test_parameters_are_counted_without_allocating(model_config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(model_config)
    assert model_config.tie_word_embeddings
    assert count_parameters(model_config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_plan_misses_a_gpu_that_could_not_attend(
    model_config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.plan, "resolve_compute", lambda compute: ("cuda", "float32"))
    model_config.num_attention_heads, model_config.num_key_value_heads = 64, 1
    with pytest.raises(PreflightError, match="64 query heads of 16 share a key head.*; set compute.dtype=bfloat16"):
        plan_for(model_config)


def test_sizes_follow_from_the_configuration(model_config: PretrainedConfig) -> None:
    plan = plan_for(model_config, "rollout.prompts_per_step=3", "rollout.group_size=5", "train.micro_tokens=256")
    assert (plan.rollouts_per_step, plan.max_sequence_tokens, plan.max_tokens_per_step) == (15, 128, 15 * 128)
    assert plan.max_microbatches_per_step == 8  # two of the longest in each pass
    assert plan.kv_blocks == 15 * 8
    # 2 layers, keys and values, 16 tokens, 2 heads of 16, float32
    held = plan.memory["worker"].always
    assert held["KV cache"] == 120 * 2 * 2 * 16 * 2 * 16 * 4
    assert held["weights"] == plan.parameters * 4
    assert plan.warnings == ()


def test_workers_share_prompts_and_optimiser(model_config: PretrainedConfig) -> None:
    one, two = plan_for(model_config), plan_for(model_config, "compute.backend=ray", "compute.workers=2")
    assert two.running_sequences * 2 == one.running_sequences
    assert two.memory["worker"].always["optimiser"] * 2 == one.memory["worker"].always["optimiser"]


def test_engines_and_trainers_of_their_own_are_planned_apart(model_config: PretrainedConfig) -> None:
    together = plan_for(model_config, "train.kl_coef=0.1").memory["worker"]
    options = ["compute.backend=ray", "compute.placement=separate", "compute.rollout_workers=3", "train.kl_coef=0.1"]
    plan = plan_for(model_config, *options)
    trainer, engine = plan.memory["trainer"], plan.memory["engine"]
    assert plan.running_sequences == 24  # three of the eight prompts
    assert trainer.always.keys() & {"KV cache", "drafter"} == set() == engine.always.keys() & {"optimiser", "reference"}
    assert trainer.total < together.total > engine.total
    out = StringIO()
    Console(file=out, width=100).print(table(plan))
    assert "1 + 3 x cpu" in out.getvalue() and "memory, trainer" in out.getvalue()


def test_engines_that_share_a_policy_hold_a_share_each(model_config: PretrainedConfig) -> None:
    separate = ["compute.backend=ray", "compute.placement=separate", "compute.rollout_workers=4"]
    model_config.vocab_size = 260
    whole, plan = (plan_for(model_config, *separate, f"rollout.tensor_parallel={size}") for size in (1, 2))
    alone, engine = whole.memory["engine"], plan.memory["engine"]
    assert plan.running_sequences == 2 * whole.running_sequences  # two engines, not four
    assert plan.kv_blocks == 2 * whole.kv_blocks and engine.always["KV cache"] == alone.always["KV cache"]
    model = AutoModelForCausalLM.from_config(model_config)
    halved = sum(each.weight.numel() for name, each in model.named_modules() if name.endswith("_proj")) // 2
    assert engine.always["weights"] == alone.always["weights"] - 4 * halved  # its embedding is tied, and stays whole
    assert (alone.training["uncut"], engine.training["uncut"]) == (0, 4 * 64 * 128)
    out = StringIO()
    Console(file=out, width=120).print(table(plan))
    assert "1 + 4 x cpu, engines of 2" in out.getvalue()
    model_config.tie_word_embeddings = False
    untied = plan_for(model_config, *separate, "rollout.tensor_parallel=2").memory["engine"]
    assert untied.always["weights"] == engine.always["weights"] + 4 * 260 * 64 // 2
    assert untied.training["uncut"] == 4 * 260 * 64


@pytest.mark.parametrize(
    ("size", "what"), [(4, "num_key_value_heads=2"), (2, "vocab_size=259"), (3, "num_attention_heads=4")]
)
def test_engines_that_cannot_share_a_policy_are_found_before_anything_starts(
    size: int, what: str, model_config: PretrainedConfig
) -> None:
    options = ["compute.placement=separate", f"compute.rollout_workers={size}", f"rollout.tensor_parallel={size}"]
    with pytest.raises(PreflightError, match=f"rollout.tensor_parallel={size} does not divide the model's {what}"):
        plan_for(model_config, "compute.backend=ray", *options)


def test_ranks_that_cannot_share_the_heads_are_found_before_anything_starts(model_config: PretrainedConfig) -> None:
    three = ["compute.backend=ray", "compute.workers=3", "train.sequence_parallel=3"]
    with pytest.raises(PreflightError, match="train.sequence_parallel=3 does not divide the model's 4 attention heads"):
        plan_for(model_config, *three)


def test_a_learned_drafter_is_counted_and_what_it_could_give_up_is_named(
    model_config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plan_for(model_config, "spec.source=suffix", "spec.top_k=1")
    parts = ("drafter", "drafter's lessons", "drafter's cache", "features")
    assert [plain.memory["worker"].always[part] for part in parts] == [0, 0, 0, 0]
    learned = plan_for(model_config, "spec.source=eagle", "spec.top_k=1", "drafter.buffer_mb=64")
    added = [learned.memory["worker"].always[part] for part in parts]
    assert all(added) and added[-1] > 64 << 20
    assert learned.memory["worker"].total == plain.memory["worker"].total + sum(added)
    out = StringIO()
    Console(file=out, width=80).print(table(learned))
    assert "features" in out.getvalue() and "drafter's cache" in out.getvalue()
    monkeypatch.setattr(launch.plan, "available_bytes", lambda device: 1_000_000)
    (warning,) = plan_for(model_config, "spec.source=eagle", "spec.top_k=1").warnings
    assert "lower drafter.buffer_mb, drafter.feature_window" in warning


def test_what_a_forward_pass_leaves_is_found_once(
    model_config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []  # by their tokens

    def forward(model: PreTrainedModel, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(input_ids))
        return forward_packed(model, input_ids, *rest)

    monkeypatch.setattr(launch.memory, "forward_packed", forward)
    plan_for(model_config, "train.micro_tokens=256")  # the cache is derived from the memory that the rest leaves
    assert passes == [256]


def test_planning_reads_no_weight_of_the_drafter_it_starts_from(
    model_config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin("policy", [], "0" * 64, 1, 3)
    shape = replace(EagleConfig.of(model_config, draft_vocab=100, window=64), aux_layers=(0, 1, 2))
    write_drafter(tmp_path, EagleHead(shape), layout="eagle3", dtype=torch.float32, origin=origin)

    def reads(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(drafter.export, "load_file", reads)
    monkeypatch.setattr(EagleConfig, "of", lambda *_, **__: shape)
    options = ["spec.source=eagle", "spec.top_k=1", f"drafter.init={tmp_path}"]
    assert plan_for(model_config, *options).memory["worker"].always["drafter"] > 0
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PreflightError, match="holds no drafter that can be read"):
        plan_for(model_config, *options)


def test_a_drafter_that_cannot_be_trained_is_found_before_a_run_is_made(model_config: PretrainedConfig) -> None:
    with pytest.raises(ConfigError, match="drafter.unroll=16 does not fit drafter.window=16"):
        plan_for(model_config, "spec.source=eagle", "spec.top_k=1", "drafter.unroll=16", "drafter.window=16")


def test_a_gpu_without_fp8_is_found_before_a_run_is_made(
    model_config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("launch.plan.resolve_compute", lambda _: ("cuda", "bfloat16"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(PreflightError, match=r"8\.0 has no such type"):
        plan_for(model_config, "sparse.mode=draft", "sparse.weights=fp8", "sparse.budget_tokens=300")
    written = Gates(GateConfig.of(model_config, select_block=16))
    write_gates(tmp_path, written, model_config=model_config, base_model="tiny", dtype=torch.bfloat16)
    gates = [f"sparse.gate={tmp_path}", "sparse.selector=gate", "sparse.select_block=16", "sparse.descriptors=fp8"]
    gates += ["sparse.budget_tokens=300", "rollout.kv_tokens=4096"]
    for some_by_gates in ([], ["sparse.dense_layers=1"], ["sparse.layers.0.selector=quest"]):
        with pytest.raises(PreflightError, match=r"8\.0 has no such type.*set sparse\.descriptors=policy"):
            plan_for(model_config, "sparse.mode=draft", *gates, *some_by_gates)
    monkeypatch.setattr(launch.plan, "available_bytes", lambda device: 1 << 30)
    plan_for(model_config, "sparse.mode=off", *gates)
    for none_by_gates in ("sparse.dense_layers=2", "sparse.layers.0-1.selector=quest"):
        plan_for(model_config, "sparse.mode=draft", *gates, none_by_gates)


def test_speculation_off_verifies_nothing(model_config: PretrainedConfig) -> None:
    assert plan_for(model_config, "spec.source=off").speculation.startswith("off")


def test_the_plan_says_where_samples_are_not_the_dense_policys(model_config: PretrainedConfig) -> None:
    lossy = plan_for(model_config, "spec.source=off", "sparse.mode=plain", "sparse.budget_tokens=300")
    assert lossy.speculation == "plain: sampled under quest, 300 tokens read, not as dense"
    layers = "sparse.layers={0: {selector: streaming, budget_tokens: 128}}"
    mixed = plan_for(model_config, "spec.source=off", "sparse.mode=plain", "sparse.budget_tokens=300", layers)
    read = "streaming, 128 tokens read, or quest, 300 tokens read"
    assert mixed.speculation == f"plain: sampled under {read}, not as dense"
    rectified = plan_for(model_config, "spec.source=off", "sparse.mode=rectified", layers)
    assert (
        rectified.speculation
        == "rectified: sampled under streaming, 128 tokens read, or quest, 1,024 tokens read, not as dense"
    )


def test_the_plan_says_how_deep_the_policy_drafts_and_under_what(model_config: PretrainedConfig) -> None:
    alone = plan_for(model_config, "spec.source=off", "sparse.mode=draft", "sparse.budget_tokens=300")
    assert alone.speculation == "sparse, fixed: chains, up to 8 deep, 8 verified, under quest, 300 tokens read"
    beside = plan_for(model_config, "sparse.mode=draft", "sparse.budget_tokens=300", "sparse.depth=4")
    under = "chains, up to 4 deep, 4 verified, under quest, 300 tokens read"
    assert beside.speculation == f"suffix and sparse, fixed: chains, up to 6 deep, 6 verified; {under}"
    sources = plan_for(model_config, "spec.source=auto")
    assert sources.speculation == "suffix and eagle, fixed: chains, up to 6 deep, 6 verified"


def test_the_plan_says_who_chooses_and_that_a_chain_has_a_node_a_level(model_config: PretrainedConfig) -> None:
    chain = plan_for(model_config, "spec.depth=4", "spec.num_verify=15")
    assert chain.speculation == "suffix, fixed: chains, up to 4 deep, 4 verified"  # auto, on a CPU
    tree = plan_for(model_config, "spec.depth=4", "spec.num_verify=15", "spec.top_k=2", "spec.choice=beg_mab")
    assert tree.speculation == "suffix, beg_mab: trees of 2 children a node, up to 4 deep, 15 verified"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.max_new_tokens=500"], "exceeds the model's context of 512"),
        (["rollout.kv_tokens=256"], "holds 2 of 64 sequences at full length"),
        (["sparse.mode=draft"], "sparse.budget_tokens=1024 is all of the longest sequence's 128 tokens"),
        (
            [
                "sparse.mode=draft",
                "sparse.selector=streaming",
                "sparse.budget_tokens=100",
                "sparse.layers.1.budget_tokens=512",
            ],
            "sparse.layers.1.budget_tokens=512 is all of the longest sequence's 128 tokens",
        ),
    ],
)
def test_what_will_hurt_is_warned_about(model_config: PretrainedConfig, overrides: list[str], said: str) -> None:
    assert any(said in warning for warning in plan_for(model_config, *overrides).warnings)


def test_what_the_verified_selector_keeps_of_rows_is_counted(model_config: PretrainedConfig) -> None:
    options = ("sparse.mode=draft", "spec.source=off", "rollout.max_running=6")
    kept = plan_for(model_config, *options, "sparse.selector=verified").memory["worker"]
    # 2 layers, 6 rows and one for nobody, 2 heads, 1024 tokens and 8 drafted ones in blocks of 16, float32
    assert kept.always["block weights"] == 2 * (6 + 1) * 2 * 65 * 4
    other = plan_for(model_config, *options, "sparse.selector=quest").memory["worker"]
    assert other.always["block weights"] == 0
    one = plan_for(model_config, *options, "sparse.layers.1.selector=verified").memory["worker"]
    assert one.always["block weights"] == kept.always["block weights"] // 2


def test_what_selectors_keep_of_the_cache_is_counted_by_layer(model_config: PretrainedConfig) -> None:
    options = ("sparse.mode=draft", "spec.source=off", "rollout.kv_tokens=2048", "sparse.select_block=16")

    def cache(*more: str) -> int:
        return plan_for(model_config, *options, *more).memory["worker"].always["KV cache"]

    bare = cache("sparse.selector=streaming")
    assert cache() == bare * 17 // 16
    assert cache("sparse.layers.0.selector=dense") == cache("sparse.dense_layers=1") == bare * 33 // 32
    assert cache("sparse.layers.0.selector=mean") == bare * 67 // 64


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sparse.selector=gate", "sparse.gate=GATES", "rollout.block_size=64"], "GATES holds no gates"),
        (["sparse.layers.2-.budget_tokens=512"], "sparse.layers.2-: the policy's layers are 0 to 1"),
    ],
)
def test_a_plan_misses_what_sparse_attention_would(
    model_config: PretrainedConfig, overrides: list[str], said: str
) -> None:
    with pytest.raises(PacelineError, match=said):
        plan_for(model_config, "sparse.mode=draft", *overrides)


def test_a_control_group_bounds_the_cache_as_it_bounds_the_engines(
    model_config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout.memory, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("0\n")
    # a block is 2 layers, keys and values, 16 tokens, 2 heads of 16, float32
    (tmp_path / "memory.max").write_text(f"{4 * 20 * 2 * 2 * 16 * 2 * 16 * 4}\n")
    assert plan_for(model_config).kv_blocks == 20
    (tmp_path / "memory.max").write_text(f"{4 * 7 * 2 * 2 * 16 * 2 * 16 * 4}\n")
    assert "the KV cache holds 7 blocks and a sequence may take 8" in plan_for(model_config).warnings[0]


def test_too_little_memory_is_warned_about(model_config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.plan, "available_bytes", lambda device: 1_000_000)
    (warning,) = plan_for(model_config).warnings
    assert "may not fit in the 0.00 GB available" in warning


def test_processes_on_one_machine_share_its_memory(
    model_config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.plan, "available_bytes", lambda device: 12_000)
    assert plan_for(model_config).available_bytes == 12_000
    two = ["compute.backend=ray", "compute.workers=2"]
    assert plan_for(model_config, *two).available_bytes == 6_000
    separate = plan_for(model_config, *two, "compute.placement=separate", "compute.rollout_workers=1")
    assert separate.available_bytes == 4_000


def test_passes_over_the_prompts_are_told_where_their_number_is_known(model_config: PretrainedConfig) -> None:
    sizes = ["train.steps=20", "rollout.prompts_per_step=8", "data.size=40"]
    for source, passes in (("reasoning_gym", 4), ("file", None), ("hub", None)):
        plan = plan_for(model_config, f"data.source={source}", *sizes)
        assert plan.epochs == passes
        out = StringIO()
        Console(file=out, width=80).print(table(plan))
        assert ("passes over the prompts" in out.getvalue()) == (passes is not None)


def test_plan_is_json_and_a_table(model_config: PretrainedConfig, tmp_path: Path) -> None:
    plan = plan_for(model_config)
    with RunDir.create(parse("data: {name: x}", [f"run.dir={tmp_path / 'run'}"]), "") as run:
        run.write_plan(asdict(plan))
    out = StringIO()
    Console(file=out, width=80).print(table(replace(plan, memory={"worker": Memory(always={"reference": 10**9})})))
    assert "1.00 GB" in out.getvalue()
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())

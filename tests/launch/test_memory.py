"""Planned memory is what a trainer then takes."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from configs.load import parse
from drafter.buffer import is_heldout
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from drafter.gate_learner import GateLearner
from drafter.gate_training import LayerSample
from drafter.memory import NO_DRAFTER
from kernels.attention import PackedSequences
from launch.geometry import geometry
from launch.memory import Memory, Sizes, graph_bytes, memory_of, saved_bytes
from launch.plan import derive, lowbit_bytes
from launch.shares import share_of
from rl.batch import supervised_batch
from rl.trainer import DeepSpeedTrainer
from rollout import gate_sampler
from rollout.model import ATTENTION, forward_packed, load_policy
from rollout.selectors import make_sparse

KINDS = [
    ("float32", 0),
    ("float32", 1),
    ("float32", 2),
    ("float32", 3),
    ("bfloat16", 1),
    ("bfloat16", 2),
    ("bfloat16", 3),
]
RESULTS = Path(__file__).parents[2] / "docs/results"


def planned(model_config: PretrainedConfig, dtype: str, *overrides: str) -> dict[str, Memory]:
    config = parse("data: {name: chain_sum}", [*overrides])
    with torch.device("meta"):
        parameters = sum(each.numel() for each in AutoModelForCausalLM.from_config(model_config).parameters())
    share = share_of(model_config, 1)
    kind = getattr(torch, dtype)
    saved = saved_bytes(model_config, 64, kind)
    sizes = Sizes(parameters, kind, "cpu", config.compute.workers, 64, 8, 1000, NO_DRAFTER, share, saved)
    return memory_of(config, model_config, sizes)


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
def test_what_stays_between_steps_is_what_a_trainer_holds(tiny_model_dir: Path, dtype: str, stage: int) -> None:
    gc.collect()
    gc.freeze()  # what is there already is none of the trainer's, and is looked through no more
    policy = load_policy(tiny_model_dir, device="cpu", dtype=dtype)
    config = parse("data: {name: chain_sum}", [f"train.zero_stage={stage}"])
    trainer = DeepSpeedTrainer(policy, config.train, total_steps=2, temperature=1.0, device="cpu")
    trainer.supervise(supervised_batch([[5, 6, 7]], [[8, 20, 2]]), 1e-3)
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor) and each.device.type == "cpu"
    }
    memory = planned(AutoConfig.from_pretrained(tiny_model_dir), dtype, f"train.zero_stage={stage}")["worker"]
    states = {name: size for name, size in memory.always.items() if name not in ("KV cache", "whole copy")}
    # ZeRO 1 and 2 leave a bucket of gradients behind, which the next step fills again
    left = 4 * trainer.shares.shapes["model.embed_tokens.weight"].numel() if stage in (1, 2) else 0
    expected = sum(states.values())
    assert expected * 0.99 < sum(storages.values()) < (expected + 2 * left) * 1.03


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4),
        Qwen3Config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32,
        ),
    ],
    ids=["llama", "qwen3"],
)  # fmt: skip
def test_activations_are_what_a_forward_pass_keeps(config: PretrainedConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        own = {each.untyped_storage().data_ptr() for each in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict = kept) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        index = torch.arange(90)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            seqs = PackedSequences(torch.tensor([0, 90], dtype=torch.int32), 90)
            forward_packed(model, index, index, seqs, index[:1])
        found = sum(each.nbytes() for each in kept.values())
        # the CPU's attention reads keys of fewer heads as they are, a GPU's a copy for every query head; its output is
        # kept twice, a GPU's once
        size = 90 * config.head_dim * dtype.itemsize * config.num_hidden_layers
        more = (2 * (config.num_attention_heads - config.num_key_value_heads) - config.num_attention_heads) * size
        assert saved_bytes(config, 90, dtype) == pytest.approx(found + more, rel=0.01)


def test_offloaded_states_and_the_cache_take_turns(tiny_model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    kept, lent = (planned(config, "bfloat16", f"train.offload={how}")["worker"] for how in ("none", "rollout"))
    beside = {"KV cache", "block weights", "CUDA graphs"}
    assert kept.always.keys() - lent.always.keys() == {"optimiser", "gradients", "reference", *beside}
    assert lent.total < kept.total
    assert sum(lent.training.values()) - sum(kept.training.values()) == 8 * kept.always["weights"]


def test_shares_of_parameters_leave_a_whole_copy_to_sample_from(tiny_model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    options = ["train.zero_stage=3", "compute.backend=ray", "compute.workers=4"]
    worker = planned(config, "bfloat16", *options)["worker"]
    assert worker.always["whole copy"] == 4 * worker.always["weights"]
    apart = planned(config, "bfloat16", *options, "compute.placement=separate")
    assert "whole copy" not in apart["trainer"].always
    assert apart["engine"].always["weights"] == worker.always["whole copy"]


def test_checkpointing_keeps_a_layer_and_the_boundaries(tiny_model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    plain = planned(config, "bfloat16")["worker"].training["activations"]
    checkpointed = planned(config, "bfloat16", "train.gradient_checkpointing=true")["worker"].training["activations"]
    assert checkpointed == plain // 2 + 2 * 64 * 64 * 2


def test_graphs_take_what_an_h100_measured() -> None:
    measured = json.loads((RESULTS / "graphs_h100.json").read_text())
    strategy, config = measured["strategy"], parse("data: {name: chain_sum}", [])
    spec = replace(config.spec, depth=strategy["depth"], top_k=strategy["top_k"], num_verify=strategy["num_verify"])
    share = share_of(geometry(measured["model"]), 1)
    sizes = Sizes(0, torch.bfloat16, "cuda", 1, 0, max(measured["graphs"]["batches"]), 0, NO_DRAFTER, share, 0)
    assert len(measured["graphs"]["strategies"]) == 4, "as many widths as our arms have"
    planned = graph_bytes(replace(config, spec=spec), geometry(measured["model"]), sizes)
    assert planned == pytest.approx(measured["graphs"]["four_bytes"], rel=0.1)
    few = replace(config, rollout=replace(config.rollout, graph_mb=64))
    assert graph_bytes(few, geometry(measured["model"]), sizes) == 64 << 20


def test_a_copy_in_eight_bits_is_counted_as_it_is_held(tiny_model_dir: Path) -> None:
    policy = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    model_config = AutoConfig.from_pretrained(tiny_model_dir)
    assert lowbit_bytes(parse("data: {name: chain_sum}", []).sparse, model_config) == 0
    config = parse("data: {name: chain_sum}", ["sparse.mode=draft", "sparse.weights=int8"])
    copy = make_sparse(config.sparse, policy).lowbit
    assert copy is not None
    assert lowbit_bytes(config.sparse, model_config) == copy.num_bytes
    plan = derive(config, model_config)
    assert plan.memory["worker"].always["8-bit copy"] == copy.num_bytes
    read = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + policy.lm_head.weight.numel()
    assert read < copy.num_bytes < 1.2 * read


def test_gates_are_counted_as_they_are_held_and_what_they_learn_from_at_most(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    policy = load_policy(tiny_model_dir, device="cpu", dtype="bfloat16")
    gates = Gates(GateConfig.of(policy.config, select_block=16))
    write_gates(tmp_path, gates, model_config=policy.config, base_model="tiny", dtype=torch.bfloat16)
    options = ["sparse.mode=draft", "sparse.selector=gate", f"sparse.gate={tmp_path}", "sparse.select_block=16"]
    options += ["sparse.sinks=0", "sparse.window=16", "compute.dtype=bfloat16", "compute.device=cpu"]
    names = ("gates", "gates' lessons", "gate samples")

    def planned_for(*more: str) -> list[int]:
        always = derive(parse("data: {name: chain_sum}", [*options, *more]), policy.config).memory["worker"].always
        return [always[name] for name in names]

    own = sum(parameter.nbytes for parameter in gates.to(torch.bfloat16).parameters())
    assert planned_for() == [own, 0, 0]
    learner = GateLearner(gates, lr=1e-3, budget_blocks=1)
    generator = torch.Generator().manual_seed(0)
    sample = LayerSample(
        0,
        torch.randn(4, 4, 16, generator=generator),
        torch.arange(60, 64),
        torch.randn(48, 2, 16, generator=generator),
        torch.rand(4, 2, 4, generator=generator),
    )
    taught = next(name for name in map(str, range(9)) if not is_heldout(name))
    assert [each.applied for each in learner.learn([(taught, sample)])] == [True]
    kept = sum(tensor.nbytes for name, tensor in learner.state_dict().items() if tensor.ndim)
    weights, training, samples = planned_for("sparse.learn=true")
    assert weights == 3 * own and training == 6 * own  # float32 is twice as wide
    assert weights - own + training == kept + 2 * own, "moments and the copy stay, a gradient comes and goes"
    longest = 1024 + 256
    assert samples == 256 * longest * sample.keys[0].numel() * 2
    assert planned_for("sparse.learn=true", "rollout.max_new_tokens=100000")[2] == gate_sampler.MAX_BYTES

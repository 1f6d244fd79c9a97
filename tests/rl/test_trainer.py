import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from configs.errors import DivergedError, StorageError
from configs.schema import TrainConfig
from kernels.attention import PackedSequences
from rl.batch import pack, supervised_batch
from rl.schedule import learning_rate
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch, Group
from rollout.model import AttentionContext, load_policy
from rollout.projections import side_by_side

MakeTrainer = Callable[..., DeepSpeedTrainer]
# in bfloat16, stage 0 runs as stage 1
IN_PLACE = [("float32", 0), ("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
KINDS = [*IN_PLACE, ("float32", 3), ("bfloat16", 3)]
in_place = pytest.mark.parametrize(("dtype", "stage"), IN_PLACE)
by_kind = pytest.mark.parametrize(("dtype", "stage"), KINDS)


def gradients(trainer: DeepSpeedTrainer) -> dict[str, torch.Tensor]:
    """The first update's gradients, which Adam has as exp_avg / (1 - beta1)."""
    return {name: trainer.shares.moment(name, "exp_avg") / (1 - trainer.config.betas[0]) for name in trainer.params}


def parameters(trainer: DeepSpeedTrainer) -> dict[str, torch.Tensor]:
    return {name: param.clone() for name, param in trainer.whole_parameters(at_a_time=1)}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    """Equal up to rtol of each tensor's largest entry."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        largest = float(expected[name].abs().max())
        error = float((tensor - expected[name].to(tensor)).abs().max())
        assert error <= rtol * largest, f"{name}: off by {error:g} where the largest is {largest:g}"


def padded_float64_gradients(model_dir: Path, batch: Batch, config: TrainConfig, temperature: float) -> dict:
    """The definition: transformers' own attention, right-padded, float64, one sequence's loss after another."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").double()
    reference = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").double()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.01)  # a policy that has left its reference
    bounds = batch.cu_seqlens.tolist()
    width = max(batch.cu_seqlens.diff().tolist())
    total = torch.zeros((), dtype=torch.float64)
    for start, end in zip(bounds, bounds[1:], strict=False):
        ids = F.pad(batch.token_ids[start:end], (0, width - (end - start)))[None]
        attended = (torch.arange(width) < end - start)[None]
        logp, reference_logp = (
            torch.log_softmax(each(ids, attention_mask=attended.long()).logits[0] / temperature, dim=1)
            for each in (model, reference)
        )
        for t in range(1, end - start):
            if not batch.loss_mask[start + t]:
                continue
            token = ids[0, t]
            new, other = logp[t - 1, token], reference_logp[t - 1, token].detach()
            weight = torch.exp(new.detach() - batch.old_logprobs[start + t].double()).clamp(max=config.importance_cap)
            ratio = torch.exp(new - new.detach())
            kl = torch.exp(other - new) - (other - new) - 1
            total = total - weight * ratio * batch.advantages[start + t].double() + config.kl_coef * kl
    (total / int(batch.loss_mask.sum())).backward()
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("micro_tokens", [30, 10_000])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_packed_gradients_equal_padded_float64_ones(
    tiny_model_dir: Path, make_trainer: MakeTrainer, batch: Batch, stage: int, micro_tokens: int
) -> None:
    trainer = make_trainer(zero_stage=stage, kl_coef=0.5, micro_tokens=micro_tokens)
    trainer.reference = parameters(trainer)
    with torch.no_grad():
        for param in trainer.params.values():
            param.mul_(1.01)
    expected = padded_float64_gradients(tiny_model_dir, batch, trainer.config, trainer.temperature)
    stats = trainer.step(batch)
    assert_close(gradients(trainer), expected, rtol=2e-5)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert stats.kl > 0


def test_bfloat16_gradients_add_up_in_float32(make_trainer: MakeTrainer, batch: Batch) -> None:
    expected = make_trainer(zero_stage=0)
    expected.step(batch)
    for stage in (0, 1, 2):
        trainer = make_trainer(dtype="bfloat16", zero_stage=stage, micro_tokens=30)
        trainer.step(batch)
        actual = gradients(trainer)
        assert all(gradient.dtype == torch.float32 for gradient in actual.values())
        for name, gradient in gradients(expected).items():
            assert float(F.cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0)) > 0.99, name


def test_checkpointed_gradients_are_the_same(make_trainer: MakeTrainer, batch: Batch) -> None:
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    plain.step(batch)
    checkpointed.step(batch)
    assert_close(gradients(checkpointed), gradients(plain), rtol=1e-6)
    assert not checkpointed.policy.training  # the engine samples from the same module


def test_prompt_tokens_teach_nothing(make_trainer: MakeTrainer, batch: Batch) -> None:
    noisy = replace(
        batch,
        advantages=torch.where(batch.loss_mask, batch.advantages, 1e6),
        old_logprobs=torch.where(batch.loss_mask, batch.old_logprobs, -1e6),
    )
    clean, other = make_trainer(), make_trainer()
    assert replace(clean.step(batch), seconds=0) == replace(other.step(noisy), seconds=0)
    assert_close(gradients(other), gradients(clean), rtol=0)


@in_place
def test_parameters_keep_their_storage_and_what_they_share(
    make_trainer: MakeTrainer, batch: Batch, dtype: str, stage: int
) -> None:
    trainer = make_trainer(dtype=dtype, zero_stage=stage)
    model = trainer.policy.policy
    views = [param.detach() for param in trainer.params.values()]  # as an engine would hold them
    pointers = [param.data_ptr() for param in trainer.params.values()]
    before = parameters(trainer)
    for _ in range(3):
        trainer.step(batch)
    assert [param.data_ptr() for param in trainer.params.values()] == pointers
    assert all(torch.equal(view, param) for view, param in zip(views, trainer.params.values(), strict=True))
    assert any(not torch.equal(before[name], param) for name, param in trainer.params.items())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    # rotary angles lose their meaning at long positions in bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


@by_kind
def test_resumed_training_is_bit_equal(
    make_trainer: MakeTrainer, batch: Batch, tmp_path: Path, dtype: str, stage: int
) -> None:
    options = {"dtype": dtype, "zero_stage": stage, "schedule": "cosine", "max_grad_norm": 0.5}
    options |= {} if stage == 3 else {"kl_coef": 0.1}
    straight = make_trainer(**options)
    straight.supervise(batch, 1e-2)
    for _ in range(2):
        straight.step(batch)
    straight.save(tmp_path)
    resumed = make_trainer(**options)
    resumed.step(batch)  # whatever it held before is forgotten
    resumed.load(tmp_path)
    for _ in range(2):
        assert replace(straight.step(batch), seconds=0) == replace(resumed.step(batch), seconds=0)
    assert_close(parameters(resumed), parameters(straight), rtol=0)
    again = tmp_path / "again"
    again.mkdir()
    resumed.save(again)
    straight.save(tmp_path)
    files = sorted(file.name for file in again.iterdir())
    assert files[:2] == ["optimizer.safetensors", "params.safetensors"] and ("reference.safetensors" in files) == (
        stage < 3
    )
    for file in files:
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes(), file


@by_kind
def test_checkpoint_of_an_untrained_policy_loads(
    make_trainer: MakeTrainer, batch: Batch, tmp_path: Path, dtype: str, stage: int
) -> None:
    fresh = make_trainer(dtype=dtype, zero_stage=stage)
    fresh.save(tmp_path)
    other = make_trainer(dtype=dtype, zero_stage=stage)
    other.step(batch)
    other.load(tmp_path)
    assert replace(fresh.step(batch), seconds=0) == replace(other.step(batch), seconds=0)
    assert_close(parameters(other), parameters(fresh), rtol=0)


def test_checkpoint_moves_between_stages(make_trainer: MakeTrainer, batch: Batch, tmp_path: Path) -> None:
    plain = make_trainer(zero_stage=0)
    plain.step(batch)
    plain.save(tmp_path)
    sharded = make_trainer(zero_stage=2)
    sharded.load(tmp_path)
    assert_close(parameters(sharded), parameters(plain), rtol=0)
    assert plain.step(batch).loss == pytest.approx(sharded.step(batch).loss)
    assert_close(gradients(sharded), gradients(plain), rtol=1e-5)


def test_checkpoint_holds_the_policy_in_its_dtype_tied_weights_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(dtype="bfloat16")
    trainer.save(tmp_path)
    saved = load_file(tmp_path / "params.safetensors")
    assert saved.keys() == {name for name, _ in trainer.policy.policy.named_parameters()}
    assert "lm_head.weight" not in saved
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values())


def test_checkpoint_of_another_dtype_or_model_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path)
    with pytest.raises(StorageError, match="compute.dtype=float32"):
        make_trainer(dtype="bfloat16").load(tmp_path)
    trainer.shares.shapes["extra"] = torch.Size([3])
    with pytest.raises(StorageError, match=r"extra as None, the model as \[3\]"):
        trainer.load(tmp_path)


@in_place
def test_projections_with_biases_stay_side_by_side_under_deepspeed(tmp_path: Path, dtype: str, stage: int) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=259, num_hidden_layers=2, **shape)).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu", dtype=dtype)
    config = TrainConfig(zero_stage=stage)
    DeepSpeedTrainer(policy, config, total_steps=1, temperature=1.0, device="cpu")
    for layer in policy.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert (
            side_by_side([each.weight for each in (attention.q_proj, attention.k_proj, attention.v_proj)]) is not None
        )
        assert side_by_side([each.bias for each in (attention.q_proj, attention.k_proj, attention.v_proj)]) is not None
        assert side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None


@by_kind
@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_divergence_is_named_and_leaves_the_trainer_untouched(
    make_trainer: MakeTrainer, batch: Batch, dtype: str, stage: int, culprit: str
) -> None:
    trainer, untouched = (make_trainer(dtype=dtype, zero_stage=stage, micro_tokens=30) for _ in range(2))
    before, bad = parameters(trainer), batch
    if culprit == "loss":
        bad = replace(batch, advantages=torch.where(torch.arange(len(batch.advantages)) % 7 == 3, torch.inf, 1.0))
    else:
        hook = trainer.params["model.norm.weight"].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(DivergedError, match=f"the {culprit} of step 1 is not finite"):
        trainer.step(bad)
    if culprit == "gradient":
        hook.remove()
    assert_close(parameters(trainer), before, rtol=0)
    assert replace(trainer.step(batch), seconds=0) == replace(untouched.step(batch), seconds=0)
    assert_close(parameters(trainer), parameters(untouched), rtol=0)


def test_statistics_compare_the_policy_with_what_was_sampled(make_trainer: MakeTrainer, batch: Batch) -> None:
    trainer = make_trainer(importance_cap=1.5)
    with torch.no_grad():
        (each,) = trainer._rounds(batch)
        logprobs, entropy = trainer.policy(each, trainer.temperature)
    sampled = batch.old_logprobs[batch.loss_mask]
    advantages = batch.advantages[batch.loss_mask]
    weights = torch.exp(logprobs - sampled).clamp(max=1.5)
    difference = (logprobs - sampled).abs()
    stats = trainer.step(batch)
    assert stats.loss == pytest.approx(float(-(weights * advantages).mean()), rel=1e-4)
    assert stats.entropy == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert stats.importance_mean == pytest.approx(float(weights.mean()), rel=1e-4)
    assert stats.prob_diff_mean == pytest.approx(float((logprobs.exp() - sampled.exp()).abs().mean()), rel=1e-4)
    assert stats.prob_diff_max == pytest.approx(float((logprobs.exp() - sampled.exp()).abs().max()), rel=1e-4)
    assert stats.logprob_diff_mean == pytest.approx(float(difference.mean()), rel=1e-4)
    assert stats.logprob_diff_p99 == pytest.approx(float(difference.quantile(0.99, interpolation="nearest")), rel=1e-4)
    assert (stats.kl, stats.clip_fraction, stats.lr) == (0.0, 0.0, 1e-3)
    assert (stats.num_tokens, stats.num_sequences) == (int(batch.loss_mask.sum()), 9)


def test_later_updates_of_a_step_are_measured_from_its_first_policy(make_trainer: MakeTrainer, batch: Batch) -> None:
    once, twice = make_trainer(), make_trainer(updates_per_step=2, lr=1e-2)
    one, two = once.step(batch), twice.step(batch)
    assert int(next(iter(twice.adam.state.values()))["step"]) == 2
    # the correction compares rollout and first policy, whatever the first update did
    assert two.importance_mean == pytest.approx(one.importance_mean, rel=1e-4)
    assert two.logprob_diff_p99 == pytest.approx(one.logprob_diff_p99, rel=1e-4)
    assert one.clip_fraction == 0 < two.clip_fraction < 0.6
    assert two.num_tokens == one.num_tokens


def test_reference_is_the_policy_reinforcement_started_from(make_trainer: MakeTrainer, batch: Batch) -> None:
    trainer = make_trainer(kl_coef=0.1, lr=1e-2)
    trainer.supervise(batch, 1e-2)
    start = parameters(trainer)
    assert trainer.step(batch).kl == 0.0
    assert trainer.step(batch).kl > 0.0
    assert trainer.reference is not None
    assert_close(trainer.reference, start, rtol=0)


def test_no_reference_is_kept_without_a_kl_term(make_trainer: MakeTrainer, batch: Batch) -> None:
    trainer = make_trainer()
    assert trainer.step(batch).kl == 0.0
    assert trainer.reference is None


def test_supervised_steps_learn_the_solutions(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(temperature=0.3)
    batch = supervised_batch([[5, 6, 7], [9]], [[8, 20, 2], [10, 2]])
    logits = trainer.policy.policy(torch.tensor([[5, 6, 7, 8, 20]]), use_cache=False, paceline=one_sequence(5)).logits[
        0, 2:
    ]
    other = trainer.policy.policy(torch.tensor([[9, 10]]), use_cache=False, paceline=one_sequence(2)).logits[0]
    expected = F.cross_entropy(torch.cat([logits, other]), torch.tensor([8, 20, 2, 10, 2]))  # at temperature 1
    first = trainer.supervise(batch, 1e-3)
    assert first.loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert first.lr == 1e-3
    for _ in range(20):
        last = trainer.supervise(batch, 1e-2)
    assert last.loss < 0.1 * first.loss
    assert trainer.steps == 0


def one_sequence(length: int) -> object:
    return AttentionContext(PackedSequences(torch.tensor([0, length], dtype=torch.int32), length))


def test_gradient_is_clipped_to_the_norm(make_trainer: MakeTrainer, batch: Batch) -> None:
    for stage in (0, 1):
        trainer = make_trainer(max_grad_norm=0.01, zero_stage=stage)
        assert trainer.step(batch).grad_norm > 0.01
        clipped = torch.stack([gradient.norm() for gradient in gradients(trainer).values()]).norm()
        assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_warms_up_and_falls_to_zero_after_the_last_step() -> None:
    def rates(schedule: Literal["constant", "linear", "cosine"], warmup_steps: int) -> list[float]:
        config = TrainConfig(lr=1.0, schedule=schedule, warmup_steps=warmup_steps)
        return [learning_rate(config, step, 6) for step in range(7)]

    assert rates("constant", 0) == [1.0] * 7
    assert rates("constant", 2)[:3] == [0.5, 1.0, 1.0]
    assert rates("linear", 2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates("cosine", 2) == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


@pytest.mark.slow
def test_deepspeed_compiles_nothing_at_start_and_leaves_stdout_alone(tiny_model_dir: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from configs.schema import TrainConfig
from rl.trainer import DeepSpeedTrainer
from rollout.model import load_policy
import torch.utils.cpp_extension
def compiles(*args, **kwargs): raise AssertionError("DeepSpeed compiles an extension at start")
torch.utils.cpp_extension.load = compiles
policy = load_policy(Path({str(tiny_model_dir)!r}), device="cpu", dtype="bfloat16")
DeepSpeedTrainer(policy, TrainConfig(), total_steps=1, temperature=1.0, device="cpu")
from deepspeed.comm.torch import build_shm_op
assert build_shm_op() is None
assert "torch._inductor.compile_fx" not in sys.modules, "DeepSpeed had torch.compile import Inductor"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


TWO_RANK_KINDS: list[tuple[str, Literal[0, 1, 2, 3]]] = [
    ("float32", 0),
    ("float32", 1),
    ("float32", 2),
    ("float32", 3),
    ("bfloat16", 1),
    ("bfloat16", 2),
    ("bfloat16", 3),
]


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(
    tiny_model_dir: Path, tmp_path: Path, make_trainer: MakeTrainer, make_groups: Callable[..., list[Group]]
) -> None:
    batches = [pack(make_groups(3, 3, seed=0)), pack(make_groups(1, 1, seed=1))]  # of the second, one rank gets nothing
    save_file(
        {f"{step}.{name}": tensor for step, batch in enumerate(batches) for name, tensor in asdict(batch).items()},
        tmp_path / "batches.safetensors",
    )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where the ranks meet
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tiny_model_dir), str(tmp_path)],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=1000) for rank in ranks] == [0, 0]
    for dtype, stage in TWO_RANK_KINDS:
        # under ZeRO 3 they share the parameters too, and do what one does that has them all
        alone = make_trainer(dtype=dtype, zero_stage=min(stage, 2), **two_rank_options(stage))
        for step, batch in enumerate(batches):
            expected = asdict(replace(alone.step(batch), seconds=0))
            folder = tmp_path / f"{dtype}-{stage}-{step}"
            actual = json.loads((folder / "stats.json").read_text())
            rel = 1e-3 if dtype == "float32" else 5e-2
            assert actual == pytest.approx(expected, rel=rel, abs=1e-3), folder.name
            saved = load_file(folder / "optimizer.safetensors")
            for name in alone.params:
                moments, own = saved[f"exp_avg.{name}"].flatten(), alone.shares.moment(name, "exp_avg").flatten()
                assert float((moments - own).norm() / own.norm()) < rel, f"{folder.name} {name}"
            if dtype == "float32":
                assert_close(load_file(folder / "params.safetensors"), parameters(alone), rtol=1e-3)
        alone.load(folder)  # two ranks wrote it, one reads it
        assert alone.steps == 2


def two_rank_options(stage: int) -> dict[str, Any]:
    return {"micro_tokens": 40, "kl_coef": 0.0 if stage == 3 else 0.1}


def run_rank(model_dir: Path, folder: Path) -> None:
    """One rank of test_two_ranks_take_the_steps_of_one."""
    tensors = load_file(folder / "batches.safetensors")
    for dtype, stage in TWO_RANK_KINDS:
        config = TrainConfig(lr=1e-3, max_grad_norm=0.0, zero_stage=stage, **two_rank_options(stage))
        policy = load_policy(model_dir, device="cpu", dtype=dtype)
        trainer = DeepSpeedTrainer(policy, config, total_steps=8, temperature=0.7, device="cpu")
        for step in range(2):
            fields = {name.removeprefix(f"{step}."): t for name, t in tensors.items() if name.startswith(f"{step}.")}
            stats = trainer.step(Batch(**fields))
            out = folder / f"{dtype}-{stage}-{step}"
            out.mkdir(exist_ok=True)
            trainer.save(out)
            torch.distributed.barrier()  # only rank 0 writes
            before = parameters(trainer)
            trainer.load(out)
            assert all(torch.equal(before[name], param) for name, param in parameters(trainer).items())
            if torch.distributed.get_rank() == 0:
                (out / "stats.json").write_text(json.dumps(asdict(replace(stats, seconds=0))))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]))

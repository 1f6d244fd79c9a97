"""Ranks that share every sequence learn what one learns that has them whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import Qwen3Config

from configs.errors import PreflightError
from configs.schema import TrainConfig
from kernels.attention import PackedSequences, packed_attention
from rl.batch import pack
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch, Group
from rl.ulysses import Attend, Sharing, require_heads
from rollout.model import load_policy

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"zero_stage": 0, "kl_coef": 0.1},
    "checkpointed": {"zero_stage": 1, "gradient_checkpointing": True, "updates_per_step": 2},
    "shares": {"zero_stage": 3},
}
COMMON: dict[str, Any] = {"lr": 1e-3, "max_grad_norm": 0.0, "micro_tokens": 25}
HEADS = [(4, 2), (2, 1), (6, 3)]  # of queries and of keys, for two ranks


@pytest.mark.slow
def test_two_ranks_that_share_every_sequence_take_the_steps_of_one(
    tiny_model_dir: Path,
    tmp_path: Path,
    make_trainer: Callable[..., DeepSpeedTrainer],
    make_groups: Callable[..., list[Group]],
) -> None:
    # of the second batch's one token, only one rank has any
    batches = [pack(make_groups(3, 3, seed=0)), pack(make_groups(1, 1, seed=5))]
    assert len(batches[0].token_ids) % 2 == 1  # one rank's tokens are padded
    save_file({f"{n}.{k}": v for n, batch in enumerate(batches) for k, v in asdict(batch).items()}, tmp_path / "b")
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
    for kind, options in KINDS.items():
        alone = make_trainer(**COMMON, **(options | {"zero_stage": min(options["zero_stage"], 1)}))
        for batch in batches:
            expected = asdict(replace(alone.step(batch), seconds=0))
            found = json.loads((tmp_path / f"{kind}-{alone.steps}.json").read_text())
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), kind
        saved = load_file(tmp_path / f"{kind}.safetensors")
        for name in alone.params:
            moment = alone.shares.moment(name, "exp_avg")
            assert float((saved[name] - moment).norm() / moment.norm()) < 1e-4, f"{kind} {name}"
    attended = load_file(tmp_path / "attended.safetensors")
    for number, heads in enumerate(HEADS):
        tensors, seqs = qkv(*heads)
        expected = packed_attention(*tensors, seqs, scale=0.5, sliding_window=7, softcap=None)
        (expected * torch.arange(expected.numel()).view_as(expected).cos()).sum().backward()
        assert torch.allclose(attended[f"{number}.out"], expected, atol=1e-5)
        for name, tensor in zip("qkv", tensors, strict=True):
            assert torch.allclose(attended[f"{number}.{name}"], tensor.grad, atol=1e-4), (heads, name)


def qkv(query_heads: int, key_heads: int) -> tuple[list[torch.Tensor], PackedSequences]:
    """Twenty-one tokens in three sequences, one of them longer than the window."""
    generator = torch.Generator().manual_seed(query_heads)
    shapes = [(21, query_heads, 8), (21, key_heads, 8), (21, key_heads, 8)]
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return tensors, PackedSequences(torch.tensor([0, 3, 16, 21], dtype=torch.int32), 13)


def test_heads_that_do_not_divide_are_refused() -> None:
    config = Qwen3Config(num_attention_heads=6, num_key_value_heads=2)
    require_heads(config, 3)
    with pytest.raises(PreflightError, match="train.sequence_parallel=4 does not divide the model's 6 attention heads"):
        require_heads(config, 4)


def run_rank(model_dir: Path, folder: Path) -> None:
    """One of the two ranks."""
    tensors = load_file(folder / "b")
    batches = [Batch(**{k[2:]: v for k, v in tensors.items() if k.startswith(f"{n}.")}) for n in range(2)]
    for kind, options in KINDS.items():
        config = TrainConfig(sequence_parallel=2, **COMMON, **options)
        policy = load_policy(model_dir, device="cpu", dtype="float32")
        trainer = DeepSpeedTrainer(policy, config, total_steps=8, temperature=0.7, device="cpu")
        for batch in batches:
            stats = trainer.step(batch)
            if trainer.sharing.rank == 0:
                (folder / f"{kind}-{trainer.steps}.json").write_text(json.dumps(asdict(replace(stats, seconds=0))))
        moments = {name: trainer.shares.moment(name, "exp_avg").clone() for name in trainer.params}
        if trainer.sharing.rank == 0:
            save_file(moments, folder / f"{kind}.safetensors")
    found = {}
    sharing = Sharing(2)
    for number, heads in enumerate(HEADS):
        whole, seqs = qkv(*heads)
        begin, count = sharing.stretch(21)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))[begin : begin + count] for x in whole]
        out = Attend(seqs, 21, sharing)(*(x.transpose(0, 1)[None] for x in padded), 0.5, 7, None)[0]
        weights = torch.arange(21 * heads[0] * 8).view(21, heads[0], 8).cos()
        (out * torch.nn.functional.pad(weights, (0, 0, 0, 0, 0, 1))[begin : begin + count]).sum().backward()
        gradients = [x.grad for x in whole]
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
        outs = [torch.empty_like(out) for _ in range(2)]
        torch.distributed.all_gather(outs, out.detach())
        found |= {f"{number}.{name}": gradient for name, gradient in zip("qkv", gradients, strict=True)}
        found[f"{number}.out"] = torch.cat(outs)[:21].clone()
    if sharing.rank == 0:
        save_file(found, folder / "attended.safetensors")


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]))

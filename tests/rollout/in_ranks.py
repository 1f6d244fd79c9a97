"""What tests/rollout/test_parallel.py runs in several processes: importable there, as test modules are not."""

import asyncio
import os
import random
import signal
import time
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import PreflightError
from configs.schema import RolloutConfig
from drafter.ngram import NgramDrafter
from drafter.types import OFF, Strategy
from rollout.collectives import Ranks, ranks_of
from rollout.decoder import make_decoder, some_logits
from rollout.engine import NativeEngine
from rollout.fused import FusedDecoder
from rollout.model import ATTENTION, PagedCache, alone
from rollout.parallel import shard_policy
from rollout.projections import lay_side_by_side
from rollout.ranks import run_ranks, shared_engine
from rollout.strategy import CycleReport, FixedChooser
from rollout.types import Prompt, Rollout, Sampling

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide: attention and logits far from uniform
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True},
    "qwen2": {"num_attention_heads": 6, "head_dim": 8},
    "qwen3": {},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama heads": ({"num_attention_heads": 3, "num_key_value_heads": 1}, "num_attention_heads=3 does not divide"),
    "llama kv heads": ({"num_key_value_heads": 1}, "num_key_value_heads=1 does not divide"),
    "llama features": ({"intermediate_size": 63}, "the 63 outputs of model.layers.0.mlp.gate_proj do not divide"),
    "llama vocabulary": ({"vocab_size": 97}, "the 97 outputs of lm_head do not divide"),
    "gemma2": ({"sliding_window": 6}, "run it on one"),
}
SAMPLING = Sampling(num_samples=2, max_new_tokens=24, stop_token_ids=(2,), seed=3, step=5)
CHAIN = Strategy(source="suffix", depth=4, top_k=1, num_verify=4)
CONFIG = RolloutConfig(block_size=4, max_running=6, kv_tokens=512)
Results = dict[tuple[str, int], Rollout]


class Fickle:
    """A chooser that decides differently on each rank, as one that measures time would."""

    max_num_verify = CHAIN.num_verify

    def __init__(self, seed: int) -> None:
        self._choices = random.Random(seed)
        self.reports = 0

    def choose(self, *, batch: int, context: float) -> Strategy:
        return self._choices.choice((OFF, CHAIN))

    def observe(self, report: CycleReport) -> None:
        self.reports += 1

    def policy_changed(self) -> None:
        pass

    def drafter_changed(self, source: str) -> None:
        """Nothing was learned."""

    def summary(self) -> dict[str, Any]:
        return {"reports": self.reports}


def tiny_model(family: str, options: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    config = AutoConfig.for_model(family.split()[0], **{**TINY, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide what is done with them
                torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    lay_side_by_side(model)
    return model


def prompts() -> list[Prompt]:
    choices = random.Random(1)
    texts = [[choices.randrange(3, 96) for _ in range(length)] for length in (1, 23, 14, 9)]
    return [Prompt(id=f"p{number}", token_ids=text, answer="") for number, text in enumerate(texts)]


def hidden_and_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """What the decoder makes of twelve tokens."""
    decoder = make_decoder(model)
    assert isinstance(decoder, FusedDecoder)
    index = torch.arange(12)
    cache, seqs = alone(model, num_tokens=12)
    hidden = decoder.forward(index * 7 % 96, index, seqs, cache)
    return [hidden.clone(), decoder.logits(hidden).clone()]


def roll_out(engine: NativeEngine, sampling: Sampling = SAMPLING) -> Results:
    async def all_rollouts() -> Results:
        return {(r.prompt_id, r.sample): r async for r in engine.generate(prompts(), sampling)}

    return asyncio.run(all_rollouts())


def engine_alone(model: PreTrainedModel, cycles: Literal["hosted", "resident"]) -> NativeEngine:
    return NativeEngine(model, drafter=None, chooser=FixedChooser(OFF), rollout=CONFIG, cycles=cycles)


def of_each_family(ranks: Ranks) -> dict[str, Any]:
    """Hidden states, logits, rollouts and the shapes of one share, of every family."""
    found: dict[str, Any] = {}
    for family, options in FAMILIES.items():
        model = tiny_model(family, options)
        shard_policy(model, ranks)
        assert ranks_of(model) is ranks
        cache = PagedCache(model.config, num_blocks=1, block_size=4, device="cpu", dtype=model.dtype)
        layer = model.base_model.layers[0]
        engine = shared_engine(model, drafter=None, chooser=FixedChooser(OFF), rollout=CONFIG)
        found[family] = {
            "tensors": [tensor.tolist() for tensor in hidden_and_logits(model)],
            "module": some_logits(model).tolist(),
            "resident": roll_out(engine),
            "hosted": roll_out(engine_alone(model, "hosted")),
            "kv_heads": cache.storage.shape[-2],
            "shapes": [tuple(p.weight.shape) for p in (layer.self_attn.o_proj, layer.mlp.up_proj, model.lm_head)],
            "embedding": len(model.get_input_embeddings().weight),
            "joined": len(FusedDecoder(model, ranks)._layers[0].qkv),
        }
    model = tiny_model("qwen3", {})
    shard_policy(model, ranks)
    chooser = Fickle(ranks.rank)
    engine = shared_engine(model, drafter=NgramDrafter(min_match=1), chooser=chooser, rollout=CONFIG)
    found["drafted"] = roll_out(engine)
    found["reports"] = chooser.reports
    for name, (options, _) in REFUSED.items():
        model = tiny_model(name, options)
        before = [parameter.data_ptr() for parameter in model.parameters()]
        found[name] = refusal(model, ranks)
        assert before == [parameter.data_ptr() for parameter in model.parameters()]
    found["unplanned"] = refusal(unplanned(), ranks)
    found["different"] = refusal(tiny_model("llama", {}, seed=ranks.rank), ranks)
    return found


def on_gpus(ranks: Ranks, one_shot_bytes: int) -> dict[str, Any]:
    """Rollouts of one GPU and of all, with drafts and without, from graphs, in float32: differences are mistakes."""
    assert dist.group.WORLD is not None
    ranks = Ranks(dist.group.WORLD, ranks.device, one_shot_bytes=one_shot_bytes)
    rollout = replace(CONFIG, block_size=16)  # kernels take blocks of 8 to 64
    models = [tiny_model("qwen3", {"head_dim": 64, "hidden_size": 64}).to(ranks.device) for _ in range(2)]
    for model in models:
        lay_side_by_side(model)  # moving took them apart
    shard_policy(models[1], ranks)
    engines = {
        "alone": NativeEngine(models[0], drafter=None, chooser=FixedChooser(OFF), rollout=rollout),
        "shared": shared_engine(models[1], drafter=None, chooser=FixedChooser(OFF), rollout=rollout),
        "drafted": shared_engine(
            models[1], drafter=NgramDrafter(min_match=1), chooser=Fickle(ranks.rank), rollout=rollout
        ),
    }
    found: dict[str, Any] = {name: roll_out(engine) for name, engine in engines.items()}
    # prompts whose prefixes are cached, and graphs that are replayed from the start
    found["again"] = roll_out(engines["shared"])
    found["transport"] = ranks.transport
    found["graphs"] = engines["shared"].graphs.num_captures
    return found


def unplanned() -> PreTrainedModel:
    model = tiny_model("llama", {})
    model.tp_plan = model.tp_plan | {"model.layers.*.self_attn.o_proj": "all_reduce"}
    return model


def refusal(model: PreTrainedModel, ranks: Ranks) -> str:
    try:
        shard_policy(model, ranks)
    except PreflightError as error:
        return str(error)
    return "accepted"


def fail(ranks: Ranks, how: str) -> None:
    """Rank 1 ends; rank 0 waits for it."""
    if ranks.rank == 1:
        if how == "user":
            raise PreflightError("rank 1 has no weights; fetch them")
        if how == "bug":
            raise KeyError("nowhere")
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "killed":
        time.sleep(3600)
    ranks.all(True)


def wait_forever(ranks: Ranks) -> None:
    os.write(1, b"waiting\n")
    time.sleep(3600)


if __name__ == "__main__":
    run_ranks(2, "cpu", wait_forever)

"""What tests/rollout/test_team.py runs in several processes: importable there, as test modules are not."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch
from in_ranks import SAMPLING, Fickle, Results, prompts, roll_out, tiny_model
from transformers import PreTrainedModel

from configs.schema import RolloutConfig
from drafter.ngram import NgramDrafter
from drafter.types import OFF
from rollout.collectives import Ranks
from rollout.engine import NativeEngine
from rollout.parallel import shard_policy
from rollout.projections import lay_side_by_side
from rollout.ranks import shared_engine
from rollout.strategy import FixedChooser
from rollout.team import Leader, follow
from rollout.transfer import ReceivedWeights, StaleWeightsError, send, trainable

OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {"attention_bias": True, "tie_word_embeddings": True},
    "untied": {"attention_bias": True},
}
CONFIG = RolloutConfig(block_size=4, max_running=6)  # the ranks agree on the cache's size
BUCKET = 1000  # bytes: no parameter ends where a bucket does


class Loop:
    """A channel to oneself: what was sent, in order."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []
        self.receives = False

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.receives:
            tensor.copy_(self.sent.pop(0))
        else:
            self.sent.append(tensor.clone())


def of_each_kind(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What a rank found, by kind of model."""
    return {name: of_team(ranks, options) for name, options in OPTIONS.items()}


def on_gpus(ranks: Ranks) -> dict[str, Any]:
    """The same over GPUs, and what each of them samples alone, from old weights and new ones."""
    options = OPTIONS["tied"] | {"head_dim": 64, "hidden_size": 64}
    found = of_team(ranks, options)
    for name, seed in (("alone", 0), ("alone, updated", 1)):
        model = _placed(ranks, options, seed)
        alone = NativeEngine(model, drafter=None, chooser=FixedChooser(OFF), rollout=_config(ranks), cycles="resident")
        found[name] = roll_out(alone)
    return found


def of_team(ranks: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """What the first rank samples in all ways it can be spoken to, and what each rank's engine is like in the end."""
    model = _placed(ranks, options, seed=0)
    weights = ReceivedWeights(model, shard_policy(model, ranks))
    drafter = NgramDrafter(min_match=1)
    chooser = Fickle(ranks.rank)
    engine = shared_engine(model, drafter=drafter, chooser=chooser, rollout=_config(ranks), weights=weights)
    found: dict[str, Any] = {}
    if ranks.rank == 0:
        leader = Leader(engine, ranks.share)
        found = asyncio.run(_speak_to(leader))
    else:
        _follow(engine, ranks)
    receive(weights, 1, _placed(ranks, options, seed=1))
    if ranks.rank == 0:
        leader.update(1)
        found["updated"] = asyncio.run(_all(leader))
        ranks.share(None)
    else:
        _follow(engine, ranks)
    return found | {"version": engine.version, "blocks": engine.state_dict()["kv_blocks"], "layout": weights.layout}


def _config(ranks: Ranks) -> RolloutConfig:
    return replace(CONFIG, block_size=16) if ranks.device.type == "cuda" else CONFIG  # kernels take 8 to 64


def _placed(ranks: Ranks, options: dict[str, Any], seed: int) -> PreTrainedModel:
    model = tiny_model("llama", options, seed=seed).to(ranks.device)
    lay_side_by_side(model)  # moving takes them apart
    return model


def receive(weights: ReceivedWeights, version: int, sent: PreTrainedModel) -> None:
    """Another policy's parameters, whole as they are sent."""
    channel = Loop()
    send(trainable(sent).items(), channel, version, bucket_bytes=BUCKET)
    channel.receives = True
    weights.receive(channel, version, bucket_bytes=BUCKET)
    assert not channel.sent


def _follow(engine: NativeEngine, ranks: Ranks) -> None:
    while (call := ranks.share(None)) is not None:
        asyncio.run(follow(engine, call))


async def _all(leader: Leader) -> Results:
    return {(r.prompt_id, r.sample): r async for r in leader.generate(prompts(), SAMPLING)}


async def _speak_to(leader: Leader) -> dict[str, Any]:
    found: dict[str, Any] = {"plain": await _all(leader)}
    assert not leader.surrender(2) and not leader.is_generating
    given: Results = {}
    async for rollout in leader.generate(prompts(), SAMPLING):
        if len(given) == 1:
            partials = leader.surrender(3)
        if len(given) == 3:
            leader.adopt(partials)
        given[rollout.prompt_id, rollout.sample] = rollout
    found |= {"moved": given, "num_moved": len(partials)}
    async with aclosing(leader.generate(prompts(), SAMPLING)) as rollouts:
        await anext(rollouts)
        leader.surrender(1)
    state = leader.state_dict()
    leader.load_state_dict(state)
    found["after leaving"] = await _all(leader)
    try:
        leader.update(1)
    except StaleWeightsError as error:
        found["stale"] = str(error)
    leader._ranks.share(None)
    return found

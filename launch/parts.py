"""What the processes of a run are made of, from its config: trainer, engine and learner, together or apart."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from configs.schema import Config
from drafter.learner import Learner
from drafter.types import ResidentDrafter
from launch.drafting import chooser_for, make_drafting
from launch.vllm_parts import make_vllm
from rl.trainer import DeepSpeedTrainer
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.parallel import shard_policy
from rollout.ranks import shared_engine
from rollout.selectors import make_sparse
from rollout.strategy import make_chooser
from rollout.team import Call, Leader, Seat
from rollout.transfer import CopiedWeights, ReceivedWeights, Weights
from rollout.types import Engine


def build_worker(
    config: Config, path: Path, *, device: str, dtype: str
) -> tuple[Engine, DeepSpeedTrainer, Learner | None]:
    """One policy module, the trainer that updates it, the engine that samples from the very same weights, and the
    learner of its drafter, if it has one that learns. Under ZeRO 3, which shares the module out, the engine has a copy.
    """
    policy = load_policy(path, device=device, dtype=dtype)
    trainer = _make_trainer(config, policy, device)
    if config.rollout.backend == "vllm":
        served, learner = make_vllm(config, policy, path)
        return served, trainer, learner
    weights: Weights | None = None
    if config.train.zero_stage == 3:
        policy = load_policy(path, device=device, dtype=dtype)
        source = partial(trainer.whole_parameters, at_a_time=config.compute.bucket_mb << 20)
        weights = CopiedWeights(policy, source, lambda: trainer.changes)
    engine, learner = _make_engine(config, policy, weights)
    trainer.make_room = engine.release
    return engine, trainer, learner


def build_trainer(config: Config, path: Path, *, device: str, dtype: str) -> tuple[None, DeepSpeedTrainer, None]:
    """A policy and its trainer, in a process that does not sample."""
    policy = load_policy(path, device=device, dtype=dtype)
    return None, _make_trainer(config, policy, device), None


def build_engine(config: Config, path: Path, *, device: str, dtype: str) -> tuple[Engine, None, Learner | None]:
    """A policy that is received from trainers elsewhere, its engine, and the learner of its drafter, if it learns."""
    policy = load_policy(path, device=device, dtype=dtype)
    engine, learner = _make_engine(config, policy, ReceivedWeights(policy))
    return engine, None, learner


def build_share(
    config: Config, path: Path, *, device: str, dtype: str, seat: Seat, summon: Callable[[Call], None]
) -> tuple[Engine, None, None]:
    """This rank's share of such a policy, loaded whole before, and an engine over it; rank 0's leads them all."""
    ranks = seat.take(device)
    policy = load_policy(path, device=device, dtype=dtype)
    weights = ReceivedWeights(policy, shard_policy(policy, ranks))
    chooser = make_chooser(config.spec, device=device, seed=config.run.seed)
    drafter = make_drafting(config, policy, chooser).drafter
    assert drafter is None or isinstance(drafter, ResidentDrafter)
    engine = shared_engine(policy, drafter=drafter, chooser=chooser, rollout=config.rollout, weights=weights)
    return Leader(engine, summon) if ranks.rank == 0 else engine, None, None


def _make_trainer(config: Config, policy: PreTrainedModel, device: str) -> DeepSpeedTrainer:
    return DeepSpeedTrainer(
        policy,
        config.train,
        total_steps=config.train.steps,
        temperature=config.rollout.temperature,
        device=device,
        collective_s=config.run.collective_s,
    )


def _make_engine(
    config: Config, policy: PreTrainedModel, weights: Weights | None
) -> tuple[NativeEngine, Learner | None]:
    """The engine over a policy whose parameters have found their place."""
    chooser = chooser_for(config, policy.config, policy.device.type)
    drafting = make_drafting(config, policy, chooser)
    engine = NativeEngine(
        policy,
        drafter=drafting.drafter,
        chooser=chooser,
        rollout=config.rollout,
        reader=drafting.reader,
        sparse=None if config.sparse.mode == "off" else make_sparse(config.sparse, policy),
        weights=weights,
    )
    return engine, drafting.learner

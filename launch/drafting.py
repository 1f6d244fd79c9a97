"""A run's drafting, put together from its config: who proposes, what keeps hidden states, and who improves the head."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError
from configs.schema import Config
from drafter.allocation import allocating
from drafter.buffer import FeatureBuffer
from drafter.combined import CombinedDrafter
from drafter.eagle import EagleConfig, EagleHead, misfit
from drafter.eagle_serving import EagleDrafter
from drafter.export import read_drafter, read_shape
from drafter.learner import Learner
from drafter.memory import drafter_bytes
from drafter.ngram import NgramDrafter
from drafter.rings import FeatureRings
from drafter.selfdraft import SelfDrafter
from drafter.suffix import SuffixDrafter
from drafter.types import Drafter, FeatureReader, ResidentDrafter
from rollout.collectives import ranks_of
from rollout.model import kv_shape
from rollout.strategy import Chooser, make_chooser


@dataclass(frozen=True, slots=True)
class Drafting:
    """What an engine is given to draft with, and the learner that improves it; None where there is none."""

    drafter: Drafter | ResidentDrafter | None
    reader: FeatureReader | None = None
    learner: Learner | None = None


@dataclass(frozen=True, slots=True)
class Announced:
    """A head that is published to a drafter, and the chooser that measures it anew then: drafter.publish.Serves."""

    drafter: EagleDrafter
    chooser: Chooser

    def publish(self, state: dict[str, torch.Tensor], version: int) -> None:
        """As EagleDrafter.publish."""
        self.drafter.publish(state, version)
        self.chooser.drafter_changed("eagle")

    def withdraw(self) -> None:
        """As EagleDrafter.withdraw."""
        self.drafter.withdraw()
        self.chooser.drafter_changed("eagle")


def chooser_for(config: Config, model_config: PretrainedConfig, device: str) -> Chooser:
    """The chooser of a run's strategies, on a device of this type."""
    return make_chooser(
        config.spec,
        device=device,
        seed=config.run.seed,
        sparse=config.sparse,
        num_layers=kv_shape(model_config)[0],
    )


def make_drafting(config: Config, policy: PreTrainedModel, chooser: Chooser) -> Drafting:
    """The drafting that spec.source and sparse.mode name, on the policy's device; its parameters must have found their
    place.

    chooser: of the engine that will draft so. Raises ConfigError, PreflightError.
    """
    if config.spec.source in ("eagle", "auto"):
        return _with_head(config, policy, chooser)
    drafts_itself = config.sparse.mode in ("draft", "rectified")
    if config.spec.source == "off" and not drafts_itself:
        return Drafting(None)
    # cycles are resident wherever attention may be sparse
    on_cpu = policy.device.type == "cpu" and ranks_of(policy) is None
    if on_cpu and config.sparse.mode == "off":
        return Drafting(SuffixDrafter(min_match=config.spec.min_match))
    return Drafting(_combined(config, eagle=None, rings=None))


def _combined(config: Config, eagle: EagleDrafter | None, rings: FeatureRings | None) -> ResidentDrafter:
    """Those there are, and the policy itself where it drafts, sped up by one of them where it is."""
    drafts_itself = config.sparse.mode in ("draft", "rectified")
    drafters: dict[str, ResidentDrafter] = {}
    suffix = None
    if config.spec.source in ("suffix", "auto") or (drafts_itself and config.sparse.inner == "suffix"):
        suffix = drafters["suffix"] = NgramDrafter(min_match=config.spec.min_match)
    if eagle is not None:
        drafters["eagle"] = eagle
    if drafts_itself:
        match config.sparse.inner:
            case "off":
                drafters["sparse"] = SelfDrafter()
            case "suffix":
                drafters["sparse"] = SelfDrafter(suffix, source="suffix")
            case "eagle":
                drafters["sparse"] = SelfDrafter(eagle, source="eagle", reader=rings)
    return CombinedDrafter(drafters) if len(drafters) > 1 else next(iter(drafters.values()))


def _with_head(config: Config, policy: PreTrainedModel, chooser: Chooser) -> Drafting:
    """Drafting with a learned head, made or read."""
    options = config.drafter
    start = starting_head(config, policy.config)
    needed = drafter_bytes(
        start.config,
        options,
        num_rows=config.rollout.max_running,
        max_nodes=max(1, chooser.max_num_verify),
        itemsize=policy.dtype.itemsize,
        on_gpu=policy.device.type == "cuda",
    )
    with allocating("the drafter's weights", needed.weights, "lower drafter.draft_vocab"):
        return _learned(config, policy, chooser, start.to(policy.device))


def _learned(config: Config, policy: PreTrainedModel, chooser: Chooser, head: EagleHead) -> Drafting:
    """Drafting with a learned head, which is on the policy's device."""
    options = config.drafter
    buffer = FeatureBuffer(
        max_bytes=options.buffer_mb << 20, temperature=config.rollout.temperature, seed=config.run.seed
    )
    rings = FeatureRings(
        aux_layers=head.config.aux_layers,
        hidden_size=head.config.hidden_size,
        window=options.feature_window,
        max_nodes=max(1, chooser.max_num_verify),
        dtype=policy.dtype,
        device=policy.device,
        sink=buffer if options.train else None,
    )
    # as they are: the policy trains on, and these are its present weights at any time
    embedding = policy.get_input_embeddings().weight.detach()
    lm_head = policy.get_output_embeddings().weight.detach()
    eagle = EagleDrafter(
        head.config,
        embedding=embedding,
        rings=rings,
        temperature=config.rollout.temperature,
        device=policy.device,
    )
    learner = Learner(
        head,
        drafter=Announced(eagle, chooser),
        buffer=buffer,
        embedding=embedding,
        lm_head=lm_head,
        config=options,
        dtype=policy.dtype,
    )
    return Drafting(_combined(config, eagle, rings), rings, learner)


def starting_head(config: Config, model_config: PretrainedConfig) -> EagleHead:
    """The head in drafter.init, or one with random weights; float32, on the CPU. Raises ConfigError, PreflightError."""
    shape = starting_shape(config, model_config)
    if not config.drafter.init:
        return EagleHead(shape, seed=config.run.seed)
    return read_drafter(Path(config.drafter.init).expanduser())


def starting_shape(config: Config, model_config: PretrainedConfig) -> EagleConfig:
    """The shape of that head. Of drafter.init no weight is read. Raises ConfigError, PreflightError."""
    options = config.drafter
    shape = EagleConfig.of(model_config, draft_vocab=options.draft_vocab, window=options.window)
    if not options.init:
        return shape
    given = read_shape(Path(options.init).expanduser())
    if (name := misfit(given, shape)) is not None:
        raise ConfigError(
            f"drafter.init={options.init} drafts for a policy with {name}={getattr(given, name)}, and this"
            f" one has {getattr(shape, name)}; take a drafter of this policy"
        )
    return given

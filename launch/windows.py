"""Batches that a drafter learns from away from a run: windows of many texts, from few large forwards of the policy."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from random import Random
from typing import Literal

import torch

from drafter.eagle import EagleConfig
from drafter.features import FeatureBatch
from launch.subject import Subject
from rl.features import Text, batches, text_features

# Batches' worth of tokens in a forward. A GPU's many small kernels cost a launch each, however many tokens they take;
# on a CPU more would cost memory for nothing.
HARVEST = {"cuda": 16, "cpu": 2}

# what the drafter has read: the response alone, as in rollouts, or the prompt too, as servers have it
Context = Literal["rollout", "server"]


def training_batches(
    subject: Subject, texts: Sequence[Text], config: EagleConfig, *, contexts: Sequence[Context]
) -> Iterator[FeatureBatch]:
    """Batches without end, texts in a new order every epoch, the contexts in turns from forward to forward.

    A batch has drafter.batch_tokens // drafter.feature_window windows, one at least, as equal batches train fastest.
    """
    options, turns = subject.config.drafter, cycle(contexts)
    random = Random(subject.config.run.seed)
    harvested = HARVEST[subject.device.type] * options.batch_tokens
    while True:
        for group in batches(random.sample(texts, len(texts)), harvested):
            harvest = features(subject, group, config, subject.config.rollout.temperature, next(turns))
            yield from cut(
                harvest,
                window=options.feature_window,
                num_windows=max(1, options.batch_tokens // options.feature_window),
                seed=random.getrandbits(32),
            )


def features(
    subject: Subject, texts: Sequence[Text], config: EagleConfig, temperature: float, context: Context
) -> FeatureBatch:
    """What the policy leaves behind on these texts, a window each."""
    return text_features(
        subject.policy,
        texts,
        aux_layers=config.aux_layers,
        temperature=temperature,
        with_prompt=context == "server",
        version=subject.step,
    )


def cut(batch: FeatureBatch, *, window: int, num_windows: int, seed: int) -> Iterator[FeatureBatch]:
    """Batches of num_windows windows of at most `window` positions, in random order.

    Every window of the batch is cut into as few as hold it, of equal lengths up to one position, so that no position
    is left out for where it stands. Of the last, fewer than num_windows, nothing becomes unless there are no others.
    """
    # on the host, once a forward: a batch is then a few gathers, and nobody waits for the device
    bounds = batch.cu_seqlens.long().cpu()
    lengths = bounds.diff()
    pieces = (lengths + window - 1) // window
    owner = torch.repeat_interleave(pieces)
    place = torch.arange(len(owner)) - (pieces.cumsum(0) - pieces)[owner]
    first = bounds[owner] + lengths[owner] * place // pieces[owner]
    last = bounds[owner] + lengths[owner] * (place + 1) // pieces[owner]
    shuffled = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed))
    for chosen in shuffled.split(num_windows):
        if len(chosen) == min(num_windows, len(shuffled)):
            yield _gather(batch, first[chosen], last[chosen], owner[chosen])


def _gather(batch: FeatureBatch, first: torch.Tensor, last: torch.Tensor, owner: torch.Tensor) -> FeatureBatch:
    """The positions from first to before last, end to end, a window each; first, last, owner [N] int64, on the CPU."""
    device = batch.next_ids.device
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), (last - first).cumsum(0)])
    offsets = (first - cu_seqlens[:-1]).repeat_interleave(last - first)
    index = (torch.arange(len(offsets)) + offsets).to(device)
    return replace(
        batch,
        token_ids=batch.token_ids[index],
        next_ids=batch.next_ids[index],
        positions=batch.positions[index],
        aux=batch.aux[index],
        hidden=batch.hidden[index],
        cu_seqlens=cu_seqlens.to(device, torch.int32),
        versions=batch.versions[owner.to(device)],
        alt_ids=batch.alt_ids[index],
        alt_hidden=batch.alt_hidden[index],
    )

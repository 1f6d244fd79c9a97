"""The training data: which prompts a step draws, and which are held out."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.errors import ConfigError
from configs.faults import hit
from configs.schema import DataConfig
from rl.quarantine import Quarantine
from rl.template import Template
from rollout.types import Prompt


class Source(Protocol):
    """Rows by number, some of them held out."""

    def __len__(self) -> int:
        """Rows to train on."""

    def prompt(self, index: int) -> Prompt:
        """Training row `index`: the same prompt whenever it is drawn."""

    def heldout(self) -> list[Prompt]:
        """Prompts whose questions are in no training row."""


class DataSet:
    """A source in shuffled order. It has no position: a step's prompts depend on seed, step and count alone."""

    def __init__(self, source: Source, *, seed: int, num_heldout: int) -> None:
        self._source = source
        self._seed = seed
        self._num_heldout = num_heldout
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Rows to train on."""
        return len(self._source)

    def prompts(self, step: int, count: int) -> list[Prompt]:
        """The step-th draw of `count` rows, no row twice; each epoch is a new shuffle.

        What is left of an epoch when it no longer fills a draw is dropped, another remainder in every epoch.
        Raises ConfigError when there are fewer rows than `count`, DataError as the source does.
        """
        steps_per_epoch = len(self) // count
        if steps_per_epoch == 0:
            raise ConfigError(f"{count} prompts a step exceed the {len(self)} training rows; lower it or add rows")
        epoch, position = divmod(step, steps_per_epoch)
        rows = self._epoch_order(epoch)[position * count : (position + 1) * count]
        return [self._source.prompt(int(row)) for row in rows]

    def heldout(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts, of distinct questions that no training row asks; small tables give fewer.

        `count` is at most the num_heldout the data were loaded with.
        """
        assert count <= self._num_heldout, f"{count} held-out prompts of {self._num_heldout} reserved"
        return self._source.heldout()[:count]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.random.Generator(np.random.Philox([self._seed % 2**64, epoch])).permutation(len(self))
            self._order = epoch, order
        return self._order[1]


def load_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    context_length: int,
    max_new_tokens: int,
    num_heldout: int,
    quarantine: Path | None,
) -> DataSet:
    """Open the configured source, check its rows and hold some out.

    Bad rows are counted and, given a path, listed in `quarantine`. Raises ConfigError for wrong options,
    PreflightError for a source that is missing or unreadable, DataError for no rows or too many bad ones.
    """
    hit("data.load")
    template = Template(config, tokenizer, context_length=context_length, max_new_tokens=max_new_tokens)
    bad_rows = Quarantine(quarantine)
    source: Source
    if config.source == "reasoning_gym":
        from rl.tasks import GeneratedPrompts  # the generators take a second to import; files do not need them

        source = GeneratedPrompts(config, template, seed=seed, num_heldout=num_heldout, quarantine=bad_rows)
    else:
        from rl.tables import StoredPrompts

        source = StoredPrompts(config, template, num_heldout=num_heldout, quarantine=bad_rows)
    return DataSet(source, seed=seed, num_heldout=num_heldout)

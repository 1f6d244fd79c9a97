"""reasoning-gym's generators as a source of prompts: rows made when they are drawn, held-out questions kept apart."""

import hashlib
import json
from difflib import get_close_matches
from typing import Any, Protocol

import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS

import rl.running_sum  # noqa: F401  # one more task
from configs.errors import ConfigError, DataError
from configs.schema import DataConfig
from rl.plain import to_plain
from rl.quarantine import BadRowError, Quarantine
from rl.template import Problem, Template
from rollout.types import Prompt

NUM_SAMPLED = 32  # rows drawn at load, so that a wrong option shows before the model is loaded
MIN_JUDGED = 256  # a share of bad rows means little over fewer draws
MAX_REDRAWS = 16
HELDOUT_DRAWS = 20  # rows drawn at most for a held-out one


class Task(Protocol):
    """What is used of reasoning_gym's ProceduralDataset."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: question, answer, metadata."""

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """The score of an answer to a row, between 0 and 1."""


def create_task(name: str, options: dict[str, Any], *, seed: int, size: int) -> Task:
    """A generator by name. Raises ConfigError for an unknown name or refused options."""
    if name not in DATASETS:
        close = get_close_matches(name, DATASETS, n=1, cutoff=0)[0]
        raise ConfigError(f"data.name={name!r} is not a reasoning-gym task; did you mean {close!r}?")
    for key, remedy in (("seed", "run.seed"), ("size", "data.size")):
        if key in options:
            raise ConfigError(f"data.options.{key} is set by {remedy}; set that instead")
    try:
        if name == "composite" and "datasets" in options:
            specs = [DatasetSpec(**{"weight": 1.0, "config": {}, **spec}) for spec in options["datasets"]]
            options = {**options, "datasets": specs}
        task: Task = reasoning_gym.create_dataset(name, **options, seed=seed, size=size)
    # the generators check their options with assert, ValueError and TypeError alike
    except Exception as error:
        reason = str(error) or repr(error)
        raise ConfigError(f"data.options are refused by reasoning-gym's {name!r}: {reason}") from error
    return task


class GeneratedPrompts:
    """`size` rows of one generator, each made when it is drawn.

    Row i is the generator's row i, or, when that is bad or its question is held out, row i of the next of a sequence
    of generators with other seeds. Held-out rows do not depend on the run's seed, so evaluations compare across runs.
    Rows are the same in every process only under one PYTHONHASHSEED: a few generators iterate over sets of strings.
    """

    def __init__(
        self, config: DataConfig, template: Template, *, seed: int, num_heldout: int, quarantine: Quarantine
    ) -> None:
        """Raises ConfigError for a wrong name, wrong options or too few held-out questions, DataError for bad rows."""
        if config.size < 1:
            raise DataError(f"data.size={config.size} leaves no rows; raise it")
        self._config = config
        self._template = template
        self._seed = seed
        self._quarantine = quarantine
        self._num_drawn = 0
        self._generators: list[tuple[str, Task]] = []
        self._generator(0)
        self._heldout = self._draw_heldout(num_heldout)
        self._heldout_questions = {prompt.task["question"] for prompt in self._heldout}
        for index in range(min(NUM_SAMPLED, config.size)):
            self.prompt(index)

    def __len__(self) -> int:
        """Rows to train on."""
        return self._config.size

    def heldout(self) -> list[Prompt]:
        """The rows held out, of distinct questions."""
        return self._heldout

    def prompt(self, index: int) -> Prompt:
        """Row `index`. Raises DataError when bad rows pass the limit, or redraws find nothing to train on."""
        for attempt in range(MAX_REDRAWS + 1):
            digest, task = self._generator(attempt)
            suffix = f".{attempt}" if attempt else ""
            prompt = self._draw(task, index, f"{self._config.name}-{digest}:{index}{suffix}")
            if prompt is not None and prompt.task["question"] not in self._heldout_questions:
                return prompt
        raise DataError(
            f"no question to train on in {MAX_REDRAWS + 1} draws of {self._config.name!r} row {index}: too few "
            "distinct questions remain; lower eval.num_prompts or widen data.options"
        )

    def _generator(self, attempt: int) -> tuple[str, Task]:
        """The digest and the generator of the attempt-th draw of a row."""
        while len(self._generators) <= attempt:
            self._generators.append(self._create(["train", self._seed, len(self._generators)], self._config.size))
        return self._generators[attempt]

    def _create(self, purpose: list[Any], size: int) -> tuple[str, Task]:
        """A generator whose rows depend on name, options and purpose alone; the digest identifies them."""
        config = self._config
        # hashed: generators seed row i with seed + i, so neighbouring seeds would share most of their rows
        key = hashlib.blake2b(json.dumps([config.name, config.options, purpose], sort_keys=True).encode()).digest()
        # below 2**31: some generators seed numpy, which takes 32 bits
        seed = int.from_bytes(key[:4], "little") // 2
        return key[:4].hex(), create_task(config.name, config.options, seed=seed, size=size)

    def _draw_heldout(self, count: int) -> list[Prompt]:
        if count == 0:
            return []
        digest, task = self._create(["heldout"], count * HELDOUT_DRAWS)
        found: dict[str, Prompt] = {}
        for index in range(count * HELDOUT_DRAWS):
            prompt = self._draw(task, index, f"{self._config.name}-{digest}:{index}")
            if prompt is not None:
                found.setdefault(prompt.task["question"], prompt)
            if len(found) == count:
                return list(found.values())
        raise ConfigError(
            f"eval.num_prompts={count} asks for more than the {len(found)} distinct questions that "
            f"{count * HELDOUT_DRAWS} draws of {self._config.name!r} gave; lower it or widen data.options"
        )

    def _draw(self, task: Task, index: int, prompt_id: str) -> Prompt | None:
        """One row as a prompt, or None when it is bad, which is counted."""
        self._num_drawn += 1
        try:
            return self._template.prompt(self._problem(task, index, prompt_id))
        # whatever a generator raises on one of its rows, that row is bad
        except Exception as error:
            reason = str(error) if isinstance(error, BadRowError) else f"{type(error).__name__}: {error}"
            self._quarantine.add(f"reasoning_gym:{prompt_id.rsplit(':', 1)[0]}", index, reason)
        allowed = self._config.max_bad_fraction
        self._quarantine.check(
            num_rows=self._num_drawn,
            num_allowed=allowed * max(self._num_drawn, MIN_JUDGED),
            max_bad_fraction=allowed,
        )
        return None

    def _problem(self, task: Task, index: int, prompt_id: str) -> Problem:
        entry = task[index]
        answer = entry["answer"]
        details: dict[str, Any] = {
            "name": self._config.name,
            "options": self._config.options,
            "metadata": to_plain(entry["metadata"]),
        }
        if not isinstance(answer, str):
            # tasks without a unique answer have None, which their scorer expects to find again
            details["entry_answer"] = to_plain(answer)
            answer = "" if answer is None else str(answer)
        return Problem(id=prompt_id, question=entry["question"], answer=answer, task=details)

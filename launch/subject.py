"""A policy outside its run, and texts of it: what a drafter is trained on and measured by."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import DataError
from configs.load import find_recipe, load
from configs.schema import Config, SpecConfig
from kernels.sample import noise_key
from launch.cluster import stop_token_ids
from rl.checkpoint import step_of
from rl.data import DataSet, load_data
from rl.export import fill_params, newest_intact, read_params, say_if_older
from rl.features import Text
from rl.rundir import require_run
from rl.template import Template
from rl.warmstart import FIRST_STEP, solution_ids, solver
from rollout.engine import NativeEngine
from rollout.model import context_length, load_config, load_policy, resolve_compute
from rollout.pretrained import load_tokenizer, resolve
from rollout.strategy import make_chooser
from rollout.types import Prompt, Rollout, Sampling

ANSWER_STEP = -2  # of the noise: no training step has it, nor the loop's evaluation


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy and the configuration it rolls out under.

    run: where it was trained, up to this step; None for the model that a recipe starts from. stop_ids: tokens that end
    a response.
    """

    config: Config
    policy: PreTrainedModel
    tokenizer: Any
    stop_ids: tuple[int, ...]
    run: Path | None
    step: int

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def model_config(self) -> PretrainedConfig:
        return self.policy.config

    def data(self, *, num_heldout: int) -> DataSet:
        """The configured problems."""
        return load_data(
            self.config.data,
            self.tokenizer,
            seed=self.config.run.seed,
            context_length=context_length(self.policy.config),
            max_new_tokens=self.config.rollout.max_new_tokens,
            num_heldout=num_heldout,
            quarantine=None,
        )


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A subject whose weights, which may take minutes, are not read yet: what its configs rule out is refused before.

    base: the transformers folder of the model that it is or, of a run, began as; model_config: what config.json there
    says. run: as a Subject's.
    """

    config: Config
    base: Path
    model_config: PretrainedConfig
    device: str
    dtype: str
    run: Path | None

    def load(self) -> Subject:
        """The newest policy of the run, in its own dtype, or the model."""
        if self.run is None:
            policy, step = load_policy(self.base, device=self.device, dtype=self.dtype), 0
        else:
            checkpoint = newest_intact(self.run)
            say_if_older(checkpoint)
            step = step_of(checkpoint)
            params = read_params(checkpoint)
            (kept,) = {tensor.dtype for tensor in params.values()}
            policy = load_policy(self.base, device=self.device, dtype=str(kept).removeprefix("torch."))
            fill_params(policy, params, self.base)
        tokenizer = load_tokenizer(self.base)
        return Subject(self.config, policy, tokenizer, stop_token_ids(self.base, tokenizer), self.run, step)


def find_subject(source: Path, overrides: Sequence[str]) -> Unloaded:
    """The policy of a run directory, or the model a recipe starts from. Raises ConfigError, PreflightError."""
    if not source.is_dir():
        config, run = load(find_recipe(source), overrides), None
    else:
        require_run(source)
        config, run = load(source / "config" / "resolved.yaml", overrides), source
    device, dtype = resolve_compute(config.compute)
    base = resolve(config.model)
    return Unloaded(config, base, load_config(base), device, dtype, run)


def load_subject(source: Path, overrides: Sequence[str]) -> Subject:
    """The newest policy of a run directory, in its own dtype, or the model a recipe starts from."""
    return find_subject(source, overrides).load()


def policy_answers(
    subject: Subject, prompts: Sequence[Prompt], *, temperature: float, num_samples: int = 1
) -> tuple[list[Text], torch.Tensor]:
    """What the policy says to these prompts, and the key of each text's noise, [N] int64.

    Texts of a single response token are left out: nothing can be drafted in them.
    """
    config = subject.config
    engine = NativeEngine(
        subject.policy,
        drafter=None,
        chooser=make_chooser(SpecConfig(source="off"), device=subject.device.type, seed=0),
        rollout=config.rollout,
    )
    sampling = Sampling(
        num_samples=num_samples,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=subject.stop_ids,
        seed=config.run.seed,
        step=ANSWER_STEP,
        temperature=temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        min_p=config.rollout.min_p,
    )

    async def collect() -> list[Rollout]:
        return [rollout async for rollout in engine.generate(prompts, sampling)]

    by_id = {prompt.id: prompt.token_ids for prompt in prompts}
    rollouts = sorted(asyncio.run(collect()), key=lambda rollout: (rollout.prompt_id, rollout.sample))
    rollouts = [rollout for rollout in rollouts if len(rollout.token_ids) > 1]
    if not rollouts:
        raise DataError(f"none of {len(prompts)} responses has two tokens; raise rollout.max_new_tokens")
    keys = [
        noise_key(seed=sampling.seed, step=sampling.step, prompt_id=rollout.prompt_id, sample=rollout.sample)
        for rollout in rollouts
    ]
    texts = [Text([*by_id[r.prompt_id], *r.token_ids], len(by_id[r.prompt_id])) for r in rollouts]
    return texts, torch.tensor(keys, device=subject.device)


def solved_texts(subject: Subject, count: int) -> list[Text]:
    """So many problems with their worked solutions, or all there are, none that runs evaluate on.

    Raises DataError for one that has none.
    """
    evaluation = subject.config.eval
    data = subject.data(num_heldout=evaluation.num_prompts if evaluation.every else 0)
    solve = solver(subject.config.warmstart.solutions)
    prompts = data.prompts(FIRST_STEP, min(count, len(data)))
    texts = [(prompt, solution_ids(solve, prompt, subject.tokenizer)) for prompt in prompts]
    return [Text([*prompt.token_ids, *solution], len(prompt.token_ids)) for prompt, solution in texts]


def sampled_texts(subject: Subject, count: int) -> list[Text]:
    """The newest rollouts of a run, so many or all there are, from the text its samples keep of them.

    Tokenised anew: the tokens are those sampled up to other splits of the same text. Raises DataError without any, and
    for a file that cannot be read.
    """
    assert subject.run is not None
    config, tokenizer = subject.config, subject.tokenizer
    template = Template(
        config.data,
        tokenizer,
        context_length=context_length(subject.policy.config),
        max_new_tokens=config.rollout.max_new_tokens,
    )
    files = sorted((subject.run / "samples").glob("step_*.parquet"), key=lambda path: int(path.stem[5:]), reverse=True)
    texts: list[Text] = []
    for path in files:
        for row in _sampled(path):
            prompt = template.token_ids(row["question"])
            response = tokenizer.encode(row["text"], add_special_tokens=False)
            response += [tokenizer.eos_token_id] if row["finish"] == "stop" else []
            if len(response) > 1 and len(texts) < count:
                texts.append(Text([*prompt, *response], len(prompt)))
        if len(texts) >= count:
            break
    if not texts:
        raise DataError(f"{subject.run} has no samples yet; let it finish a step, or give a recipe instead of a run")
    return texts


def _sampled(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=["question", "text", "finish"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path} cannot be read ({reason}); move it away, and other steps' samples are taken"
        ) from error
    return rows

"""Supervised steps on worked solutions, for a policy that would find no reward on its own."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from configs.errors import ConfigError, DataError
from configs.schema import WarmstartConfig
from rl.batch import supervised_batch
from rl.data import DataSet
from rl.schedule import learning_rate
from rl.types import StepStats, Trainer
from rollout.types import Prompt

# Warm-start step i draws what training step FIRST_STEP + i would. No run gets that far, so the order of the
# problems is one that reinforcement never sees, and how long the warm start was changes nothing of what follows.
FIRST_STEP = 1 << 31

Solver = Callable[[Prompt], str]


def warm_start(
    trainer: Trainer,
    data: DataSet,
    tokenizer: Any,
    config: WarmstartConfig,
    *,
    report: Callable[[int, StepStats], None],
) -> None:
    """Take config.steps cross-entropy steps on solutions that end as a finished response does.

    report gets every step, counted from 1, and its statistics. Raises DataError for a prompt without a solution,
    ConfigError when config.solutions names no function.
    """
    solve = solver(config.solutions)
    for step in range(config.steps):
        prompts = data.prompts(FIRST_STEP + step, config.examples_per_step)
        solutions = [solution_ids(solve, prompt, tokenizer) for prompt in prompts]
        batch = supervised_batch([prompt.token_ids for prompt in prompts], solutions)
        report(step + 1, trainer.supervise(batch, learning_rate(config, step, config.steps)))


def solver(source: str) -> Solver:
    """The function that gives a prompt's worked solution: "field" or "module:function"."""
    if source == "field":
        return lambda prompt: prompt.task.get("solution", "")
    module, _, name = source.partition(":")
    try:
        function: Solver = getattr(import_module(module), name)
    # importing runs the user's code, which may raise anything
    except Exception as error:
        raise ConfigError(
            f'warmstart.solutions="{source}" cannot be imported ({type(error).__name__}: {error}); '
            'give "field" or "module:function"'
        ) from error
    if not callable(function):
        raise ConfigError(f'warmstart.solutions="{source}" is not a function; give "field" or "module:function"')
    return function


def solution_ids(solve: Solver, prompt: Prompt, tokenizer: Any) -> list[int]:
    """Tokens of the prompt's solution, the end-of-sequence token after them. Raises DataError without a solution."""
    try:
        solution = solve(prompt)
    # the user's code may raise anything
    except Exception as error:
        raise DataError(
            f"warmstart.solutions failed on prompt {prompt.id}: {type(error).__name__}: {error}; mend the function"
        ) from error
    if not isinstance(solution, str) or not solution:
        raise DataError(
            f"prompt {prompt.id} has no worked solution (got {solution!r}); "
            "name its column in data.solution_field, or set warmstart.solutions, as to rl.worked:chain_sum"
        )
    return [*tokenizer.encode(solution, add_special_tokens=False), tokenizer.eos_token_id]

"""TRL's GRPOTrainer on a given job: the peer of `paceline bench loop`, run by the Python of TRL's own environment.

A script of its own: it imports nothing of Paceline, reads a JSON job from standard input and prints a JSON result.
"""

import contextlib
import functools
import json
import sys
from importlib import metadata
from time import perf_counter
from typing import Any

# How TRL is set, beside what the job says: its documented settings for a CPU, and nothing that costs time for nothing.
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "use_vllm": False,
    "gradient_checkpointing": False,
    "num_iterations": 1,
    "loss_type": "dapo",  # token-level aggregation, as ours
    "scale_rewards": "group",
    "beta": 0.0,  # no reference model
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "shuffle_dataset": False,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def digit_share(text: str) -> float:
    """The reward of both sides: the share of digits among the characters, cheap and seldom equal within a group."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def reward(prompt: Any, rollout: Any) -> float:
    """digit_share as a reward of Paceline: prompt is a rollout.types.Prompt, rollout a rollout.types.Rollout."""
    return digit_share(rollout.text)


def main() -> None:
    """Do the job on standard input and print its result on standard output; all other output goes to stderr."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        result = train(job)
    print(json.dumps(result))


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train job["steps"] steps.

    The job: model (folder), messages (a chat a prompt, in the order of use), prompt_ids (their tokens, to check that
    both sides read the same), threads, stop_token_ids, and trl (further arguments of GRPOConfig).
    Returns versions, settings, and for each step seconds, seconds_rollout (in generate), seconds_train (the rest) and
    tokens (generated, stop tokens included).
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    for messages, prompt_ids in zip(job["messages"], job["prompt_ids"], strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if ids != prompt_ids:
            raise SystemExit(f"TRL reads {messages} as {ids}, Paceline as {prompt_ids}")

    steps: list[dict[str, float]] = []
    generating: list[float] = []  # seconds of this step's calls of generate
    lengths: list[int] = []

    def score(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [digit_share(completion[0]["content"]) for completion in completions]

    class StepClock(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds, rollout = perf_counter() - self.begun, sum(generating)
            steps.append(
                {
                    "seconds": seconds,
                    "seconds_rollout": rollout,
                    "seconds_train": seconds - rollout,
                    "tokens": sum(lengths),
                    "num_rollouts": len(lengths),
                }
            )
            generating.clear()
            lengths.clear()

    settings = SETTINGS | job["trl"]
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=score,
        args=GRPOConfig(**settings, max_steps=job["steps"], model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in job["messages"]]),
        processing_class=tokenizer,
        callbacks=[StepClock()],
    )
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    if dtypes != {torch.float32}:
        raise SystemExit(f"TRL loaded the model in {dtypes}, not float32")
    if set(trainer.eos_token_ids) != set(job["stop_token_ids"]):
        raise SystemExit(f"TRL stops at {trainer.eos_token_ids}, Paceline at {job['stop_token_ids']}")

    generate = trainer.model.generate

    @functools.wraps(generate)
    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        begun = perf_counter()
        result = generate(*args, **kwargs)
        generating.append(perf_counter() - begun)
        return result

    trainer.model.generate = timed_generate
    trainer.train()
    packages = ("trl", "torch", "transformers", "accelerate", "datasets")
    return {
        "versions": {name: metadata.version(name) for name in packages},
        "settings": {name: value for name, value in settings.items() if name != "output_dir"},
        "steps": steps,
    }


if __name__ == "__main__":
    main()

"""The training loop timed against a peer's on the same job, in one invocation on one machine."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, PreflightError
from launch.bench_peer import last_line

if TYPE_CHECKING:
    from configs.schema import Config
    from rollout.types import Prompt

# The first step pays for allocation and compilation on both sides.
WARMUP_STEPS = 1
# A shape that is timed in minutes, over the recipe's and under the user's own overrides.
SHAPE = ("rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_new_tokens=96")
# What TRL does too, over everything else.
FIXED = (
    "compute.backend=inline",
    "compute.device=cpu",
    "compute.dtype=float32",
    "eval.every=0",
    "warmstart.steps=0",
    "checkpoint.every=1000000",
    "train.schedule=constant",
)
REWARD = "launch.bench_trl:reward"
TIMES = ("seconds", "seconds_rollout", "seconds_train")

Step = dict[str, float]


@dataclass
class Arm:
    """One contender: what it was told, and every timed step of every round."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


def run(
    recipe: Path,
    overrides: Sequence[str],
    *,
    peer: str,
    peer_python: Path,
    sources: Sequence[str],
    steps: int,
    rounds: int,
    threads: int,
    peer_micro: int,
) -> dict[str, Any]:
    """Time the peer and every source of drafts in turns; the result. threads 0: all cores; peer_micro as in peer_job.

    Raises ConfigError and PreflightError.
    """
    from configs.load import load

    threads = threads or len(os.sched_getaffinity(0))
    given = [*SHAPE, *overrides, *FIXED, f"train.steps={WARMUP_STEPS + steps}"]
    configs = {source: _rewarded(load(recipe, [*given, f"spec.source={source}"])) for source in sources}
    shared = next(iter(configs.values()))
    _require_comparable(shared)
    _require_peer(peer_python, peer)
    job = peer_job(shared, *_prompts(shared), threads=threads, micro=peer_micro)
    arms = [Arm(peer), *(Arm(f"paceline {source}") for source in configs)]
    load_average = os.getloadavg()  # before we add to it: what else the machine was doing
    console = Console(stderr=True)
    for round_number in range(rounds):
        # each round starts with another arm, so that a machine that warms up or fills up favours none
        for arm in arms[round_number % len(arms) :] + arms[: round_number % len(arms)]:
            console.print(f"round {round_number + 1} of {rounds}: {arm.name}", highlight=False)
            with tempfile.TemporaryDirectory(prefix="paceline-bench-") as folder:
                if arm.name == peer:
                    _run_peer(arm, job, Path(folder), peer_python, threads)
                else:
                    _run_paceline(arm, configs[arm.name.removeprefix("paceline ")], Path(folder), threads)
    return report(arms, shared, threads=threads, rounds=rounds) | {"load_average": load_average}


def peer_job(
    config: "Config",
    model: Path,
    stop_token_ids: Sequence[int],
    prompts: Sequence["Prompt"],
    *,
    threads: int,
    micro: int,
) -> dict[str, Any]:
    """The same training run in TRL's words (launch/bench_trl.py reads it). micro: sequences a pass, 0 to derive it."""
    rollout, train, data = config.rollout, config.train, config.data
    num_rollouts = rollout.prompts_per_step * rollout.group_size
    longest = max(len(prompt.token_ids) for prompt in prompts) + rollout.max_new_tokens
    micro = micro or max(
        size for size in range(1, num_rollouts + 1) if num_rollouts % size == 0 and size * longest <= train.micro_tokens
    )
    if num_rollouts % micro:
        raise ConfigError(f"--peer-micro={micro} does not divide the {num_rollouts} rollouts of a step; give a divisor")
    system = [{"role": "system", "content": data.system}] if data.system else []
    return {
        "model": str(model),
        "steps": train.steps,
        "threads": threads,
        "stop_token_ids": list(stop_token_ids),
        "messages": [
            [*system, {"role": "user", "content": data.template.replace("{question}", str(prompt.task["question"]))}]
            for prompt in prompts
        ],
        "prompt_ids": [prompt.token_ids for prompt in prompts],
        "trl": {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": num_rollouts // micro,
            "num_generations": rollout.group_size,
            "max_completion_length": rollout.max_new_tokens,
            "temperature": rollout.temperature,
            "top_k": rollout.top_k,
            "top_p": rollout.top_p,
            "min_p": rollout.min_p or None,
            "learning_rate": train.lr,
            "adam_beta1": train.betas[0],
            "adam_beta2": train.betas[1],
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.max_grad_norm,
            "epsilon": train.clip_low,
            "epsilon_high": train.clip_high,
            "scale_rewards": "group" if train.advantage == "std" else "none",
            "seed": config.run.seed,
        },
    }


def report(arms: Sequence[Arm], config: "Config", *, threads: int, rounds: int) -> dict[str, Any]:
    """Everything measured, and what it was measured on: JSON-able. The first arm is the peer."""
    from configs.load import dump
    from rl.environment import environment

    peer, *ours = ({"name": arm.name} | summary(arm.steps) | vars(arm) for arm in arms)
    return {
        "what": "seconds per GRPO step",
        **environment(),
        "cpu": _cpu_model(),
        "threads": threads,
        "rounds": rounds,
        "warmup_steps": WARMUP_STEPS,
        "seed": config.run.seed,
        "config": dump(config),
        "arms": [peer, *ours],
        "speedup": {
            arm["name"]: {
                "step": peer["seconds"]["median"] / arm["seconds"]["median"],
                # sampled lengths differ; this ratio takes them out
                "tokens_per_s": arm["tokens_per_s"] / peer["tokens_per_s"],
            }
            for arm in ours
        },
    }


def summary(steps: Sequence[Step]) -> dict[str, Any]:
    """Median and spread of a step's times; tokens a step, rollout and second; accept length where there is one."""
    tokens = sum(step["tokens"] for step in steps)
    times: dict[str, Any] = {}
    for name in TIMES:
        values = [step[name] for step in steps]
        times[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    lengths = [step["accept_length"] for step in steps if "accept_length" in step]
    return times | {
        "tokens_per_step": tokens / len(steps),
        "response_len_mean": tokens / sum(step["num_rollouts"] for step in steps),
        "tokens_per_s": tokens / sum(step["seconds"] for step in steps),
        "rollout_tokens_per_s": tokens / sum(step["seconds_rollout"] for step in steps),
        "accept_length": statistics.fmean(lengths) if lengths else None,
    }


def table(result: dict[str, Any]) -> Table:
    """The arms side by side: seconds a step and its parts (medians), tokens a step."""
    shown = Table(
        title=f"{result['what']}, {result['threads']} threads, {result['cpu']}",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for heading in ("", "median", "min", "max", "rollout", "train", "tokens", "tok/s", "accept", "gain"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for arm in result["arms"]:
        accept, speedup = arm["accept_length"], result["speedup"].get(arm["name"])
        shown.add_row(
            arm["name"],
            *(f"{arm['seconds'][name]:.2f}" for name in ("median", "min", "max")),
            *(f"{arm[name]['median']:.2f}" for name in ("seconds_rollout", "seconds_train")),
            f"{arm['tokens_per_step']:.0f}",
            f"{arm['tokens_per_s']:.1f}",
            "" if accept is None else f"{accept:.2f}",
            "" if speedup is None else f"{speedup['step']:.2f}x",
        )
    return shown


def _rewarded(config: "Config") -> "Config":
    """The config with the reward that both sides share; an override could only add it to the recipe's."""
    return replace(config, reward=replace(config.reward, functions={REWARD: 1.0}))


def _require_comparable(config: "Config") -> None:
    """Raises ConfigError for what the two sides would not do alike."""
    train = config.train
    wanted: dict[str, tuple[object, object]] = {
        "kl_coef": (train.kl_coef, 0.0),
        "updates_per_step": (train.updates_per_step, 1),
        "schedule": (train.schedule, "constant"),
        "warmup_steps": (train.warmup_steps, 0),
        "gradient_checkpointing": (train.gradient_checkpointing, False),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise ConfigError(
                f"train.{name}={value!r}: the peers are compared at {needed!r}; set train.{name}={needed}"
            )


def _require_peer(python: Path, peer: str) -> None:
    """Raises PreflightError when the peer's environment lacks it."""
    try:
        found = subprocess.run([str(python), "-c", f"import {peer}"], capture_output=True, text=True)
    except OSError as error:
        raise PreflightError(f"--peer-python {python} does not run ({error}); give the python of a venv") from error
    if found.returncode:
        raise PreflightError(
            f"--peer-python {python} cannot import {peer} ({last_line(found.stderr)}); "
            f"`{python} -m pip install torch {peer} transformers datasets` installs it"
        )


def _prompts(config: "Config") -> tuple[Path, tuple[int, ...], list["Prompt"]]:
    """Model folder, stop tokens, and the prompts of every step as the loop will draw them."""
    from launch.cluster import read_inputs, stop_token_ids

    model, tokenizer, data = read_inputs(config, num_heldout=0, quarantine=None)
    count = config.rollout.prompts_per_step
    prompts = [prompt for step in range(config.train.steps) for prompt in data.prompts(step, count)]
    return model, stop_token_ids(model, tokenizer), prompts


def _run_peer(arm: Arm, job: dict[str, Any], folder: Path, python: Path, threads: int) -> None:
    """Append a round of the peer's steps to its arm."""
    job = job | {"trl": job["trl"] | {"output_dir": str(folder)}}
    output = _run([str(python), str(Path(__file__).with_name("bench_trl.py"))], threads, stdin=json.dumps(job))
    result = json.loads(output)
    arm.settings, arm.versions = result["settings"], result["versions"]
    arm.steps += result["steps"][WARMUP_STEPS:]


def _run_paceline(arm: Arm, config: "Config", folder: Path, threads: int) -> None:
    """Append a round of `paceline train` to its arm."""
    from configs.load import dump

    run, recipe = folder / "run", folder / "config.yaml"
    recipe.write_text(dump(config), encoding="utf-8")
    command = [sys.executable, "-c", "from launch.cli import main; main()", "train", str(recipe), f"run.dir={run}"]
    _run(command, threads)
    records = [json.loads(line) for line in (run / "metrics" / "steps.jsonl").read_text().splitlines()]
    names = ("seconds", "seconds_rollout", "seconds_train", "tokens", "num_rollouts", "accept_length")
    arm.steps += [{name: record[name] for name in names} for record in records[WARMUP_STEPS:]]
    arm.settings = {"spec": asdict(config.spec)}
    arm.versions = json.loads((run / "env.json").read_text())["packages"]


def _run(command: list[str], threads: int, stdin: str = "") -> str:
    """Run one side alone and return its standard output. Raises PreflightError with its last word if it fails."""
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise PreflightError(f"`{shlex.join(command[:2])}` ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"

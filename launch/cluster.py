"""Put a run together from its config: the parts in this process, or behind Ray actors."""

import asyncio
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from configs.errors import ConfigError, PreemptedError, PreflightError
from configs.load import changes, load
from configs.schema import Config
from launch.crash import Phases
from launch.parts import build_worker
from launch.recovery import with_recoveries
from rl.checkpoint import CheckpointStore
from rl.data import DataSet, load_data
from rl.gate_lessons import GateLessons
from rl.lessons import Lessons
from rl.loop import Loop
from rl.reward import check_prompt, check_rewards
from rl.rundir import RunDir
from rl.sandbox import RewardPool
from rl.types import Learner, TeachesGates, Trainer
from rl.warmstart import solver
from rollout.engine import NativeEngine
from rollout.model import context_length, load_config, resolve_compute
from rollout.pretrained import load_tokenizer, resolve
from rollout.types import Engine


def train_run(config: Config, run: RunDir, *, resume: bool, progress: Phases) -> None:
    """Train to the last step, in a new run directory or from the newest intact checkpoint of an old one.

    Goes on by itself where workers are lost. Raises RecoveryError once they are lost too often.
    """
    device, dtype = resolve_compute(config.compute)
    num_heldout = config.eval.num_prompts if config.eval.every else 0
    path, tokenizer, data = read_inputs(config, num_heldout=num_heldout, quarantine=run.path / "quarantine.jsonl")
    store = CheckpointStore(run.path / "checkpoints", keep=config.checkpoint.keep)
    store.clean()
    stop = threading.Event()

    def attempt(recovery: int) -> None:
        if stop.is_set():
            raise PreemptedError("asked to stop, and a worker was lost before the state was saved")
        checkpoint = store.latest() if resume or recovery else None
        if checkpoint is None and (resume or recovery):
            progress.message("no intact checkpoint yet: starting from step 0")
        engine: Engine
        trainer: Trainer
        learner: Learner | None = None
        gates: TeachesGates | None = None
        with ExitStack() as stack:
            if config.compute.backend == "ray":
                protect_local_ray()
                # Ray takes a second to import; one process does not need it
                from launch.gate_learners import RayGateLessons
                from launch.start import start_workers

                workers = start_workers(config, path, device=device, dtype=dtype, recovery=recovery)
                sampling, trainer, learner = stack.enter_context(workers)
                engine = sampling
                gates = RayGateLessons(sampling.workers, sampling.fleet) if config.sparse.learn else None
            else:
                engine, trainer, learner = build_worker(config, path, device=device, dtype=dtype)
                gates = make_gate_lessons(config, engine)
            asyncio.run(
                run_loop(
                    config,
                    run,
                    checkpoint,
                    data=data,
                    engine=engine,
                    trainer=trainer,
                    lessons=make_lessons(config, learner, path),
                    gates=gates,
                    tokenizer=tokenizer,
                    stop_token_ids=stop_token_ids(path, tokenizer),
                    store=store,
                    progress=progress,
                    stop_requested=stop,
                )
            )

    with_recoveries(attempt, run=run, budget=config.run.max_recoveries, phases=progress)


def read_inputs(config: Config, *, num_heldout: int, quarantine: Path | None) -> tuple[Path, Any, DataSet]:
    """The model's folder, its tokenizer and the problems, with rewards and counts checked.

    Raises PacelineError for what would stop the run before its first step.
    """
    path = resolve(config.model).absolute()  # workers start elsewhere
    tokenizer = load_tokenizer(path)
    check_rewards(config.reward)
    data = load_data(
        config.data,
        tokenizer,
        seed=config.run.seed,
        context_length=context_length(load_config(path)),
        max_new_tokens=config.rollout.max_new_tokens,
        num_heldout=num_heldout,
        quarantine=quarantine,
    )
    check_counts(config, data)
    if config.data.source != "reasoning_gym":  # whose problems name their task, and have no tests: configs.check
        check_prompt(config.reward, data.prompts(1, 1)[0])
    return path, tokenizer, data


async def run_loop(config: Config, run: RunDir, checkpoint: Path | None, **parts: Any) -> None:
    """Start the reward workers, take up the checkpoint, train; SIGTERM asks the loop to stop."""
    async with RewardPool(config.reward) as rewards:
        loop = Loop(config=config, run=run, rewards=rewards, **parts)
        if checkpoint is not None:
            loop.restore(checkpoint)
        run.truncate_after(None if checkpoint is None else loop.step)
        if unused := take_up(config, run, step=loop.step):
            parts["progress"].message(f"warning: {unused}")
        run.write_status(step=loop.step)
        if rewards.sandbox is not None:
            kind, detail = rewards.sandbox
            run.add_environment(sandbox={"kind": kind, "detail": detail})
            parts["progress"].message(f"model-written code runs under {kind}: {detail}")
        with on_sigterm(loop.stop_requested):
            await loop.train()


def take_up(config: Config, run: RunDir, *, step: int) -> str:
    """Make this the configuration of a run that has reached a step, now that what it asks for has been taken up.

    Of a run that had done all of its steps it leaves the old one; what to say then of what is asked for in vain.
    """
    if step >= config.train.steps:
        before = load(run.path / "config" / "resolved.yaml")
        if step >= before.train.steps:
            asked = ", ".join(changes(before, config))
            return asked and f"{asked} had no effect: all {step} steps are done; raise train.steps as well to go on"
    run.write_config(config)
    return ""


def make_lessons(config: Config, learner: Learner | None, path: Path) -> Lessons | None:
    """The lessons of a drafter that learns; without one, None."""
    if learner is None:
        return None
    vocab_size = load_config(path).get_text_config().vocab_size
    return Lessons(learner, config.drafter, vocab_size=vocab_size)


def make_gate_lessons(config: Config, engine: Engine) -> GateLessons | None:
    """The lessons of gates that learn, over the engine that drafts by them; without any, None."""
    if not config.sparse.learn:
        return None
    assert isinstance(engine, NativeEngine)  # configs.check lets no other engine attend sparsely
    return GateLessons(engine)


def stop_token_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and those of the model's generation config."""
    stops: set[int] = {tokenizer.eos_token_id} - {None}
    if (path / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(path).eos_token_id
        stops |= {ends} - {None} if not isinstance(ends, list) else set(ends)
    if not stops:
        raise PreflightError(f"{path} names no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return tuple(sorted(stops))


def protect_local_ray() -> None:
    """Make a cluster of our own answer to this run and this machine alone. Before Ray is imported: it reads these once.

    Of its ports those for metrics ask for no token, and all would listen to every address.
    """
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Linux heeds it too: loopback (seen in 2.60)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def on_sigterm(stop: threading.Event) -> Iterator[None]:
    """While inside, SIGTERM sets the event instead of ending the process."""
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_counts(config: Config, data: DataSet) -> None:
    """Find out before the model is loaded what would stop the run after it. Raises ConfigError."""
    counts = {"rollout.prompts_per_step": config.rollout.prompts_per_step}
    if config.warmstart.steps:
        solver(config.warmstart.solutions)
        counts["warmstart.examples_per_step"] = config.warmstart.examples_per_step
    for key, count in counts.items():
        if count > len(data):
            raise ConfigError(f"{key}={count} exceeds the {len(data)} training rows; lower it, or add rows")

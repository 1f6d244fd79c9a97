"""Group-relative policy optimisation, from prompt to policy, with plain objects.

One step: draw prompts, sample a group of rollouts for each, score them while others are still being sampled, take
advantages within each group, give the drafter its lesson, update the policy, tell the engine. Nothing here knows
whether engine, trainer and drafter live in this process or behind Ray actors.

Everything random is keyed by (seed, step): the data order and the sampling noise are pure functions of them, so the
step number is the whole data position and random state, and a step that is lost is done again, identical.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, DataError, PreemptedError
from configs.faults import hit
from configs.schema import Config
from rl.advantage import group_advantages
from rl.batch import pack
from rl.checkpoint import CheckpointStore, step_of
from rl.data import DataSet
from rl.drift import DriftAlarm
from rl.invariants import check_step
from rl.lessons import Lessons
from rl.metrics import Progress, Stopwatch, rollout_record, sample_rows, step_record
from rl.recorder import Recorder
from rl.rundir import RunDir
from rl.sandbox import RewardPool
from rl.types import Group, StepStats, TeachesGates, Trainer
from rl.warmstart import warm_start
from rollout.lossy import UNDER
from rollout.pretrained import hub_name
from rollout.types import Engine, Prompt, Rollout, Sampling

# Evaluation noise is never drawn (temperature 0); the step only has to differ from training steps.
EVAL_STEP = -1
DRAFTER, GATES = "drafter", "gates"  # their folders in a checkpoint
STOP_POLL_S = 0.5  # how often a request to stop is looked for while no rollout finishes


@dataclass
class Loop:
    """A run: its parts, and the step it has reached."""

    config: Config
    run: RunDir
    data: DataSet
    engine: Engine
    trainer: Trainer
    rewards: RewardPool
    tokenizer: Any  # transformers tokenizer
    stop_token_ids: tuple[int, ...]
    store: CheckpointStore
    progress: Progress
    stop_requested: threading.Event  # set by a signal handler, also in the middle of synchronous work
    lessons: Lessons | None = None  # of a drafter that learns
    gates: TeachesGates | None = None  # who teaches gates that do
    step: int = 0
    prepared: bool = False  # the warm start, if any, is in the weights
    recorder: Recorder = field(init=False)
    drift: DriftAlarm = field(default_factory=DriftAlarm)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.run, self.engine, self.config)

    async def train(self) -> None:
        """Run from self.step to the last step. Raises PreemptedError, state saved, when asked to stop."""
        total = self.config.train.steps
        if not self.prepared:
            await self.prepare()
        engine_state = self.engine.state_dict()  # at the boundary: what a checkpoint of this step must hold
        while self.step < total:
            try:
                await self.train_step()
            except PreemptedError:
                self.save(engine_state)
                raise
            engine_state = self.engine.state_dict()
            if self.step % self.config.checkpoint.every == 0 or self.step == total:
                self.save(engine_state)
            self.recorder.end()

    async def prepare(self) -> None:
        """Before the first step: measure the model as it came, then warm it up if asked to."""
        warmstart = self.config.warmstart
        await self.evaluate("base")
        if warmstart.steps == 0:
            return
        self.progress.phase("warmstart")
        with self.recorder.span("warmstart"):
            warm_start(self.trainer, self.data, self.tokenizer, warmstart, report=self.report_warmstart)
        self.engine.update(0)
        await self.evaluate("warmstart")
        self.save(self.engine.state_dict())

    def report_warmstart(self, step: int, stats: StepStats) -> None:
        """Keep a supervised step's figures. Raises PreemptedError when asked to stop: there is nothing to save yet."""
        figures = {"loss": stats.loss, "grad_norm": stats.grad_norm, "seconds": stats.seconds}
        self.run.append_metrics("warmstart", {"step": step} | figures)
        if self.stop_requested.is_set():
            raise PreemptedError(f"asked to stop after step {step} of the warm start")

    async def train_step(self) -> None:
        """One step of GRPO."""
        config, watch = self.config, self.recorder.begin(self.step + 1)
        prompts = self.data.prompts(self.step, config.rollout.prompts_per_step)
        stream = self.until_stopped(self.sample(prompts, self.sampling(self.step)))
        total = len(prompts) * config.rollout.group_size
        groups = await self.collect(prompts, stream, watch, total=total, lessons=self.lessons)
        check_step(groups, prompts, num_samples=config.rollout.group_size, version=self.step)
        drafter = self.teach(groups, watch)
        self.progress.phase("train")
        with watch.phase("train"):
            stats = self.trainer.step(pack(groups, self.engine.references()))
        self.step += 1
        with watch.phase("sync"):
            moved = self.engine.update(self.step)
        self.drift.check(stats.prob_diff_mean, self.step, self.run, self.progress)
        record = step_record(self.step, config, groups, stats, watch) | drafter | self.engine.figures()
        if moved:
            record["weight_sync_bytes"] = moved
        if config.eval.every and (self.step % config.eval.every == 0 or self.step == config.train.steps):
            with watch.phase("eval"):
                record["eval_reward"] = await self.evaluate("rl")
        failures = self.rewards.failures
        record |= watch.record() | {"reward_failures": failures.total(), "time": time.time()}
        record["reward_failures_by_kind"] = dict(failures)
        if self.lessons is not None:
            self.lessons.earn(record["seconds"])
        self.run.append_metrics("steps", record)
        self.run.write_samples(self.step, sample_rows(groups))
        self.run.write_status(state="running", step=self.step, total_steps=config.train.steps, record=record)
        self.progress.step(record)

    def teach(self, groups: Sequence[Group], watch: Stopwatch) -> dict[str, Any]:
        """The lessons of this step, of the drafter and of gates, and their figures; {} where neither learns."""
        if self.lessons is None and self.gates is None:
            return {}
        self.progress.phase("drafter")
        with watch.phase("drafter"):
            record = {} if self.gates is None else self.gates.take()
            return record if self.lessons is None else record | self.teach_drafter(self.lessons, groups)

    def teach_drafter(self, lessons: Lessons, groups: Sequence[Group]) -> dict[str, Any]:
        """The drafter's lesson of this step, and its figures."""
        off = lessons.off
        record = lessons.take(groups, version=self.step)
        if lessons.off and lessons.off != off:
            self.run.append_event("drafter_off", step=self.step, reason=lessons.off)
            self.progress.message(f"the drafter learns no more: {lessons.off}; rollouts go on")
        return record

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[Rollout]:
        """Rollouts of every prompt, under the recorder's eyes."""
        total = len(prompts) * sampling.num_samples
        return self.recorder.watched(self.engine.generate(prompts, sampling), sampling, total=total)

    async def until_stopped(self, rollouts: AsyncGenerator[Rollout]) -> AsyncGenerator[Rollout]:
        """The same rollouts, until someone asks the run to stop. Raises PreemptedError then."""
        async with aclosing(rollouts):
            while True:
                following = asyncio.ensure_future(anext(rollouts))
                try:
                    while not following.done() and not self.stop_requested.is_set():
                        await asyncio.wait({following}, timeout=STOP_POLL_S)
                finally:  # Ctrl-C cancels this, and rollouts that run cannot be closed
                    if not following.done():
                        following.cancel()
                        await asyncio.wait({following})
                if self.stop_requested.is_set():
                    raise PreemptedError(f"asked to stop while sampling after step {self.step}")
                try:
                    yield following.result()
                except StopAsyncIteration:
                    return

    async def collect(
        self,
        prompts: Sequence[Prompt],
        rollouts: AsyncGenerator[Rollout],
        watch: Stopwatch,
        *,
        total: int,
        lessons: Lessons | None = None,
    ) -> list[Group]:
        """Score the rollouts of every prompt while others are still being sampled, and put them into groups.

        lessons: the drafter's, where it may learn while the last scores are awaited. An evaluation has none: the
        policy may have been updated since the features were made.
        """
        by_id = {prompt.id: prompt for prompt in prompts}
        groups: dict[str, list[tuple[Rollout, asyncio.Task[dict[str, float]]]]] = {prompt.id: [] for prompt in prompts}
        scores: list[asyncio.Task[dict[str, float]]] = []
        failed: list[asyncio.Task[dict[str, float]]] = []

        def settle(score: asyncio.Task[dict[str, float]]) -> None:
            if not score.cancelled() and score.exception() is not None:
                failed.append(score)

        self.progress.phase("rollout")
        try:
            with watch.phase("rollout"):
                async for rollout in rollouts:
                    watch.arrived()
                    rollout = replace(rollout, text=self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True))
                    score = asyncio.create_task(self.rewards.score(by_id[rollout.prompt_id], rollout))
                    score.add_done_callback(settle)
                    scores.append(score)
                    groups[rollout.prompt_id].append((rollout, score))
                    self.progress.rollouts(len(scores), total)
                    if failed:  # before the rest is sampled for nothing
                        failed[0].result()
            self.progress.phase("reward")
            with watch.phase("reward"):
                if lessons is not None:
                    await lessons.while_awaited(scores)
                await asyncio.gather(*scores)
        finally:
            for score in scores:
                score.cancel()
        return [self.group(prompt, groups[prompt.id]) for prompt in prompts]

    def group(self, prompt: Prompt, scored: list[tuple[Rollout, asyncio.Task[dict[str, float]]]]) -> Group:
        """Order a prompt's rollouts, weigh the reward functions' values and take advantages within the group."""
        scored = sorted(scored, key=lambda pair: pair[0].sample)
        values = [score.result() for _, score in scored]
        weights = self.config.reward.functions
        rewards = [sum(weights[name] * value[name] for name in weights) for value in values]
        return Group(
            prompt=prompt,
            rollouts=[rollout for rollout, _ in scored],
            rewards=rewards,
            advantages=group_advantages(rewards, self.config.train.advantage),
            parts={name: [value[name] for value in values] for name in weights},
        )

    async def evaluate(self, stage: str) -> float:
        """Mean greedy reward on held-out problems; NaN when evaluation is off."""
        if not self.config.eval.every:
            return float("nan")
        self.progress.phase("eval")
        prompts = self.data.heldout(self.config.eval.num_prompts)
        if not prompts:
            raise DataError("no held-out problems to evaluate on; set eval.every=0 or give more data")
        greedy = replace(self.sampling(EVAL_STEP), num_samples=1, temperature=0.0)
        if self.config.eval.attention == "dense":
            greedy = replace(greedy, under="dense")
        watch = Stopwatch()
        rollouts = self.sample(prompts, greedy)
        if stage != "rl":  # after a step, a request to stop waits until its evaluation and record are complete
            rollouts = self.until_stopped(rollouts)
        with self.recorder.span("eval"):
            groups = await self.collect(prompts, rollouts, watch, total=len(prompts))
        self.engine.update(self.step)  # a resumed run will not find what this has cached
        record = rollout_record(groups, seconds=watch.seconds["rollout"])
        self.run.append_metrics("eval", {"step": self.step, "stage": stage} | record | watch.record())
        self.progress.message(f"held-out greedy reward after {stage} step {self.step}: {record['reward_mean']:.3f}")
        return float(record["reward_mean"])

    def sampling(self, step: int) -> Sampling:
        """The configured transform, with this step's noise."""
        rollout = self.config.rollout
        return Sampling(
            num_samples=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            seed=self.config.run.seed,
            step=step,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            under=UNDER.get(self.config.sparse.mode, "dense"),
        )

    @property
    def engines(self) -> str:
        """Which engines sample: their states belong to them alone."""
        compute = self.config.compute
        if compute.placement == "separate":  # whoever trains has none
            team = self.config.rollout.tensor_parallel
            shared = f" rollout.tensor_parallel={team}" if team > 1 else ""
            return f"compute.placement=separate compute.rollout_workers={compute.rollout_workers}{shared}"
        return f"compute.backend={compute.backend} compute.workers={compute.workers}"

    def save(self, engine_state: dict[str, Any]) -> None:
        """Checkpoint the boundary after self.step steps; a boundary already saved is left as it is."""
        self.progress.phase("checkpoint")
        stalls: dict[str, float] = {}

        def fill(folder: Path) -> None:
            (folder / "trainer").mkdir()
            if self.lessons is not None:  # written while the trainer writes
                stalls["drafter_stall_s"] = self.lessons.learner.save(folder / DRAFTER)
            self.trainer.save(folder / "trainer")
            if self.gates is not None:
                self.gates.save(folder / GATES, base_model=hub_name(self.config.model))
            if self.lessons is not None:
                self.lessons.learner.saved()
            lessons = {} if self.lessons is None else self.lessons.state_dict()
            state = {"step": self.step, "engines": self.engines, "engine": engine_state, "lessons": lessons}
            hit("checkpoint.file")
            (folder / "loop.json").write_text(json.dumps(state, default=list))

        with self.recorder.span("checkpoint"):
            path = self.store.write(self.step, fill)
        self.run.append_event("checkpoint", step=self.step, path=str(path), **stalls)

    def restore(self, checkpoint: Path) -> None:
        """Take up the state a checkpoint holds."""
        state = json.loads((checkpoint / "loop.json").read_text())
        assert state["step"] == step_of(checkpoint), f"{checkpoint} says it is step {state['step']}"
        if state["engines"] != self.engines:
            raise ConfigError(
                f"{checkpoint} was written under {state['engines']}, not {self.engines}; resume as it was"
            )
        self.trainer.load(checkpoint / "trainer")
        self.engine.load_state_dict(state["engine"])
        if self.lessons is not None and (checkpoint / DRAFTER).exists():  # the run may have begun without one
            self.lessons.learner.load(checkpoint / DRAFTER)
            self.lessons.load_state_dict(state["lessons"])
        if self.gates is not None and (checkpoint / GATES).exists():
            self.gates.load(checkpoint / GATES)
        self.step, self.prepared = state["step"], True
        self.engine.update(self.step)
        self.run.append_event("resume", step=self.step, path=str(checkpoint))

"""Accept length by step of a run: of a drafter kept as it is, of the same one learning on, and of one from nothing.

The drafter is trained on answers of the model that the recipe starts from, before the warm start if it has one. Every
arm is then a run of its own from one checkpoint, with the same prompts and noise; all live in this process and take
turns, a step each. Nothing is timed: what a learning drafter learns in a step depends on the machine all the same, by
drafter.budget.
"""

import asyncio
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.table import Table

from configs.errors import ConfigError
from configs.load import dump, load
from configs.schema import Config
from drafter.evaluate import Cycles
from launch.arms import WARM, Arm, begin_arm, free, newest, standing, take_turns, warm_up
from launch.bench_report import WrongResultError, plain_table, provenance
from launch.longtail_drafter import early_and_late, heard
from launch.longtail_report import accept_table, agreement_of, steps_of
from launch.offline import drafter_for, drafter_shape, problems, replay, train_drafter, write_trained
from launch.subject import load_subject, policy_answers
from rl.export import require_free
from rl.export_drafter import require_drafter_place
from rl.features import Text
from rl.warmstart import FIRST_STEP
from rollout.model import load_config
from rollout.pretrained import resolve

STATIC, ONLINE, RANDOM = "static", "online", "random"
ARMS = (STATIC, ONLINE, RANDOM)
DRAFTER = "drafter"  # its folder, beside those of the arms
# Over the recipe and under the user's overrides: chains of one length everywhere, so that accept lengths compare, and
# a share of the time in which a drafter learns within tens of steps.
SHAPE = ("spec.choice=fixed", "spec.depth=4", "spec.top_k=1", "spec.num_verify=4", "drafter.budget=0.4")
FIXED = ("compute.backend=inline", "checkpoint.every=1000000", "eval.every=0", "spec.source=eagle", "drafter.init=''")
KEPT = (  # of a step's record
    *("step", "accept_length", "drafter_version", "drafter_steps", "drafter_loss", "reward_mean", "tokens"),
    *("seconds", "seconds_rollout", "seconds_drafter"),
)
ROWS = 16  # of the table by step, at most

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: so many steps of every arm, from a drafter of so many updates on answers to `texts` prompts.

    minutes: no round of turns is begun later than that after the start; 0 sets no limit.
    """

    steps: int
    drafter_steps: int
    texts: int
    minutes: float


def run(
    recipe: Path, overrides: Sequence[str], job: Job, *, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train the drafter, take the warm start, and let the arms take turns in folders under `folder`; JSON-able.

    keep is given the result so far after every turn. Raises ConfigError and PreflightError, for folders that are taken
    too, before anything is measured; what the first failing arm raised, once the others are done; WrongResultError
    where an arm is not what its name says.
    """
    given = [*SHAPE, *overrides, *FIXED]
    learning = load(recipe, given)
    static = replace(learning, drafter=replace(learning.drafter, train=False))
    configs = {STATIC: static, ONLINE: learning, RANDOM: learning}
    warm = load(recipe, [*given, "spec.source=off"])
    for name in (*ARMS, WARM):
        require_free(folder / name)
    require_drafter_place(folder / DRAFTER, drafter_shape(warm, load_config(resolve(warm.model))))
    return asyncio.run(_run(recipe, given, configs, warm, job, folder, keep))


async def _run(
    recipe: Path,
    given: Sequence[str],
    configs: Mapping[str, Config],
    warm: Config,
    job: Job,
    folder: Path,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    begin = perf_counter()
    async with standing(warm, folder, num_heldout=warm.eval.num_prompts) as ground:
        result: dict[str, Any] = {
            "what": "accept length by step of a run",
            "model": warm.model,
            **provenance(device=ground.device, seed=warm.run.seed),
            "config": dump(configs[ONLINE]),
            **asdict(job),
        }
        # in a thread, so that a request to stop is heard
        drafter = folder / DRAFTER
        result["drafter"] = await asyncio.to_thread(train_before, recipe, given, job, drafter, ground.stop)
        free(ground.device)
        start = newest(await warm_up(warm, ground))
        arms = [
            Arm(name, begin_arm(name, config, None if name == RANDOM else drafter, ground, start))
            for name, config in configs.items()
        ]
        result["seconds_before"] = perf_counter() - begin
        await take_turns(
            arms,
            steps=job.steps,
            stop=ground.stop,
            deadline=begin + 60 * job.minutes if job.minutes else inf,
            after=lambda: keep(result | {"arms": by_step(arms)}),
        )
        for arm in arms:
            if arm.error is not None:
                raise arm.error
        result["arms"] = by_step(arms)
        if not result["arms"][RANDOM]["steps"]:
            raise ConfigError(f"--minutes {job.minutes:g} were over before the first step of each arm; raise it")
        verify({name: arm["steps"] for name, arm in result["arms"].items()})
        result["seconds_arms"] = perf_counter() - begin - result["seconds_before"]
        for arm in arms:
            arm.loop.save(arm.loop.engine.state_dict())
        result["end"] = await asyncio.to_thread(at_the_end, {arm.name: arm.loop.run.path for arm in arms})
    return result | {"seconds_all": perf_counter() - begin}


def train_before(
    recipe: Path, given: Sequence[str], job: Job, out: Path, stop: threading.Event
) -> dict[str, float | int]:
    """Train a drafter on answers of the recipe's model, none to a problem held out, and write it to out: how it went.

    It learns to read responses alone, as no arm's drafter is given a prompt.
    """
    begin = perf_counter()
    subject = load_subject(recipe, given)
    data = subject.data(num_heldout=subject.config.eval.num_prompts)
    prompts = data.prompts(FIRST_STEP, min(job.texts, len(data)))
    texts, _ = policy_answers(subject, prompts, temperature=subject.config.rollout.temperature)
    report = heard(job.drafter_steps, stop)
    trained = train_drafter(subject, texts, steps=job.drafter_steps, report=report, contexts=("rollout",))
    write_trained(out, trained, subject)
    seconds = perf_counter() - begin
    return {"texts": len(texts), "before": trained.before, "after": trained.after, "seconds": seconds}


def by_step(arms: Sequence[Arm]) -> dict[str, Any]:
    """Every arm's steps, and the share of its first rollouts that the first arm sampled too."""
    found: dict[str, Any] = {}
    first = arms[0].loop.run.path
    for arm in arms:
        path = arm.loop.run.path
        steps = [{key: step[key] for key in KEPT if key in step} for step in steps_of(path)]
        found[arm.name] = {"steps": steps}
        if steps:
            found[arm.name]["first_rollouts_equal"] = agreement_of(path, first, steps[0]["step"])["rollouts"]
    return found


def verify(steps: Mapping[str, Sequence[Record]]) -> None:
    """Raise WrongResultError where what should stay changed, or what should start from nothing did not."""
    versions = {name: [step.get("drafter_version") for step in of] for name, of in steps.items()}
    if set(versions[STATIC]) != {1}:
        raise WrongResultError(f"the drafter that should stay as it is changed: its versions are {versions[STATIC]}")
    if versions[RANDOM][0] != 0 or steps[RANDOM][0]["accept_length"] != 1:
        raise WrongResultError("the drafter from random weights drafted before it had learned anything")


def at_the_end(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Accept length of what each arm serves at its end, on its own policy's answers to problems held out.

    early: of drafts within the first third of a median answer; late: from two thirds of one on. None for an arm that
    serves no drafter yet.
    """
    cycles: dict[str, Cycles | None] = {}
    lengths: list[int] = []
    for name, path in runs.items():
        subject = load_subject(path, [])
        config, temperature = subject.config, subject.config.rollout.temperature
        texts, keys = policy_answers(subject, problems(subject, config.eval.num_prompts), temperature=temperature)
        lengths += map(response_length, texts)
        cycles[name] = None
        if steps_of(path)[-1]["drafter_version"]:
            head = drafter_for(subject, None)
            depth = config.spec.depth
            cycles[name] = replay(subject, head, texts, keys, temperature=temperature, depth=depth, context="rollout")
        free(subject.device.type)
    median = statistics.median(lengths)
    bounds = {"early": ceil(median / 3), "late": ceil(2 * median / 3)}
    figures = {name: None if of is None else of.table() | early_and_late(of, **bounds) for name, of in cycles.items()}
    return {"bounds": bounds, "median_tokens": median, "arms": figures}


def response_length(text: Text) -> int:
    """Tokens of the answer."""
    return len(text.token_ids) - text.num_prompt


def table(result: Record) -> Table:
    """By step: each arm's accept length, the version of the drafter it served, and its mean reward."""
    arms = result["arms"]
    count = min(len(arm["steps"]) for arm in arms.values())
    equal = min(arm["first_rollouts_equal"] for arm in arms.values())
    shown = plain_table(
        f"{result['what']}, {result['model']}, {count} steps; {equal:.0%} of first rollouts equal; "
        "asked: online over static",
        ["step", *(heading for name in arms for heading in (name, "drafter", "reward"))],
    )
    every = ceil(count / ROWS)
    for at in sorted({*range(0, count, every), count - 1}):
        steps = [arm["steps"][at] for arm in arms.values()]
        row = [(f"{s['accept_length']:.2f}", f"v{s['drafter_version']}", f"{s['reward_mean']:.2f}") for s in steps]
        shown.add_row(str(steps[0]["step"]), *(text for texts in row for text in texts))
    return shown


def end_table(result: Record) -> Table:
    """At the end: accept length over all drafts, early and late ones, and the share accepted up to some tokens."""
    bounds = result["end"]["bounds"]
    title = (
        f"at the end, problems held out: early within {bounds['early']} tokens, late from {bounds['late']} on; "
        "asked: late no worse than early"
    )
    return accept_table(title, result["end"]["arms"])

"""The drafter of a long-tail bench: warmed up before the arms begin, as a user would; measured then and at the end."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

from configs.errors import PreemptedError
from configs.schema import Config
from drafter.eagle import EagleHead
from drafter.evaluate import Cycles
from drafter.export import read_drafter
from drafter.trainer import DrafterStats
from launch.bench_report import say
from launch.offline import Report, drafter_for, problems, replay, texts_for, train_drafter, write_trained
from launch.subject import Subject, load_subject, policy_answers

NUM_TEXTS = 8192  # worked solutions at most: some 600 steps' worth of windows, each position about once
EARLY, LATE = 128, 512  # response tokens: half of the answers are no longer than some 70
REPORT_EVERY = 50  # updates between two lines


def begin_drafter(run: Path, config: Config, out: Path, *, steps: int, stop: threading.Event) -> dict[str, Any]:
    """Train a drafter of a run's newest policy on worked solutions and write it to out: how that went.

    What `paceline drafter train RUN OUT --answers solutions` does, except that the drafter learns to read responses
    alone: no arm's drafter is given a prompt. Raises PreemptedError where asked to stop.
    """
    begin = perf_counter()
    subject = _subject(run, config)
    texts = texts_for(subject, NUM_TEXTS, answers="solutions")
    prepared = perf_counter()
    trained = train_drafter(subject, texts, steps=steps, report=heard(steps, stop), contexts=("rollout",))
    learned = perf_counter()
    write_trained(out, trained, subject)
    written = perf_counter()
    figures = _figures(subject, {"untrained": trained.start, "static": read_drafter(out)})
    return {
        "steps": steps,
        "texts": len(texts),
        "seconds": {
            "texts": prepared - begin,
            "training": learned - prepared,
            "writing": written - learned,
            "measuring": perf_counter() - written,
        },
        "accept_length": {"before": trained.before, "after": trained.after},
        "start": figures,
    }


def heard(steps: int, stop: threading.Event) -> Report:
    """Says now and then how a drafter's updates go. Raises PreemptedError where asked to stop."""

    def report(step: int, stats: DrafterStats) -> None:
        if step % REPORT_EVERY == 0 or step == steps:
            say(f" drafter step {step}: loss {stats.loss:.3f}, accept length {stats.accept_length:.2f}")
        if stop.is_set():
            raise PreemptedError(f"asked to stop after step {step} of the drafter")

    return report


def given_drafter(run: Path, config: Config, folder: Path) -> dict[str, Any]:
    """The figures of a drafter that is there already, on a run's newest policy. Raises ConfigError, PreflightError."""
    subject = _subject(run, config)
    return {"steps": 0, "folder": str(folder), "start": _figures(subject, {"static": drafter_for(subject, folder)})}


def end_drafter(run: Path, config: Config, folder: Path) -> dict[str, Any]:
    """The drafter in the folder and the one its run made of it online, both on the run's newest policy."""
    subject = _subject(run, config)
    return _figures(subject, {"static": read_drafter(folder), "online": drafter_for(subject, None)})


def _subject(run: Path, config: Config) -> Subject:
    """A run's newest policy under this bench's configuration, whatever the run was made under."""
    return replace(load_subject(run, []), config=config)


def _figures(subject: Subject, heads: Mapping[str, EagleHead]) -> dict[str, Any]:
    """What `paceline drafter eval` says of each head, on the same answers to held-out problems."""
    config = subject.config
    temperature = config.rollout.temperature
    answers = policy_answers(subject, problems(subject, config.eval.num_prompts), temperature=temperature)
    found = {}
    for name, head in heads.items():
        cycles = replay(subject, head, *answers, temperature=temperature, depth=config.spec.depth, context="rollout")
        found[name] = cycles.table() | early_and_late(cycles)
    return found


def early_and_late(cycles: Cycles, *, early: int = EARLY, late: int = LATE) -> dict[str, float | None]:
    """Accept length of drafts within a response's first `early` tokens, and from its `late`-th on, each with its
    standard error; None without as many as tell."""
    pairs = list(zip(cycles.places, cycles.accepted, strict=True))
    parts = {
        "early": [1 + count for place, count in pairs if place < early],
        "late": [1 + count for place, count in pairs if place >= late],
    }
    means = {name: mean(part) if part else None for name, part in parts.items()}
    errors = {f"{name}_se": stdev(part) / sqrt(len(part)) if len(part) > 1 else None for name, part in parts.items()}
    return means | errors

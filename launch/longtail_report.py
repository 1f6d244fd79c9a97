"""What the runs of `paceline bench longtail` say beside one another: times, tails, rewards, and whether they agree."""

import os
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from launch.bench_report import plain_table, spread
from launch.curve import records

WHAT = "seconds of a GRPO step and its rollouts"  # of the result
TIMES = {"rollout": "seconds_rollout", "tail": "seconds_tail", "train": "seconds_train", "step": "seconds"}
GAINS = ("rollout", "tail", "step")
COLUMNS = ["prompt_id", "sample", "text", "num_tokens"]
SHARE = "draft_share_"  # of rl.metrics
COLOURS = {"off": "#8c8c8c", "suffix": "#b5651d", "tlt": "#5b9f67", "ours": "#0b4f8a"}

Record = Mapping[str, Any]


def report(runs: Mapping[str, Path], *, skip: int) -> dict[str, Any]:
    """Every arm's figures by name, from its run directory. The first arm is what the others are compared with.

    The first `skip` steps enter no time and no rate. Only steps that both sides have done are compared.
    """
    steps = {name: steps_of(run) for name, run in runs.items()}
    first = next(iter(runs))
    found: dict[str, Any] = {}
    for name, run in runs.items():
        found[name] = summary(steps[name][skip:]) | {"steps": steps[name]}
        if name != first:
            found[name]["gain"] = gains(steps[first][skip:], steps[name][skip:])
            found[name]["agreement"] = [
                agreement_of(run, runs[first], mine["step"]) for mine, _ in zip(steps[name], steps[first], strict=False)
            ]
    return found


def steps_of(run: Path) -> list[Record]:
    """The records of a run's steps, none before the first."""
    path = run / "metrics" / "steps.jsonl"
    return list(records(path)) if path.exists() else []


def summary(steps: Sequence[Record]) -> dict[str, Any]:
    """Times of a step, tokens a second of rollouts, tokens a forward, mean reward; {} without steps."""
    if not steps:
        return {}
    tokens = sum(step["tokens"] for step in steps)
    return {
        **{name: spread([step[key] for step in steps]) for name, key in TIMES.items()},
        "tokens_per_s": tokens / sum(step["seconds_rollout"] for step in steps),
        "accept_length": tokens / sum(step["tokens"] / step["accept_length"] for step in steps),
        "reward_mean": statistics.fmean(step["reward_mean"] for step in steps),
        "response_len_mean": tokens / sum(step["num_rollouts"] for step in steps),
        "response_len_max": max(step["response_len_max"] for step in steps),
        "sources": sources(steps),
    }


def sources(steps: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By what drafted: the share of sequences' forwards that verified its drafts, and the accept length of those."""
    forwards = [step["tokens"] / step["accept_length"] for step in steps]
    found = {}
    for name in sorted({key.removeprefix(SHARE) for step in steps for key in step if key.startswith(SHARE)}):
        drafted = [count * step.get(SHARE + name, 0.0) for count, step in zip(forwards, steps, strict=True)]
        lengths = [step.get(f"accept_length_{name}", 0.0) for step in steps]
        tokens = sum(count * length for count, length in zip(drafted, lengths, strict=True))
        found[name] = {"share": sum(drafted) / sum(forwards), "accept_length": tokens / sum(drafted)}
    return found


def gains(theirs: Sequence[Record], mine: Sequence[Record]) -> dict[str, Any]:
    """How many times as fast: of all seconds together, and step by step; {} without steps that both have."""
    pairs = list(zip(theirs, mine, strict=False))
    if not pairs:
        return {}
    found = {}
    for name in GAINS:
        key = TIMES[name]
        total = sum(a[key] for a, _ in pairs) / max(sum(b[key] for _, b in pairs), 1e-9)
        found[name] = {"total": total} | spread([a[key] / max(b[key], 1e-9) for a, b in pairs])
    return found


def samples(run: Path, step: int) -> dict[tuple[str, int], Record]:
    """A step's rollouts by prompt and sample."""
    rows: list[Record] = pq.read_table(run / "samples" / f"step_{step}.parquet", columns=COLUMNS).to_pylist()
    return {(row["prompt_id"], row["sample"]): row for row in rows}


@cache  # asked again after every turn
def agreement_of(run: Path, other: Path, step: int) -> dict[str, float]:
    """How far two runs' rollouts of a step agree."""
    return agreement(samples(run, step), samples(other, step))


def agreement(mine: Mapping[Any, Record], theirs: Mapping[Any, Record]) -> dict[str, float]:
    """Share of rollouts that are the same, and of their characters that stand before the first difference.

    In a run's first step, whose weights are equal, anything but 1 is rounding: where two tokens all but tie, another
    batch shape may choose the other. Later the weights themselves have parted by what that did to the gradients.
    """
    assert mine.keys() == theirs.keys(), "runs of one seed draw the same prompts"
    pairs = [(mine[key], theirs[key]) for key in mine]
    equal = sum(a["text"] == b["text"] and a["num_tokens"] == b["num_tokens"] for a, b in pairs)
    common = sum(len(os.path.commonprefix([a["text"], b["text"]])) for a, b in pairs)
    return {"rollouts": equal / len(pairs), "prefix": common / max(sum(len(b["text"]) for _, b in pairs), 1)}


def warmstart(run: Path) -> dict[str, Any]:
    """The supervised steps that a run began with, and its held-out greedy rewards; empty where it had none."""
    metrics = run / "metrics"
    kept: dict[str, Any] = {}
    for name in ("warmstart", "eval"):
        path = metrics / f"{name}.jsonl"
        kept[name] = records(path) if path.exists() else []
    return kept


def table(result: Mapping[str, Any]) -> Table:
    """The arms side by side: median seconds, rates, rewards, equal rollouts, and gains over the first."""
    headings = ["", "rollout s", "tail s", "train s", "step s", "tok/s", "accept", "longest", "reward", "equal"]
    first = next(iter(result["arms"]))
    steps = max(len(arm["steps"]) for arm in result["arms"].values())  # --minutes or a failure may end them early
    title = f"{result['what']}, {result['model']}, {steps} steps less {result['skip']}; gains over {first}"
    shown = plain_table(title, [*headings, *(f"{name} gain" for name in GAINS), "drafted by"])
    for name, arm in result["arms"].items():
        if name in result["failed"] or "step" not in arm:
            shown.add_row(name, result["failed"].get(name, "no steps yet").splitlines()[0][:60])
            continue
        row = [f"{arm[key]['median']:.2f}" for key in TIMES]
        row += [f"{arm['tokens_per_s']:.0f}", f"{arm['accept_length']:.2f}", f"{arm['response_len_max']}"]
        row.append(f"{arm['reward_mean']:.3f}")
        row.append(f"{arm['agreement'][0]['rollouts']:.0%}" if arm.get("agreement") else "")
        row += [f"{arm['gain'][key]['total']:.2f}x" if arm.get("gain") else "" for key in GAINS]
        drafted = [f"{source} {at['share']:.0%} {at['accept_length']:.2f}" for source, at in arm["sources"].items()]
        shown.add_row(name, *row, "\n".join(drafted))
    return shown


def drafter_table(drafter: Record) -> Table:
    """Accept length of the drafter on held-out problems: before and after its training, then static against online."""
    seconds = f", {drafter['seconds']['training']:.0f} s" if "seconds" in drafter else ""
    heads = {f"{name}, {when}": figures for when in ("start", "end") for name, figures in drafter.get(when, {}).items()}
    return accept_table(f"the drafter, {drafter['steps']} updates{seconds}", heads)


def accept_table(title: str, heads: Mapping[str, Record | None]) -> Table:
    """Accept length of heads, None of one that drafts nothing: over all drafts, of early and late ones with its
    standard error, and the share accepted up to some tokens."""
    depth = max(figures["depth"] for figures in heads.values() if figures is not None)
    places = [place for place in range(1, depth + 1) if place == depth or place & (place - 1) == 0]
    shown = plain_table(
        f"{title}: accept length; accepted up to a token",
        ["", "all", "early", "late", *(f"+{each}" for each in places)],
    )
    for name, figures in heads.items():
        if figures is None:
            shown.add_row(name, *["-"] * (3 + len(places)))
            continue
        row = [f"{figures['accept_length']:.2f}"]
        for part in ("early", "late"):
            length, error = figures[part], figures[f"{part}_se"]
            row.append("-" if length is None else f"{length:.2f}" + ("" if error is None else f" ±{error:.2f}"))
        shown.add_row(name, *row, *(f"{figures['by_depth'][place - 1]:.0%}" for place in places))
    return shown


def draw(result: Mapping[str, Any], picture: Path) -> None:
    """Where a step's seconds go, and the rollouts' seconds and accept length by step, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    arms = {name: arm for name, arm in result["arms"].items() if "step" in arm}
    figure, (parts, times, lengths) = pyplot.subplots(1, 3, figsize=(11, 3.8), dpi=150)
    bottom = [0.0] * len(arms)
    for label, seconds, colour in _parts(arms, result["skip"]):
        parts.bar(list(arms), seconds, bottom=bottom, label=label, color=colour, width=0.6)
        bottom = [low + high for low, high in zip(bottom, seconds, strict=True)]
    parts.set(title="mean seconds of a step")
    parts.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)
    for name, arm in arms.items():
        counted = arm["steps"][result["skip"] :]  # the first ones compile and capture
        numbers = [step["step"] for step in counted]
        style = {"color": COLOURS.get(name), "label": name, "linewidth": 1.2}
        times.plot(numbers, [step["seconds_rollout"] for step in counted], **style)
        lengths.plot(numbers, [step["accept_length"] for step in counted], **style)
    times.set(title="seconds of rollouts", xlabel="step", ylim=(0, None))
    lengths.set(title="tokens a forward", xlabel="step", ylim=(0, None))
    times.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(1.1, -0.15), ncol=len(arms))
    for axes in (parts, times, lengths):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
    for axes in (times, lengths):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.subplots_adjust(left=0.04, right=0.99, top=0.92, bottom=0.28, wspace=0.15)  # tight_layout counts legends
    figure.savefig(picture)
    pyplot.close(figure)


def _parts(arms: Mapping[str, Any], skip: int) -> list[tuple[str, list[float], str]]:
    """The stacked parts of a mean step, bottom first: label, seconds of each arm, colour."""

    def mean(arm: Record, key: str) -> float:
        return statistics.fmean(step.get(key, 0.0) for step in arm["steps"][skip:])

    tail = [mean(arm, "seconds_tail") for arm in arms.values()]
    bulk = [mean(arm, "seconds_rollout") - late for arm, late in zip(arms.values(), tail, strict=True)]
    train = [mean(arm, "seconds_train") for arm in arms.values()]
    whole = [mean(arm, "seconds") for arm in arms.values()]
    learn = [mean(arm, "seconds_drafter") for arm in arms.values()]
    rest = [w - b - t - u - v for w, b, t, u, v in zip(whole, bulk, tail, train, learn, strict=True)]
    return [
        ("rollouts, the first 90 %", bulk, "#0b4f8a"),
        ("rollouts, the last 10 %", tail, "#7fb0d8"),
        ("policy update", train, "#b5651d"),
        ("drafter's lessons", learn, "#5b9f67"),
        ("the rest", rest, "#d9d9d9"),
    ]

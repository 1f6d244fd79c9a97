"""A finished run as a result to keep: steps and evaluations in one JSON file, the learning curve as a picture."""

import json
from pathlib import Path
from typing import Any

from configs.errors import PreflightError

KEPT = (
    "step",
    "reward_mean",
    "eval_reward",
    "response_len_mean",
    "tokens_per_s",
    "accept_length",
    "entropy",
    "grad_norm",
    "prob_diff_mean",
    "logprob_diff_mean",
    "logprob_diff_p99",
    "seconds",
    "seconds_rollout",
    "seconds_train",
)


def curve(run: Path) -> dict[str, Any]:
    """Environment, wall-clock seconds, evaluations and the main figures of every step. Raises PreflightError."""
    steps, evaluations = records(run / "metrics" / "steps.jsonl"), records(run / "metrics" / "eval.jsonl")
    warmstart = run / "metrics" / "warmstart.jsonl"
    return {
        "environment": json.loads((run / "env.json").read_text()),
        "plan": json.loads((run / "plan.json").read_text()),
        "seconds": {
            "warmstart": sum(record["seconds"] for record in records(warmstart)) if warmstart.exists() else 0.0,
            "evaluation": sum(record["seconds"] for record in evaluations),
            "steps": sum(record["seconds"] for record in steps),
        },
        "evaluations": [
            {"stage": record["stage"], "step": record["step"], "reward_mean": record["reward_mean"]}
            for record in evaluations
        ],
        "steps": [{name: record[name] for name in KEPT if name in record} for record in steps],
    }


def draw(result: dict[str, Any], picture: Path) -> None:
    """Held-out and training reward by step, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), dpi=150)
    steps = result["steps"]
    axes.plot(
        [record["step"] for record in steps],
        [record["reward_mean"] for record in steps],
        color="#9db4c8",
        linewidth=1,
        label="training rollouts, temperature 1",
    )
    evaluations = result["evaluations"]
    warm = any(record["stage"] == "warmstart" for record in evaluations)
    learned = [record for record in evaluations if not (warm and record["stage"] == "base")]
    axes.plot(
        [record["step"] for record in learned],
        [record["reward_mean"] for record in learned],
        color="#0b4f8a",
        marker="o",
        markersize=3.5,
        label="held-out problems, greedy",
    )
    for record in evaluations:
        if record["stage"] == "base":
            axes.axhline(record["reward_mean"], color="#b5651d", linewidth=1, linestyle="--", label="model as it came")
    axes.set(xlabel="step of reinforcement learning", ylabel="mean reward", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize="small")
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. Raises PreflightError without one."""
    if not path.exists():
        raise PreflightError(f"{path} does not exist; give a run directory whose run evaluated (eval.every above 0)")
    return [json.loads(line) for line in path.read_text().splitlines()]

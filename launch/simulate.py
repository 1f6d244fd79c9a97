"""The time a step would take on more nodes, from what a run measured on those it had.

The run's own responses are spread over the workers there would be, and each samples its share at the rate measured by
batch size; training takes the measured time by the largest rank's tokens. Not in it: sequences that change workers,
gradients reduced between more ranks than the run had, and whatever a larger cluster does that a smaller one does not.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Table

from configs.errors import ConfigError
from configs.load import load
from configs.schema import Config
from launch.forecast import Lengths, spread
from launch.idle import Costs, DecodeRate, finish_s, fit_rate
from rollout.types import Prompt

SAME = (  # of the recipe and of the run, for its lengths and times to say anything of the recipe's
    "model",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "rollout.tensor_parallel",
    "compute.placement",
    "compute.device",
    "train.sequence_parallel",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run says of itself. workers: that trained; samplers: that sampled, the same ones if colocated.

    sharing: ranks that trained on every sequence together, each on a stretch of it.
    steps: by number, the response lengths of each prompt; seconds: their records. rate: of one worker's sampling.
    """

    workers: int
    samplers: int
    sharing: int
    lengths: dict[int, dict[str, list[int]]]
    records: dict[int, dict[str, Any]]
    rate: DecodeRate


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one step, a mean over several. rest: rewards, the drafter, checkpoints and evaluation."""

    rollout_s: float
    train_s: float
    sync_s: float
    rest_s: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.rollout_s + self.train_s + self.sync_s + self.rest_s


def read_run(run: Path) -> Measured:
    """What a run's files say, its first step apart, which compiles. Raises ConfigError where they do not suffice."""
    config = _config(run)
    records = {record["step"]: record for record in _lines(run / "metrics" / "steps.jsonl")}
    steps = sorted(records)[1:] or sorted(records)
    if not steps:
        raise ConfigError(f"--from {run}: it has finished no step")
    rate = decode_rate([line for line in _lines(run / "metrics" / "curve.jsonl") if line["step"] in steps])
    if rate is None:
        raise ConfigError(f"--from {run}: its metrics/curve.jsonl is too short to tell a rate; give a longer run")
    return Measured(
        workers=config.compute.workers,
        samplers=_samplers(config),
        sharing=config.train.sequence_parallel,
        lengths={step: _lengths(run / "samples" / f"step_{step}.parquet") for step in steps},
        records={step: records[step] for step in steps},
        rate=rate,
    )


def require_alike(config: Config, run: Path) -> None:
    """Raise ConfigError where a run's times say nothing of a recipe's."""
    from configs.check import value_of

    measured = _config(run)
    for key in SAME:
        here, there = value_of(config, key), value_of(measured, key)
        if here != there:
            raise ConfigError(f"{key}={here!r}, and --from {run} had {there!r}; simulate from a run of this recipe")


def decode_rate(curve: Sequence[Mapping[str, Any]]) -> DecodeRate | None:
    """Seconds a token by sequences that run on a worker, through consecutive lines of a curve; None from too few.

    A token is one of a sequence, so that drafts are in it: they make it shorter.
    """
    seconds: dict[int, list[float]] = defaultdict(list)
    for before, after in zip(curve, curve[1:], strict=False):
        running = [worker["running"] for worker in before["workers"] if worker["running"]]
        grown, passed = after["tokens"] - before["tokens"], after["time"] - before["time"]
        if before["step"] == after["step"] and not before.get("eval") and running and grown > 0 and passed > 0:
            seconds[round(fmean(running))].append(sum(running) * passed / grown)
    return fit_rate([(batch, median(times)) for batch, times in seconds.items()])


def measured_step(run: Measured) -> Step:
    """The mean over the run's steps."""
    parts = ("seconds_rollout", "seconds_train", "seconds_sync")
    rollout, train, sync = (fmean(record[part] for record in run.records.values()) for part in parts)
    return Step(rollout, train, sync, fmean(r["seconds"] for r in run.records.values()) - rollout - train - sync)


def simulated_step(run: Measured, *, workers: int, samplers: int, slots: int) -> Step:
    """The same steps with so many workers that train and that sample. slots: sequences that one runs at a time."""
    costs = Costs(rate=run.rate, move_s=0.0, slots=slots)
    known = Lengths()
    rollouts, largest, largest_then = [], [], []
    for lengths in run.lengths.values():
        prompts = [Prompt(id=name, token_ids=[], answer="") for name in lengths]
        shares = spread(prompts, known.expected(prompts), range(samplers)).values()
        rollouts.append(max(finish_s([n for each in share for n in lengths[each.id]], costs) for share in shares))
        ends = {(name, sample): length for name, all_ in lengths.items() for sample, length in enumerate(all_)}
        known.learn({each.id: each for each in prompts}, ends)
        # of those who share sequences, who have equal parts of them
        largest.append(largest_share(list(ends.values()), workers // run.sharing))
        largest_then.append(largest_share(list(ends.values()), run.workers // run.sharing))
    then = measured_step(run)
    return Step(fmean(rollouts), then.train_s * sum(largest) / sum(largest_then), then.sync_s, then.rest_s)


def largest_share(lengths: Sequence[int], ranks: int) -> int:
    """Tokens of the rank that has most, the longest sequence first and each to the rank with least (rl.batch.split)."""
    loads = [0] * ranks
    for length in sorted(lengths, reverse=True):
        loads[loads.index(min(loads))] += length
    return max(loads)


def table(run: Measured, config: Config, nodes: Sequence[int]) -> Table:
    """The measured step beside simulated ones of the recipe on so many nodes."""
    view = Table(title="Seconds a step, simulated", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.show_edge = view.pad_edge = False  # it fits 80 columns, which a pipe has too
    for column in ("", "workers", "rollout", "train", "sync", "rest", "step", "speed-up"):
        view.add_column(column, justify="right" if column else "left", no_wrap=True)
    then = measured_step(run)
    slots = config.rollout.max_running
    steps = [("measured", f"{_workers(run.workers, run.samplers, config)}", then)]
    here = simulated_step(run, workers=run.workers, samplers=run.samplers, slots=slots)
    steps.append(("simulated as measured", steps[0][1], here))
    for count in nodes:
        workers, samplers = count * config.compute.workers, count * _samplers(config)
        told = simulated_step(run, workers=workers, samplers=samplers, slots=slots)
        steps.append((f"simulated, {count} node{'s' * (count > 1)}", _workers(workers, samplers, config), told))
    for name, size, step in steps:
        parts = (step.rollout_s, step.train_s, step.sync_s, step.rest_s, step.seconds)
        faster = "" if name == "measured" else f"{here.seconds / step.seconds:.2f}"
        view.add_row(name, size, *(f"{part:.2f}" for part in parts), faster)
    return view


def _config(run: Path) -> Config:
    path = run / "config" / "resolved.yaml"
    if not path.is_file():
        raise ConfigError(f"--from {run} is not a run directory; `paceline train CONFIG` makes one under runs/")
    return load(path, [])


def _samplers(config: Config) -> int:
    """Engines that sample."""
    if config.compute.placement == "separate":
        return config.compute.rollout_workers // config.rollout.tensor_parallel
    return config.compute.workers


def _workers(workers: int, samplers: int, config: Config) -> str:
    return f"{workers} + {samplers}" if config.compute.placement == "separate" else str(workers)


def _lengths(path: Path) -> dict[str, list[int]]:
    """Response tokens by prompt."""
    import pyarrow.parquet as pq  # heavy, and only this reads one

    if not path.is_file():
        raise ConfigError(f"{path} is missing; simulate from a run whose samples are all there")
    found: dict[str, list[int]] = defaultdict(list)
    for row in pq.read_table(path, columns=["prompt_id", "num_tokens"]).to_pylist():
        found[row["prompt_id"]].append(row["num_tokens"])
    return dict(found)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; --from takes the directory of a run that has finished steps")
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

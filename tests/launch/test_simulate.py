"""A step's time on more nodes, held against a run whose times are known."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from configs.errors import ConfigError
from configs.load import dump, parse
from launch.idle import DecodeRate
from launch.simulate import decode_rate, measured_step, read_run, require_alike, simulated_step, table

BASE_S, EACH_S = 0.02, 0.001
PROMPTS, GROUP, LENGTH = 8, 4, 100
RECIPE = [f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}", "rollout.max_new_tokens=400"]


def write_run(folder: Path, lengths: dict[str, list[int]], *, steps: int = 3, options: Sequence[str] = ()) -> Path:
    """One worker or as options say, sequences in a batch at the rate above; 10 s of training, 1 of sync, 2 of rest."""
    (folder / "config").mkdir(parents=True)
    (folder / "metrics").mkdir()
    (folder / "samples").mkdir()
    (folder / "config" / "resolved.yaml").write_text(dump(parse("data: {name: chain_sum}", [*RECIPE, *options])))
    rows = [{"prompt_id": name, "num_tokens": n} for name, found in lengths.items() for n in found]
    records, curve = [], []
    for step in range(1, steps + 1):
        pq.write_table(pa.Table.from_pylist(rows), folder / "samples" / f"step_{step}.parquet")
        now, tokens, left = 1000.0 * step, 0, sorted(row["num_tokens"] for row in rows)
        begun = now
        while left:
            line = {"step": step, "time": now, "tokens": tokens, "workers": [{"running": len(left)}]}
            curve.append(line)
            # to the next end, or to the next line
            stretch = min(left[0], 10)
            now += stretch * (BASE_S + EACH_S * len(left))
            tokens += stretch * len(left)
            left = [n - stretch for n in left if n > stretch]
        curve.append({"step": step, "time": now, "tokens": tokens, "workers": [{"running": 0}]})
        rollout = now - begun
        records.append(
            {
                "step": step,
                "seconds": rollout + 13.0,
                "seconds_rollout": rollout,
                "seconds_train": 10.0,
                "seconds_sync": 1.0,
            }
        )
    for name, lines in (("steps", records), ("curve", curve)):
        (folder / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def alike() -> dict[str, list[int]]:
    return {f"p{n}": [LENGTH] * GROUP for n in range(PROMPTS)}


def ragged() -> dict[str, list[int]]:
    return {f"p{n}": [20 + 40 * n] * GROUP for n in range(PROMPTS)}


def test_the_rate_is_that_at_which_the_curve_grew(tmp_path: Path) -> None:
    rate = read_run(write_run(tmp_path / "run", ragged())).rate
    assert (rate.base_s, rate.each_s) == (pytest.approx(BASE_S), pytest.approx(EACH_S))


def test_as_many_workers_take_the_measured_time(tmp_path: Path) -> None:
    for name, lengths in (("alike", alike()), ("ragged", ragged())):
        run = read_run(write_run(tmp_path / name, lengths))
        found, then = simulated_step(run, workers=1, samplers=1, slots=256), measured_step(run)
        # sequences of one length leave no batch but the first, whose cost is then that of all
        assert found.rollout_s == pytest.approx(then.rollout_s, rel=1e-6)
        assert (found.train_s, found.sync_s, found.rest_s) == (10.0, 1.0, pytest.approx(2.0))


def test_two_workers_halve_the_batch_and_the_training(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", ragged()))
    found = simulated_step(run, workers=2, samplers=2, slots=256)
    # nothing is known before the run's first step, then each prompt's length is: the longest four and the shortest,
    # 300 140 100 20 and 260 220 180 60 at the worst
    sides = [(300, 180, 140, 20), (260, 220, 100, 60)]
    expected = []
    for side in sides:
        now, seconds = 0, 0.0
        for place, length in enumerate(sorted(side)):
            seconds += (length - now) * (BASE_S + EACH_S * GROUP * (len(side) - place))
            now = length
        expected.append(seconds)
    assert found.rollout_s == pytest.approx(max(expected), rel=0.02)
    assert found.train_s == pytest.approx(5.0)


def test_ranks_that_share_sequences_train_as_one(tmp_path: Path) -> None:
    """Each has half of every sequence of theirs: a longest one bounds how far more ranks help."""
    options = ["compute.backend=ray", "compute.workers=2", "train.sequence_parallel=2"]
    one_long = {f"p{n}": [300 if n == 0 else 10] + [10] * (GROUP - 1) for n in range(PROMPTS)}
    run = read_run(write_run(tmp_path / "run", one_long, options=options))
    tokens = 300 + 10 * (PROMPTS * GROUP - 1)
    four, many = (simulated_step(run, workers=count, samplers=2, slots=256) for count in (4, 64))
    assert four.train_s == pytest.approx(10.0 * 310 / tokens)
    assert many.train_s == pytest.approx(10.0 * 300 / tokens)


def test_waiting_sequences_are_sampled_after_those_that_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", ragged()))
    narrow = simulated_step(run, workers=1, samplers=1, slots=GROUP)
    lengths = [20 + 40 * n for n in range(PROMPTS)]
    assert narrow.rollout_s == pytest.approx(sum(lengths) * (BASE_S + EACH_S * GROUP), rel=1e-6)


def test_more_workers_than_prompts_gain_nothing(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", alike()))
    eight, many = (simulated_step(run, workers=32, samplers=count, slots=256) for count in (PROMPTS, 64))
    assert eight.rollout_s == many.rollout_s
    assert eight.train_s == pytest.approx(10.0 / 32)


def test_no_rate_is_made_up() -> None:
    assert decode_rate([]) is None
    still = [{"step": 1, "time": t, "tokens": 5, "workers": [{"running": 1}]} for t in range(3)]
    assert decode_rate(still) is None
    other_steps = [{"step": t, "time": t, "tokens": t, "workers": [{"running": 1}]} for t in range(3)]
    assert decode_rate(other_steps) is None
    steady = [{"step": 1, "time": t, "tokens": 8 * t, "workers": [{"running": 2}, {"running": 2}]} for t in range(3)]
    assert decode_rate(steady) == DecodeRate(0.5, 0.0)  # four sequences grow by eight tokens a second


def test_a_run_of_another_recipe_says_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alike())
    require_alike(parse("data: {name: chain_sum}", [*RECIPE, "compute.backend=ray", "compute.workers=4"]), run)
    with pytest.raises(ConfigError, match="rollout.group_size=8, and --from .* had 4"):
        require_alike(parse("data: {name: chain_sum}", [*RECIPE, "rollout.group_size=8"]), run)
    shared = ["compute.backend=ray", "compute.workers=2", "train.sequence_parallel=2"]
    with pytest.raises(ConfigError, match="train.sequence_parallel=2, and --from .* had 1"):
        require_alike(parse("data: {name: chain_sum}", [*RECIPE, *shared]), run)
    (run / "metrics" / "curve.jsonl").unlink()
    with pytest.raises(ConfigError, match="curve.jsonl is missing"):
        read_run(run)
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_run(tmp_path)


def test_the_table_says_what_is_simulated(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ragged())
    config = parse("data: {name: chain_sum}", [*RECIPE, "compute.backend=ray", "compute.workers=2"])
    out = StringIO()
    Console(file=out, width=80).print(table(read_run(run), config, [1, 4]))
    shown = out.getvalue()
    assert "…" not in shown and "24.12" in shown, "no figure is cut in a terminal of 80 columns, nor in a pipe"
    assert "Seconds a step, simulated" in shown
    rows = [line for line in shown.splitlines() if "measured" in line or "simulated," in line]
    assert [row.split("  ")[0].strip() for row in rows] == [
        "measured",
        "simulated as measured",
        "simulated, 1 node",
        "simulated, 4 nodes",
    ]

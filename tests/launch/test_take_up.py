"""What a resumed run makes of the configuration it is given."""

from pathlib import Path

import pytest

from configs.load import load, parse
from launch.cluster import take_up
from rl.rundir import RunDir

BASE = "model: tiny\ndata: {name: chain_sum}\ntrain: {steps: 6}\n"


@pytest.mark.parametrize(
    ("step", "overrides", "said"),
    [
        (3, ["sparse.mode=draft"], ""),
        (6, ["sparse.mode=draft", "train.steps=7"], ""),
        (3, ["train.steps=3"], ""),  # the run is shorter than it was to be
        (6, [], ""),
        (
            6,
            ["sparse.mode=draft", "train.lr=0.5"],
            "sparse.mode='draft', train.lr=0.5 had no effect: all 6 steps are done; raise train.steps as well to go on",
        ),
        (6, ["train.steps=5"], "train.steps=5 had no effect: all 6 steps are done; raise train.steps as well to go on"),
    ],
)
def test_what_a_run_is_resumed_with_is_kept_or_said_to_have_no_effect(
    step: int, overrides: list[str], said: str, tmp_path: Path
) -> None:
    place = f"run.dir={tmp_path / 'run'}"
    before, asked = parse(BASE, [place]), parse(BASE, [place, *overrides])
    with RunDir.create(before, BASE) as run:
        assert take_up(asked, run, step=step) == said
        assert load(run.path / "config" / "resolved.yaml") == (before if said else asked)

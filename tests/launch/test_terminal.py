"""The progress display: plain lines for files, a picture for people."""

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.monitor.terminal import LiveProgress, PlainProgress, allot, make_progress, shares, sparkline

RECORD = {
    "step": 3,
    "total_steps": 63,
    "reward_mean": 0.25,
    "reward_std": 0.5,
    "tokens_per_s": 1234.5,
    "accept_length": 2.345,
    "response_len_mean": 99.6,
    "loss": -0.01,
    "grad_norm": 0.5,
    "seconds": 10.0,
    "seconds_rollout": 6.0,
    "seconds_reward": 0.01,
    "seconds_train": 3.0,
}


def picture(progress: LiveProgress, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width).print(progress._render())
    return out.getvalue()


def test_plain_line_holds_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress()
    progress.step(RECORD)
    assert capsys.readouterr().out == (
        "step 3/63  reward 0.250 ± 0.50  length 100  tokens/s 1,234  accept 2.35  loss -0.0100  grad 0.5  "
        "10.0s  rollout 60% train 30% other 10%  ETA 10:00\n"
    )


def test_a_step_of_lossy_samples_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    PlainProgress().step(RECORD | {"lossy_share": 0.875})
    assert "lossy 88%" in capsys.readouterr().out
    PlainProgress().step(RECORD | {"lossy_share": 0.0, "drafter_version": 2})
    out = capsys.readouterr().out
    assert "lossy" not in out and "drafter v2" in out


def test_output_that_is_no_terminal_gets_plain_lines() -> None:
    assert isinstance(make_progress(5), PlainProgress)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_display_fits_the_terminal_and_shows_every_number(width: int) -> None:
    progress = LiveProgress(63, Console(file=StringIO(), force_terminal=True, width=width))
    assert "starting" in picture(progress, width)
    progress.phase("rollout")
    progress.step(RECORD | {"eval_reward": 0.75})
    progress.step(RECORD | {"step": 4, "reward_mean": 0.5})
    progress.rollouts(41, 64)
    shown = picture(progress, width)
    progress.close()
    assert all(len(line) <= width for line in shown.splitlines())
    for text in (
        "4/63",
        "41/64",
        "ETA 9:50",
        "0.500 ± 0.50",
        "0.750",
        "1,234",
        "2.35",
        "rollout 60%",
        "train 30%",
        "▁█",
    ):
        assert text in shown


def test_close_leaves_the_terminal_as_it_was_and_may_be_repeated() -> None:
    out = StringIO()
    progress = LiveProgress(3, Console(file=out, force_terminal=True, width=80))
    progress.step(RECORD | {"total_steps": 3})
    progress.message("saved")
    progress.close()
    progress.close()
    assert out.getvalue().count("\x1b[?25h") >= out.getvalue().count("\x1b[?25l") == 1
    assert "saved" in out.getvalue()
    assert "done" in out.getvalue()


def test_missing_numbers_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    PlainProgress().step({"step": 1, "total_steps": 1, "seconds": 0.0, "reward_mean": 0.0})
    assert capsys.readouterr().out == "step 1/1  reward 0.000  0.0s  other 100%  ETA 0:00\n"


def test_shares_of_a_step_sum_to_one() -> None:
    assert sum(share for _, share in shares(RECORD)) == pytest.approx(1.0, abs=0.01)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=7).filter(any), st.integers(1, 200))
def test_phases_fill_the_bar_exactly(weights: list[int], cells: int) -> None:
    counts = allot([weight / sum(weights) for weight in weights], cells)
    assert sum(counts) == cells
    assert all(abs(count - weight / sum(weights) * cells) <= 1 for count, weight in zip(counts, weights, strict=True))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(1, 90))
def test_sparkline_fits_and_spans_its_heights(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    if len(values) <= width and max(values) > min(values):
        assert {"▁", "█"} <= set(line)

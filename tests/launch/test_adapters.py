"""Several workers' learning and errors as one, without a cluster."""

import math
from dataclasses import replace

import pytest

from drafter.learner import DrafterReport
from launch.adapters import merged, on_all
from launch.fleet import Fleet, WorkerLostError

REPORT = DrafterReport(
    num_steps=2,
    loss=1.0,
    train_accept_length=2.0,
    accept_length=2.5,
    served_accept_length=2.4,
    version=3,
    checksum="same",
    outcome="published",
    buffer_tokens=100,
    seconds=4.0,
    off="",
)


def test_reports_add_up_and_losses_weigh_by_steps() -> None:
    idle = replace(REPORT, num_steps=0, loss=math.nan, train_accept_length=math.nan)
    busy = replace(REPORT, num_steps=6, loss=2.0, train_accept_length=4.0)
    report = merged([idle, REPORT, busy])
    assert (report.num_steps, report.buffer_tokens, report.seconds) == (8, 300, 12.0)
    assert report.loss == pytest.approx(1.75) and report.train_accept_length == pytest.approx(3.5)
    assert (report.version, report.outcome, report.accept_length) == (3, "published", 2.5)


def test_nothing_learned_is_no_loss() -> None:
    report = merged([replace(REPORT, num_steps=0, loss=math.nan)] * 2)
    assert report.num_steps == 0 and math.isnan(report.loss)


def test_learning_is_off_only_where_it_is_off_everywhere() -> None:
    off = replace(REPORT, off="three failures")
    assert merged([off, REPORT]).off == ""
    assert merged([off, off]).off == "three failures"


def test_workers_that_serve_different_drafters_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    merged([REPORT, replace(REPORT, checksum="other")])
    assert "different drafters" in caplog.text


def test_what_takes_all_workers_says_at_once_that_one_is_lost() -> None:
    fleet = Fleet([], slots=1, learns=False)
    fleet.lose(1, WorkerLostError("it died"))
    with pytest.raises(WorkerLostError, match="it died"):
        on_all([], fleet, "step")

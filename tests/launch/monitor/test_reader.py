"""Reading a run's files while they grow, are cut and end."""

import json
import os
from pathlib import Path

import pytest

from configs.errors import PreflightError
from launch.monitor.reader import RunReader
from launch.monitor.summary import alarms, eta_s, ranges, state, summary
from launch.monitor.tail import Tail


def records(tail: Tail) -> tuple[bool, list[dict]]:
    restarted, lines = tail.look()
    return restarted, [line.record for line in lines]


def test_each_whole_line_is_read_once(tmp_path: Path) -> None:
    path, tail = tmp_path / "a.jsonl", Tail(tmp_path / "a.jsonl")
    assert records(tail) == (False, [])
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert records(tail) == (False, [{"step": 1}, {"step": 2}])
    assert records(tail) == (False, [])


def test_torn_last_line_waits_for_its_rest(tmp_path: Path) -> None:
    path, tail = tmp_path / "a.jsonl", Tail(tmp_path / "a.jsonl")
    path.write_text('{"step": 1}\n{"st')
    assert records(tail) == (False, [{"step": 1}])
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert records(tail) == (False, [{"step": 2}])


def test_line_that_a_crash_tore_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"st\n[3]\n{"step": 2}\n')
    assert records(Tail(tmp_path / "a.jsonl")) == (False, [{"step": 1}, {"step": 2}])


def test_numbers_that_are_not_finite_are_read_as_a_run_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1, "loss": NaN, "kl": -Infinity}\n')
    assert records(Tail(tmp_path / "a.jsonl")) == (False, [{"step": 1, "loss": None, "kl": None}])


def test_pipe_or_device_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        assert records(Tail(tmp_path / name)) == (False, [])


@pytest.mark.parametrize("after", ['{"step": 1}\n', '{"step": 1}\n{"step": 7}\n{"step": 8}\n', None])
def test_cut_or_replaced_file_is_read_anew(tmp_path: Path, after: str | None) -> None:
    path, tail = tmp_path / "a.jsonl", Tail(tmp_path / "a.jsonl")
    path.write_text('{"step": 1}\n{"step": 2}\n')
    records(tail)
    path.unlink()
    if after is not None:
        path.write_text(after)
    expected = [json.loads(line) for line in (after or "").splitlines()]
    assert records(tail) == (True, expected)
    assert records(tail) == (False, [])


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="is not a run directory"):
        RunReader(tmp_path)


def test_live_and_finished_reading_agree(written) -> None:
    live = RunReader(written.path)
    for step in (1, 2, 3):
        written.step(step)
        changed, cut = live.poll()
        assert {"steps", "curve", "lanes", "status"} <= changed and not cut
    written.end()
    assert "status" in live.poll()[0]
    finished = RunReader(written.path)
    finished.poll()
    for reader in (live, finished):
        assert [record["step"] for record in reader.steps] == [1, 2, 3]
        assert len(reader.curve(2)) == 9 and {record["step"] for record in reader.curve(2)} == {2}
        assert len(reader.lanes(3)) == 6
        assert reader.drawn_steps == [1, 2, 3]
        assert state(reader) == "done"
    assert live.activity_seconds == finished.activity_seconds
    assert live.poll()[0] <= {"status"}


def test_long_files_are_taken_in_piece_by_piece_and_only_when_told(written, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 8):
        written.step(step)
    whole, pieces = RunReader(written.path), RunReader(written.path)
    whole.poll()
    monkeypatch.setattr("launch.monitor.reader.MOST_LINES", 3)
    news = pieces.look()
    assert news.more and not pieces.steps, "a look changes nothing"
    assert pieces.take(news) == ({"steps", "events", "curve", "lanes", "config", "status"}, False)
    assert [record["step"] for record in pieces.steps] == [1, 2, 3]
    assert "steps" in pieces.poll()[0]
    assert pieces.steps == whole.steps and pieces.activity_seconds == whole.activity_seconds
    assert [pieces.curve(step) == whole.curve(step) != [] for step in range(1, 8)] == [True] * 7
    written.run.truncate_after(5)
    assert pieces.poll()[1] and whole.poll()[1]
    assert [record["step"] for record in pieces.steps] == [1, 2, 3, 4, 5] and pieces.steps == whole.steps


def test_lines_of_something_else_stop_neither_the_reader_nor_what_it_shows(written) -> None:
    reader = RunReader(written.path)
    written.step(1)
    for name in ("steps", "curve", "lanes"):
        written.line(name, {"step": 2})
        written.line(name, {"step": "3", "seconds": None, "workers": 1})
    (written.path / "config" / "resolved.yaml").write_text("run: [")
    written.step(2)
    reader.poll()
    assert [record["step"] for record in reader.steps] == [1, 2]
    assert (len(reader.curve(2)), len(reader.lanes(2))) == (9, 6)
    assert (summary(reader)["step"], summary(reader)["run"]) == (2, "")


def test_resumed_run_that_does_steps_again_shows_each_once(written) -> None:
    reader = RunReader(written.path)
    for step in (1, 2, 3):
        written.step(step)
    reader.poll()
    written.run.truncate_after(1)
    written.step(2, reward_mean=0.9)
    _, cut = reader.poll()
    assert cut
    assert [(record["step"], record["reward_mean"]) for record in reader.steps] == [(1, 0.1), (2, 0.9)]
    assert len(reader.curve(2)) == 9 and reader.curve(3) == []
    assert reader.activity_seconds["train"] == pytest.approx(12.0)


def test_state_tells_a_dead_run_from_a_live_one(written) -> None:
    reader = RunReader(written.path)
    reader.poll()
    assert state(reader) == "starting"
    written.step(1)
    reader.poll()
    assert state(reader) == "running"
    written.run.close()  # as the kernel does for a killed process
    dead = RunReader(written.path)
    dead.poll()
    assert state(dead) == "died"
    assert alarms(dead)[0][0] == "alarm"


@pytest.mark.parametrize(("difference", "level"), [(0.004, None), (0.006, "warn"), (0.02, "alarm")])
def test_difference_between_rollout_and_training_raises_its_alarm(written, difference, level) -> None:
    written.step(1, prob_diff_mean=difference, time=written.begun + 990)
    reader = RunReader(written.path)
    reader.poll()
    assert [found for found, text in alarms(reader) if "disagree" in text] == ([level] if level else [])


def test_loss_that_is_not_finite_is_an_alarm(written) -> None:
    written.step(1, loss=float("nan"))
    reader = RunReader(written.path)
    reader.poll()
    assert ("alarm", "the loss of step 1 is not finite") in alarms(reader)


def test_end_that_was_asked_for_is_no_alarm(written) -> None:
    written.step(1)
    written.end(75, "asked to stop")
    reader = RunReader(written.path)
    reader.poll()
    assert alarms(reader) == [("warn", "stopped with exit code 75: asked to stop")]


def test_time_left_is_that_of_the_steps_left(written) -> None:
    reader = RunReader(written.path)
    reader.poll()
    assert eta_s(reader) is None
    for step in (1, 2):
        written.step(step, time=2e9)  # just over, whatever the clock says
    reader.poll()
    assert eta_s(reader) == pytest.approx(6 * 9.0)
    assert summary(reader)["total_steps"] == 8


def test_ranges_hold_every_step() -> None:
    assert ranges([]) == []
    assert ranges([1, 2, 3, 7, 9, 10]) == [[1, 3], [7, 7], [9, 10]]

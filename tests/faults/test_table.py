"""Every fault of the table, injected into a run: how it ends, what is told, and that nothing is lost or doubled."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_document import DOC, document
from fault_runs import Commands, check_complete, check_end, corrupt, kill, state, texts
from fault_table import CASES, Case


def test_the_document_is_what_the_table_says() -> None:
    assert DOC.read_text() == document(), "run python tests/faults/fault_document.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_fault_has_its_outcome(
    name: str, recipe: Path, commands: Commands, undisturbed: Callable[[tuple[str, ...]], Path]
) -> None:
    case, run = CASES[name], recipe.parent / name
    steps = 3 if case.workers else 4
    whole = undisturbed(case.options) if case.same != "counts" else None
    ended = commands.run("train", recipe, f"run.dir={run}", *case.options, fault=case.fault)
    try:
        assert ended.code == case.code, ended.said
        report = check_end(run, ended)
        assert case.said in told(run, case, ended.said, report), ended.said
        if name == "corrupt-shard":
            corrupt(run)
        if case.code != 0:
            # a limit that was short for the fault's sake
            patience = ["reward.timeout_s=60"] if "reward.timeout_s=1" in case.options else []
            resumed = commands.run("resume", run, *patience)
            assert resumed.code == 0, resumed.said
            check_end(run, resumed)
    finally:
        kill(ended.mark)
    check_complete(run, steps=steps)
    match case.same:
        case "bits":
            assert whole is not None and state(run) == state(whole)
            assert texts(run, steps) == texts(whole, steps)
        case "tokens":
            assert whole is not None and texts(run, steps) == texts(whole, steps)
    if name == "corrupt-shard":
        assert list((run / "checkpoints").glob("step_*.corrupt"))


def told(run: Path, case: Case, said: str, report: dict[str, object] | None) -> str:
    """Where the table's word must stand: in the report, that of the attempt that was recovered from, or the output."""
    if report is None and case.workers and case.code == 0:
        report = json.loads((run / "logs" / "attempt_1" / "crash.json").read_text())
        assert report["following"]
    if report is None:
        return said
    first = report["first"]
    assert isinstance(first, dict)
    return f"{first['process']}: {first['error']} {report['waited_for'] or ''} {report['reason']}"

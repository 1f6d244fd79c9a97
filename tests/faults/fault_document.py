"""docs/faults.md, made from the table: python tests/faults/fault_document.py writes it."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from fault_table import CASES, ELSEWHERE, KILLED, Case

from configs.faults import ACTIONS, POINTS

DOC = Path(__file__).parents[2] / "docs" / "faults.md"
SOAK = DOC.parent / "results" / "soak_cpu.json"

WAITS = (
    ("for a worker's sign of life, asked for every second, answered by a thread of its own", "`run.silence_s`"),
    ("of ranks for one another in a collective", "`run.collective_s`"),
    ("for a worker to answer between two cycles", "60 s; 900 s until its first rollout, while it compiles"),
    ("for a worker to load its policy", "1 h"),
    ("for a step or a checkpoint of a worker that shows life", "2 h"),
    ("for a reward", "`reward.timeout_s` a function; 120 s to start"),
    ("for the thread that writes the drafter's checkpoint", "30 min"),
)

TEXT = """\
# Faults

What befalls a run, and what becomes of it. `python tests/faults/fault_document.py` makes this page from the table
that `pytest tests/faults` runs: each row is injected into a run, which is resumed where it ended. Then every step
must be there once, every sample of every prompt once, checkpoints must be whole, and no process may be left. The last
checkpoint of a run in one process equals an undisturbed run's bit for bit; with Ray workers every token is the same.

{cases}

Tested apart:

{elsewhere}

## The crash report

`RUN/logs/attempt_N/crash.json`, and `crash.log` for reading: the first cause, in whichever process it was (error,
process, host, what it was asked to do, stack), the step and its phase, who was waited for, what followed from it, the
exit code, the next commands. `paceline status RUN` shows it. A process that is killed writes none; the next `paceline
resume` does.

## Recovery

A lost worker takes its share of the optimiser with it. The report is written, the workers that are left are ended,
and all start again from the newest checkpoint, as a new attempt; `events.jsonl` has a `recovery`. After
`run.max_recoveries` of them the run ends with exit code 7.

## Who waits how long

{waits}

Each limit names whom it waited for. A worker that shows no life is killed, so that whoever waits for it hears at
once.

## The soak

{soak}

## Injecting a fault

`PACELINE_FAULT=point[@process]:nth:action[,...]`: `nth` counts hits of the point in a process; `3+` means from the
third on, and after recoveries too; `@process` is a worker's number (one that the run has), or `driver`.

{points}

{actions}
"""


def document() -> str:
    """docs/faults.md."""
    cases = [
        (case.what, code(case.fault) if case.fault else "a reward of the user's", case.outcome, exit_code(case))
        for case in CASES.values()
    ]
    elsewhere = [(what, code(fault), outcome, code(test)) for what, fault, outcome, test in ELSEWHERE]
    return TEXT.format(
        cases=table(("fault", "`PACELINE_FAULT`", "outcome", "exit code"), cases),
        elsewhere=table(("fault", "injected", "outcome", "test"), elsewhere),
        waits=table(("wait", "limit"), WAITS),
        soak=soak(),
        points=table(("point", "reached when"), ((code(point), text) for point, text in POINTS.items())),
        actions=table(("action", "what happens"), ((code(action), text) for action, text in ACTIONS.items())),
    )


def soak() -> str:
    """What the last soak found."""
    found = json.loads(SOAK.read_text())
    held = "One invariant did not hold" if found["violation"] else "Every invariant held after each of them"
    return textwrap.fill(
        "`python tests/faults/soak.py --minutes 30 --json docs/results/soak_cpu.json` disturbs runs at random until "
        f"the time is over. The last one took {found['minutes']:g} minutes on {found['cores']} CPU cores that were "
        f"shared with other work: {found['rounds']} runs, {found['rounds_with_workers']} of them with two Ray workers, "
        f"{found['commands']} commands, {found['faults_planned']} faults planned at {len(found['by_point'])} points, "
        f"{found['corrupted']} checkpoints corrupted between two commands. {held}.",
        width=118,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def code(text: str) -> str:
    """As code."""
    return f"`{text}`"


def exit_code(case: Case) -> str:
    """As a reader looks for it."""
    return "killed" if case.code == KILLED else str(case.code)


if __name__ == "__main__":
    DOC.write_text(document())
    print(f"wrote {DOC}")

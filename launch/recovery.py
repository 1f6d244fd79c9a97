"""A run that loses workers goes on by itself: all are started again, and take up the newest checkpoint.

A rank takes its share of the optimiser with it, so the others cannot go on without it. The steps since the checkpoint
are done again, identical.
"""

import itertools
import logging
from collections.abc import Callable

from configs.errors import RecoveryError
from launch.crash import Phases, write_report
from launch.fleet import WorkerLostError
from launch.logs import log_run
from rl.rundir import RunDir, read_status

log = logging.getLogger(__name__)


def with_recoveries(attempt: Callable[[int], None], *, run: RunDir, budget: int, phases: Phases) -> None:
    """Call attempt(recoveries so far) until it ends otherwise than by the loss of a worker.

    Each recovery begins a new attempt of the run, after the report of the one before. Raises RecoveryError, from what
    befell the last attempt, when the budget is spent.
    """
    for recovery in itertools.count():
        try:
            attempt(recovery)
            return
        except WorkerLostError as error:
            if recovery == budget:
                times = "once" if recovery == 0 else f"{recovery + 1} times"
                raise RecoveryError(
                    f"workers were lost {times} and run.max_recoveries={budget}, the last: {_cause(error)}; "
                    "find out why, then resume the run"
                ) from error
            _begin_anew(run, error, number=recovery + 1, budget=budget, phases=phases)


def _begin_anew(run: RunDir, error: WorkerLostError, *, number: int, budget: int, phases: Phases) -> None:
    """Report an attempt that lost a worker, and begin the next."""
    step = read_status(run.path).get("step")
    following = f"recovery {number} of {budget} follows by itself, as attempt {run.attempt + 1}"
    path = write_report(run, error, code=None, reason=str(error), phase=phases.name, step=step, following=following)
    run.append_event("recovery", number=number, cause=_cause(error), step=step, report=str(path))
    run.begin_attempt()
    log_run(run.logs / "run.log", show=phases.message)
    phases.message(
        f"recovery {number} of {budget}: {_cause(error)}; all workers start again from the newest checkpoint"
    )


def _cause(error: WorkerLostError) -> str:
    """Without what a person would have to do."""
    return str(error).removesuffix("; resume the run")

"""How a process ends: every error becomes an exit code of DESIGN.md, a line for the user and a record in the run."""

import errno
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from configs.errors import PacelineError, PreemptedError, ResourceError, StorageError
from launch import crash
from rl.rundir import RunDir, read_status

BUG, USAGE, INTERRUPTED = 1, 2, 130
UNREAD = 128 + signal.SIGPIPE  # whoever read what is printed, as in `paceline ... | head`, has seen enough
_RESUMABLE = (PreemptedError.exit_code, INTERRUPTED)


class EndedError(Exception):
    """The run ended and its directory says so; code and reason are what the process reports."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def run_command(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; what went wrong stands on stderr, a line a problem."""
    try:
        # typer returns the code of its own Exit, which it makes of Ctrl-C too
        if exited := command():
            raise SystemExit(exited)
    except BaseException as error:
        code, reason = outcome(error)
        if code == BUG and not isinstance(error, EndedError):
            traceback.print_exception(error)
        for line in reason.splitlines():
            print(f"error: {line}", file=sys.stderr)
        return code
    return 0


@contextmanager
def recorded(run: RunDir, phases: crash.Phases) -> Iterator[None]:
    """Write EXIT.json however the block ends, and a crash report where it was not meant to. Raises EndedError."""
    try:
        yield
    except BaseException as error:
        code, reason = outcome(error)
        try:
            if code in _RESUMABLE:
                reason += f"; `paceline resume {run.path}` goes on"
            else:
                step = read_status(run.path).get("step")
                report = crash.write_report(run, error, code=code, reason=reason, phase=phases.name, step=step)
                if code == BUG:
                    reason += f"; the traceback is in {report.with_name(crash.LOG)}"
            run.write_exit(code, reason)
        except (OSError, StorageError) as second:
            reason += f"\n{second}"
            if code == BUG:
                traceback.print_exception(error)
        raise EndedError(code, reason) from error
    run.write_exit(0, "done")


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, where nothing else answers to SIGTERM, it raises PreemptedError: launchers start the run again."""
    told: list[int] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        sys.exit(PreemptedError.exit_code)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        if told:  # whatever is left of the code: what waits in Ray makes it 1
            raise PreemptedError("asked to stop, with nothing new to save") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def outcome(error: BaseException) -> tuple[int, str]:
    """Exit code and reason of whatever ended a command."""
    match error:
        case EndedError():
            return error.code, error.reason
        case PacelineError():
            return error.exit_code, str(error)
        case BaseExceptionGroup():
            users = error.subgroup(PacelineError)
            return outcome((users or error).exceptions[0])
        case KeyboardInterrupt() | typer.Abort():
            return INTERRUPTED, "interrupted"
        case SystemExit(__context__=BrokenPipeError()):  # typer makes an exit of it
            return UNREAD, ""
        case SystemExit(code=int(code)):
            return code, "interrupted" if code == INTERRUPTED else f"exit {code}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return StorageError.exit_code, f"the disk is full ({error}); free some space, then resume"
    # by shape: typer brings a copy of click's errors in some versions, and click itself in others
    if (format_message := getattr(error, "format_message", None)) is not None:
        return USAGE, f"{format_message().rstrip('.')}; see paceline --help"
    if _is_out_of_memory(error):
        remedy = "lower train.micro_tokens, rollout.max_running or rollout.kv_tokens"
        return ResourceError.exit_code, f"out of memory ({_first_line(error)}); {remedy}"
    return BUG, f"unexpected {type(error).__name__}: {_first_line(error)}"


def _is_out_of_memory(error: BaseException) -> bool:
    # by name: importing torch to compare types would slow every usage error down
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""What is known of an error beyond its message: where and when it was raised, what followed, who was waited for.

A worker notes it on the error before that crosses to the driver. What a process that died could not note is told by
whoever missed it.
"""

import functools
import inspect
import os
import socket
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rl.rundir import now

_TRACE, _FOLLOWED, _WAITED_FOR = "__paceline_trace__", "__paceline_followed__", "__paceline_waited_for__"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trace:
    """One error, and where and when it was raised. call: what that process was asked to do."""

    error: str
    process: str
    host: str
    pid: int
    call: str
    time: str
    stack: str


@contextmanager
def noted(process: str, call: str) -> Iterator[None]:
    """Errors raised inside say so, wherever they are caught; one that says already is left as it is."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, _TRACE):
            setattr(error, _TRACE, trace(error, process, call))
        raise


def note(error: BaseException, *, process: str, host: str, pid: int) -> None:
    """Note on an error that it is about a process that could not say so itself."""
    setattr(error, _TRACE, replace(trace(error, process, ""), host=host, pid=pid, stack=""))


def noting(kind: type[T]) -> type[T]:
    """A worker's class whose public methods note their errors. The worker is the rank its environment tells."""
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, _noting(method, name))
    return kind


def trace(error: BaseException, process: str, call: str) -> Trace:
    """The error as this process sees it now."""
    return Trace(
        error=one_line(error),
        process=process,
        host=socket.gethostname(),
        pid=os.getpid(),
        call=call,
        time=now(),
        stack="".join(traceback.format_exception(error)),
    )


def trace_of(error: BaseException) -> Trace | None:
    """What was noted on the error, or on one that it was raised from."""
    return _noted(error, _TRACE, None)


def earliest(errors: Mapping[int, BaseException], is_loss: Callable[[BaseException], bool]) -> BaseException:
    """The first cause among what workers ended with, the others noted on it.

    A worker that is gone goes before what the others say of it, which they may say sooner; else the earliest by the
    clocks of their hosts.
    """

    def order(number: int) -> tuple[bool, str]:
        found = trace_of(errors[number])
        return not is_loss(errors[number]), found.time if found else ""

    first, *others = (errors[number] for number in sorted(errors, key=order))
    setattr(first, _FOLLOWED, [trace_of(other) or trace(other, "driver", "") for other in others])
    return first


def waiting_for(error: BaseException, who: str) -> None:
    """Note who did not answer."""
    setattr(error, _WAITED_FOR, who)


def waited_for(error: BaseException) -> str | None:
    """Who did not answer, if that is what ended the run."""
    return _noted(error, _WAITED_FOR, None)


def followed(error: BaseException) -> list[Trace]:
    """The errors of others that came after it."""
    return _noted(error, _FOLLOWED, [])


def one_line(error: BaseException) -> str:
    """Type and first line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _noted(error: BaseException, name: str, default: Any) -> Any:
    """What was noted on the error, or on one that it was raised from."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # an error can be raised from itself
        if hasattr(cause, name):
            return getattr(cause, name)
        seen.add(id(cause))
        cause = cause.__cause__
    return default


def _noting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The method, in the kind it is of: Ray tells them apart."""

    def here() -> str:
        return f"worker {os.environ.get('RANK', '?')}"

    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(*args: Any, **options: Any) -> AsyncGenerator[Any]:
            with noted(here(), name):
                async with aclosing(method(*args, **options)) as items:
                    async for item in items:
                        yield item

        return stream
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def coroutine(*args: Any, **options: Any) -> Any:
            with noted(here(), name):
                return await method(*args, **options)

        return coroutine

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        with noted(here(), name):
            return method(*args, **options)

    return call

"""Inside the cell: one warm process that forks a fresh one for each program, watches it and ends it.

Programs are the policy's, so they may do anything their process can. It is a copy of this one without its descriptors:
it can neither signal, trace nor outlive this one, and finds nowhere in its memory what its tests expect, for this one
never reads it. Standard library only.
"""

import atexit
import contextlib
import gc
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from rl import lockdown
from rl.frames import receive, send
from rl.remote import TestError, answer, judge

OUTPUT_BYTES = 16 << 20  # of a program's standard output, and of any file it could write
# what programs import most, there before they start
WARM = """
    bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq io itertools json math
    operator queue random re statistics string sys time typing
"""


@dataclass(frozen=True, slots=True)
class Terms:
    """How programs are held here.

    locked: by seccomp and its kin, not by limits alone. tasks: processes and threads of this user, at most.
    keep: descriptors through which Python finds its library.
    """

    locked: bool
    tasks: int
    keep: tuple[int, ...]


def serve(fd: int, terms: Terms) -> None:
    """Answer jobs until the socket closes: {"program", "timeout_s"} and what is done with it.

    "input": text for it to read; the answer is {"output"}, null where it ended badly or too late.
    "go_on": a descriptor comes before the job, of a file with tests that call the program (a JSON list); the answer is
    {"passed": [...]}, as many as were run in time, without "go_on" up to the first that failed, or {"error"} for tests
    that cannot be run.
    """
    for name in WARM.split():
        import_module(name)
    gc.freeze()  # a collection in a child would copy every page of ours
    with socket.socket(fileno=fd) as channel:
        send(channel, {"ready": True})
        while True:
            mark, fds, _, _ = socket.recv_fds(channel, 1, 1)
            job = receive(channel) if mark else None
            if job is None:
                return
            watch = _Watch(channel, terms, time.monotonic() + job["timeout_s"])
            if "input" in job:
                send(channel, {"output": _feed(job["program"], job["input"], watch)})
                continue
            try:
                send(channel, {"passed": _call(job["program"], fds[0], watch, go_on=job["go_on"])})
            except TestError as error:
                send(channel, {"error": str(error)})
            os.close(fds[0])


def _feed(program: str, text: str, watch: "_Watch") -> str | None:
    """What a program writes when it reads this; None where it ends badly or too late."""
    given, written = os.memfd_create("input"), os.memfd_create("output")
    try:
        with open(given, "wb", closefd=False) as stream:
            stream.write(text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        pid = watch.fork(lambda: _run(program, "__main__"), stdin=given, stdout=written)
        if watch.wait(pid) != 0:
            return None
        return os.pread(written, OUTPUT_BYTES, 0).decode(errors="replace")
    finally:
        os.close(given)
        os.close(written)


def _call(program: str, tests: int, watch: "_Watch", *, go_on: bool) -> list[bool]:
    """Run a program in one process and, in another, its tests, which this one hands on unread; see serve."""
    for_program, for_judge = socket.socketpair()

    def run() -> None:
        answer(for_program, _run(program, "program"))

    def decide() -> None:
        with open(tests, "rb") as stream:
            stream.seek(0)
            listed = json.load(stream)
        try:
            for passed in judge(listed, for_judge):
                os.write(write, b"1" if passed else b"0")
                if not (passed or go_on):
                    return
        except TestError as error:
            os.write(write, b"!" + str(error).encode(errors="replace")[:1000])

    with for_program, for_judge:
        program_pid = watch.fork(run, keep=(for_program.fileno(),))
        read, write = os.pipe()  # only now: the program never had it
        judge_pid = watch.fork(decide, keep=(for_judge.fileno(), write, tests))
    os.close(write)
    watch.wait(judge_pid)
    watch.end(program_pid)
    with open(read, "rb") as verdicts:
        marks, bad, reason = verdicts.read().partition(b"!")
    if bad:
        raise TestError(reason.decode())
    return [mark == ord("1") for mark in marks]


def _run(program: str, name: str) -> dict[str, Any]:
    """Execute a program as the module of this name; its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, "<program>", "exec"), module.__dict__)
    return module.__dict__


class _Watch:
    """Forks, waits and kills, for one job."""

    def __init__(self, channel: socket.socket, terms: Terms, deadline: float) -> None:
        self._channel = channel
        self._terms = terms
        self._deadline = deadline

    @property
    def remaining_s(self) -> float:
        return self._deadline - time.monotonic()

    def fork(self, act: Callable[[], Any], *, stdin: int = -1, stdout: int = -1, keep: tuple[int, ...] = ()) -> int:
        """A child that gives up what it must, acts and ends; its process id."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._child(act, parent, stdin, stdout, keep)
        with contextlib.suppress(OSError):  # it has done so itself, or is gone
            os.setpgid(pid, pid)
        return pid

    def _child(self, act: Callable[[], Any], parent: int, stdin: int, stdout: int, keep: tuple[int, ...]) -> NoReturn:
        leave, status = os._exit, 1
        try:
            os.setpgid(0, 0)
            nothing = os.open(os.devnull, os.O_RDWR)
            for target, fd in enumerate((stdin, stdout, -1)):
                os.dup2(nothing if fd < 0 else fd, target)
            _close_all_but((0, 1, 2, *keep, *self._terms.keep))
            cpu_s = math.ceil(max(0.0, self.remaining_s)) + 1
            lockdown.die_with_parent(parent)
            lockdown.limit(cpu_s=cpu_s, file_bytes=OUTPUT_BYTES, tasks=self._terms.tasks)
            if self._terms.locked:
                lockdown.restrict_calls()
            status = _status(act)
        finally:
            leave(status)

    def wait(self, pid: int) -> int | None:
        """Its exit status once it has ended by itself; None where it was a signal, or too late. It is gone then."""
        ending = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, self.remaining_s) * 1000)}
        os.close(ending)
        status = self.end(pid)
        if self._channel.fileno() in ready:  # nobody asks while we work: the other side is gone
            os._exit(0)
        return status if ending in ready and status >= 0 else None

    def end(self, pid: int) -> int:
        """Kill what is left of a child and all that it started; how it ended, as subprocess tells it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # not yet waited for: the number is still its own
        if self._terms.locked and os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of this PID namespace but ourselves
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _status(act: Callable[[], Any]) -> int:
    """Act, then end as an interpreter does: threads, exit functions, output. The exit status."""
    status = 0
    try:
        act()
    except SystemExit as ending:
        status = 0 if ending.code in (None, 0) else 1
    # a program may raise anything
    except BaseException:
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


def _close_all_but(keep: tuple[int, ...]) -> None:
    first = 0
    for fd in sorted({*keep, resource.getrlimit(resource.RLIMIT_NOFILE)[0]}):
        if first < fd:  # an empty range would be taken for all there are
            os.closerange(first, fd)
        first = fd + 1

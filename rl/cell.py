"""Where model-written code runs: a confined, warm Python that is handed programs with their tests.

Three kinds. bubblewrap: new namespaces that hold the interpreter and nothing else. landlock: the files of this
machine, closed by Landlock. In both, seccomp leaves a program no network, no other process and no signals
(rl/lockdown.py). none: limits alone, only ever by name.
"""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from configs.errors import PreflightError
from rl import lockdown
from rl.frames import FrameError, receive, send

Kind = Literal["bubblewrap", "landlock", "none"]
KINDS: tuple[Kind, ...] = ("bubblewrap", "landlock")
MODULES = ("__init__", "enter", "forkserver", "frames", "lockdown", "plain", "remote")  # of rl, all the cell reads
THREADS = 128  # of a program
START_S = 60.0  # of a Python start, on a busy machine
GRACE_S = 5.0  # past its own deadline, until a cell that does not answer is given up
UID_FIRST, UID_COUNT = 61184, 4336  # the users systemd hands out to services: nobody's files, in most containers' range
HOME = "/python"  # where Python lives under bubblewrap
ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # each reserves address space, which is limited
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONNOUSERSITE": "1",
    "PYTHONUTF8": "1",
}
PROBE = """
import os, socket
path, port = input(), int(input())
refused = []
for act in (lambda: open(path), lambda: socket.create_connection(("127.0.0.1", port), 1), os.fork):
    try:
        act()
    except OSError:
        refused.append("refused")
print(*refused)
"""


class CellError(Exception):
    """The cell did not start, or is gone; the message is one line."""


class Cell:
    """One confined process of this kind, ready when the constructor returns."""

    def __init__(self, kind: Kind, *, memory_mb: int) -> None:
        """memory_mb: of each process in it. Raises CellError with what the sandbox said."""
        self._channel, theirs = socket.socketpair()
        self._log = os.memfd_create("cell-log")
        with ExitStack() as undone, theirs, open(os.memfd_create("cell"), "wb") as archive:
            undone.callback(self._channel.close)
            undone.callback(os.close, self._log)
            archive.write(_archive())
            archive.flush()
            fds = (theirs.fileno(), archive.fileno())
            command = _command(kind, fd=fds[0], archive=fds[1], memory_mb=memory_mb)
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=fds,
                    env=_environment(kind),
                )
            except OSError as error:
                raise CellError(f"cannot start {command[0]}: {error.strerror}") from error
            undone.pop_all()
        self._wait_at_most(START_S)
        try:
            if receive(self._channel) is None:
                raise CellError(self._last_words())
        except (OSError, FrameError):
            raise CellError(self._last_words()) from None

    def feed(self, program: str, text: str, *, timeout_s: float) -> str | None:
        """What a program writes when it reads this text; None where it ends badly or too late. Raises CellError."""
        output: str | None = self._ask({"program": program, "input": text, "timeout_s": timeout_s}, [])["output"]
        return output

    def call(self, program: str, tests: Sequence[str], *, timeout_s: float, go_on: bool) -> list[bool]:
        """Which tests a program passes, as many as were run in time; without go_on, up to the first that failed.

        Raises ValueError for tests that cannot be run, CellError where the cell is lost.
        """
        # a file, which only the process that runs the tests reads
        with open(os.memfd_create("tests"), "wb") as file:
            file.write(json.dumps(list(tests)).encode())
            file.flush()
            reply = self._ask({"program": program, "go_on": go_on, "timeout_s": timeout_s}, [file.fileno()])
        if "error" in reply:
            raise ValueError(reply["error"])
        passed: list[bool] = reply["passed"]
        return passed

    @property
    def pid(self) -> int:
        """The process that was started; what runs in the cell ends with it."""
        return self._process.pid

    def close(self) -> None:
        """End all of it, and wait until it is gone."""
        self._channel.close()
        try:
            self._process.wait(timeout=1)  # it ends when nobody asks any more; what runs in it goes first
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _ask(self, job: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._wait_at_most(job["timeout_s"] + GRACE_S)
        try:
            socket.send_fds(self._channel, [b"!"], fds)
            send(self._channel, job)
            reply: dict[str, Any] | None = receive(self._channel)
        except (OSError, FrameError):
            reply = None
        if reply is None:
            raise CellError(self._last_words())
        return reply

    def _wait_at_most(self, seconds: float) -> None:
        # unlike settimeout this leaves the socket blocking, and MSG_WAITALL with its meaning
        whole, part = divmod(seconds, 1)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(part * 1e6)))

    def _last_words(self) -> str:
        self._process.kill()
        code = self._process.wait()
        lines = os.pread(self._log, 1 << 16, 0).decode(errors="replace").split("\n")
        said = [" ".join(line.split()) for line in lines if line.strip()]
        self.close()
        return said[-1] if said else f"ended with {code}"


def check_sandbox(kind: Literal["auto"] | Kind = "auto", *, memory_mb: int = 1024) -> tuple[Kind, str]:
    """Run a confined program for real: it must work, and be refused a foreign file, the network and a fork.

    Returns the kind and a line about it; "auto" takes the first kind that holds. Raises PreflightError, with the
    remedy, where none does.
    """
    reasons = []
    for candidate in KINDS if kind == "auto" else (kind,):
        try:
            return candidate, _probe(candidate, memory_mb)
        except CellError as error:
            reasons.append(f"{candidate}: {error}")
    raise PreflightError(
        f"no sandbox for model-written code works here ({'; '.join(reasons)}); install bubblewrap and allow user "
        "namespaces, or run Linux 6.2 or newer with Landlock, or accept unconfined code by reward.sandbox=none"
    )


def _probe(kind: Kind, memory_mb: int) -> str:
    with (
        tempfile.NamedTemporaryFile(prefix="paceline-probe-") as foreign,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        os.chmod(foreign.name, 0o644)
        given = f"{foreign.name}\n{server.getsockname()[1]}\n"
        cell = Cell(kind, memory_mb=memory_mb)
        try:
            if kind == "none":
                return "UNCONFINED: limits of time and memory alone"
            if cell.call("def f(x): return x + 1", ["assert f(1) == 2"], timeout_s=START_S, go_on=True) != [True]:
                raise CellError("a right program failed its test")
            if cell.feed(PROBE, given, timeout_s=START_S) != "refused refused refused\n":
                raise CellError("a program was not refused a foreign file, the network or a fork")
        finally:
            cell.close()
    who = f"user {_uid()}" if _uid() else f"this user, {os.getuid()}"
    means = "namespaces and seccomp" if kind == "bubblewrap" else f"Landlock ABI {lockdown.landlock_abi()} and seccomp"
    return f"{means}, as {who}: a foreign file, the network and a fork were refused"


def _archive() -> bytes:
    """The cell's own code: it sees none of the project's files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in MODULES:
            archive.write(Path(__file__).with_name(f"{name}.py"), f"rl/{name}.py")
        archive.writestr("__main__.py", "from rl.enter import main\nmain()\n")
    return data.getvalue()


def _environment(kind: Kind) -> dict[str, str]:
    """Of the cell: nothing of ours, where tokens and keys may be."""
    home, packages = (HOME, _packages_inside()) if kind == "bubblewrap" else (sys.base_prefix, _packages())
    places = {"PYTHONHOME": home, "PYTHONPATH": os.pathsep.join(packages), "LD_LIBRARY_PATH": os.path.join(home, "lib")}
    return ENVIRONMENT | places


def _packages() -> list[str]:
    return sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})


def _packages_inside() -> list[str]:
    return [f"/packages-{number}" for number in range(len(_packages()))]


def _command(kind: Kind, *, fd: int, archive: int, memory_mb: int) -> list[str]:
    if kind != "none" and not lockdown.supported():
        raise CellError(f"no list of system calls for this processor ({os.uname().machine})")
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    python = os.path.relpath(executable, sys.base_prefix)
    options = {
        "kind": kind,
        "step": "restrict" if kind == "landlock" else "work",
        "fd": fd,
        "parent": os.getpid(),
        "uid": 0 if kind == "none" else _uid(),
        "tasks": _tasks(),
        "memory_mb": memory_mb,
        "home": sys.base_prefix,
        "packages": _packages(),
        "python": python,
        "keep": [],
    }
    home = HOME if kind == "bubblewrap" else sys.base_prefix
    interpreter = [os.path.join(home, python), "-S", f"/proc/self/fd/{archive}", json.dumps(options)]
    return [*_bubblewrap(), *interpreter] if kind == "bubblewrap" else interpreter


def _bubblewrap() -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise CellError("bwrap is not installed")
    namespaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if _uid():  # real root needs no user namespace, and becomes somebody else inside
        namespaces += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            namespaces += ["--cap-add", capability]
    else:
        namespaces += ["--unshare-user"]
    files = ["--ro-bind", "/usr", "/usr"]
    files += ["--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("/bin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            files += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            files += ["--ro-bind", name, name]
    # by names of their own: their folders' may be closed to others, as /root is
    for path, name in zip((sys.base_prefix, *_packages()), (HOME, *_packages_inside()), strict=True):
        files += ["--ro-bind", path, name]
    # /tmp is there and cannot be written: nothing passes from one program to the next, nothing fills up
    places = ["--proc", "/proc", "--dev", "/dev", "--dir", "/tmp", "--chdir", "/tmp"]
    sealed = ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [program, *namespaces, "--die-with-parent", "--as-pid-1", *files, *places, *sealed, "--"]


def _uid() -> int:
    """The user that programs run as: one of this process's own where it is root and may become it, else 0 for as is."""
    if os.geteuid():
        return 0
    uid = UID_FIRST + os.getpid() % UID_COUNT
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= uid < first + count:
            return uid
    return 0


def _tasks() -> int:
    """Processes and threads that the programs' user may have: a program's, beside what is there if the user is ours."""
    there = 0 if _uid() else int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
    return there + THREADS

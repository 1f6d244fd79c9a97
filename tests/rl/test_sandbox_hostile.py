"""Programs that mean harm, each under every sandbox of this machine: nothing comes of it, the next is served.

A program ends with the right answer only if its misdeed succeeded, so a score of 0 says that it did not.
"""

import os
import secrets
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.cell import Cell, check_sandbox

ENDLESS = (
    "hangs",
    "is busy for ever",
    "is busy and deaf",
    "leaves a thread behind",
    "waits for input",
    "writes without end",
    "patches the tests' tools",
    "opens a zip bomb",
)
SECRET = "the-expected-answer-" + secrets.token_hex(8)
ANSWER = f"def f(x): return {SECRET!r}"
RIGHT = "def f(x): return x[::-1]"  # what the honest one does with the secret, turned round

# Called with the program's own words for what it attacks: see `places`. Each raises, hangs or dies if it fails.
MISDEEDS = {
    "hangs": "import time; time.sleep(1000)",
    "is busy for ever": "while True: pass",
    "is busy and deaf": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
    """,
    "forks a bomb": """
        import os
        while True: os.fork()
    """,
    "starts threads without end": """
        import threading, time
        threading.stack_size(65536)
        for _ in range(2000): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    """,
    "leaves a thread behind": """
        import threading, time
        threading.Thread(target=time.sleep, args=(1000,)).start()
        raise ValueError
    """,
    "allocates 10 GB": "x = bytearray(10 * 2**30)",
    "hoards memory": """
        x = []
        while sum(map(len, x)) < 10 * 2**30: x.append(bytes(2**24))
    """,
    "opens a zip bomb": """
        import zlib
        deflate = zlib.compressobj(wbits=-15)
        block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
        assert len(zlib.decompressobj(wbits=-15).decompress(block * 10240)) == 10 * 2**30
    """,
    "hides memory in files without names": """
        import os
        fds = [os.memfd_create("m") for _ in range(40)]
        for fd in fds: os.write(fd, bytes(2**24))
    """,
    "hides memory in shared segments": "import ctypes; assert ctypes.CDLL(None).shmget(0, 2**30, 0o1600) >= 0",
    "connects by TCP": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "sends UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "asks the DNS": """
        import socket
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.connect(("192.0.2.1", 53))
        s.send(b"who is it")
    """,
    "connects to an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect(ABSTRACT)",
    "writes to an abstract socket from a pair": """
        import socket
        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", ABSTRACT + "d")
    """,
    "sets up an io_uring": """
        import ctypes
        assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0
    """,
    "reads /etc/shadow": "open('/etc/shadow').read()",
    "looks into the home": "import os; assert os.listdir(HOME)",
    "reads the run directory": "open(RUN + '/config.yaml').read()",
    "reads the parent's environment": """
        import os
        def read(pid):
            try: return open(f"/proc/{pid}/environ").read()
            except OSError: return ""
        assert any(read(pid) for pid in (PARENT, os.getppid(), 1))
    """,
    "finds our environment in its own": "import os; assert 'PACELINE_CANARY' in os.environ",
    "reads the parent's memory": """
        import os
        open(f"/proc/{os.getppid()}/mem", "rb").read(0)
    """,
    "reads another process's memory by call": """
        import ctypes, os
        libc, size = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t
        assert libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0) >= 0
    """,
    "writes elsewhere": """
        def write(folder):
            try: open(folder + "/" + MARK, "w").write("x")
            except OSError: return False
            return True
        assert any([write(folder) for folder in (RUN, HOME, "/", "/tmp", "/var/tmp", "/dev/shm", ".", "/dev", "/usr")])
    """,
    "fills the disk": """
        import tempfile
        with tempfile.TemporaryFile() as file:
            for _ in range(64): file.write(bytes(2**24))
    """,
    "writes without end": """
        import sys
        while True: sys.__stdout__.write("x" * 2**20)
    """,
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills the tests' process": "import os; os.kill(PARENT, 9)",
    "kills everybody": "import os; os.kill(-1, 9)",
    "kills its parent's group": "import os; os.killpg(os.getpgid(os.getppid()), 9)",
    "has the kernel kill its parent": """
        import fcntl, os, socket
        pair = socket.socketpair()
        fcntl.fcntl(pair[0], 8, os.getppid())
        fcntl.fcntl(pair[0], 10, 9)
        fcntl.fcntl(pair[0], fcntl.F_SETFL, os.O_ASYNC)
        pair[1].send(b"x")
    """,
    "limits its parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "pins its parent": "import os; os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
    "slows its parent": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "traces its parent": "import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "becomes a daemon": """
        import os, time
        if not os.fork():
            os.setsid()
            if not os.fork(): time.sleep(1000)
            os._exit(0)
    """,
    "leaves its group": "import os; os.setpgid(0, os.getpgid(os.getppid()))",
    "outlives its parent": "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "starts a program": "import subprocess; subprocess.Popen(['/bin/sleep', '1000'])",
    "closes its descriptors": "import os; os.closerange(0, 1000)",
    "writes to every descriptor": """
        import os
        for fd in range(3, 1024):
            for claim in (b"11111", b'\\0\\0\\0\\x10{"passed": [true]}', b'\\0\\0\\0\\x0f{"value": true}'):
                try: os.write(fd, claim)
                except OSError: pass
        os._exit(0)
    """,
    "prints that all is well": """
        print('{"passed": [true]}\\nOK')
        def f(x): return "wrong"
    """,
    "ends before its tests": "import sys; sys.exit(0)",
    "ends at once": "import os; os._exit(0)",
    "equals everything": """
        class Any(str):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
            def __bool__(self): return True
        def f(x): return Any("wrong")
    """,
    "patches the tests' tools": """
        import builtins, unittest, sys
        builtins.AssertionError = builtins.exec = builtins.compile = lambda *a, **k: None
        builtins.all = builtins.any = builtins.isinstance = lambda *a: True
        unittest.TestCase.assertEqual = lambda *a: None
        for name, module in list(sys.modules.items()):
            if name.startswith("rl."):
                for key in list(vars(module)): setattr(module, key, lambda *a, **k: [True])
        def f(x): return "wrong"
    """,
    "searches its memory for the answer": """
        import gc, sys
        heap, frame = gc.get_objects(), sys._getframe()
        while frame: heap, frame = heap + [dict(frame.f_locals)], frame.f_back
        found = [line for line in repr(heap).split("'") if line.startswith("the-expected-" + "answer-")]
        def f(x): return found[0]
    """,
    "follows a link": """
        import os
        os.symlink("/etc/shadow", "/tmp/" + MARK)
        open("/tmp/" + MARK).read()
    """,
    "recurses without end": """
        import sys
        sys.setrecursionlimit(10**9)
        class Deep:
            def __getattr__(self, name): return getattr(self, name + "x")
        Deep().y
    """,
    "reads address 0": "import ctypes; ctypes.string_at(0)",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "makes itself root in a new namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "changes its root": "import os; os.chroot('/tmp')",
    "becomes root": "import os; os.setuid(0); assert open('/etc/shadow').read()",
    "reads the kernel's log": "open('/dev/kmsg').read(1)",
    "reads a disk": "import glob; open(glob.glob('/dev/vd*')[0], 'rb').read(1)",
    "changes a file's mode": "import os; os.chmod(RUN + '/config.yaml', 0)",
    "waits for input": """
        import sys
        while True: sys.stdin.read()
    """,
}

HARMLESS = (
    "hides memory in files without names",
    "looks into the home",
    "reads the run directory",
    "reads the parent's environment",
    "leaves its group",
    "outlives its parent",
    "starts a program",
)


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def cell(request: pytest.FixtureRequest, program: Callable[[str], str]) -> Iterator[Cell]:
    if request.param == "bubblewrap":
        program("bwrap")
    try:
        check_sandbox(request.param)
    except ValueError as error:
        if os.environ.get("PACELINE_CI") == "1":
            raise
        pytest.skip(str(error))
    os.environ["PACELINE_CANARY"] = "tweet"
    cell = Cell(request.param, memory_mb=512)
    yield cell
    assert descendants(os.getpid()) & {cell.pid}
    cell.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What programs attack, under the names they use; afterwards nothing of it shows a trace."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("secret")
    os.chmod(run / "config.yaml", 0o666)
    run.chmod(0o777)
    mark, abstract = f"mark-{secrets.token_hex(8)}", f"\0paceline-{secrets.token_hex(8)}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mailbox,
    ):
        listener.bind(abstract)
        listener.listen()
        mailbox.bind(abstract + "d")
        yield {
            "PORT": server.getsockname()[1],
            "ABSTRACT": abstract,
            "HOME": str(Path.home()),
            "RUN": str(run),
            "PARENT": os.getpid(),
            "MARK": mark,
        }
        for channel in (server, listener):
            channel.setblocking(False)
            with pytest.raises(BlockingIOError):
                channel.accept()
        mailbox.setblocking(False)
        with pytest.raises(BlockingIOError):
            mailbox.recv(1)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert (run / "config.yaml").stat().st_mode & 0o777 == 0o666
    for folder in (Path.home(), Path.cwd(), *map(Path, ("/", "/tmp", "/var/tmp", "/dev/shm", "/dev", "/usr"))):
        assert not (folder / mark).is_symlink() and not (folder / mark).exists()


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_program_that(misdeed: str, cell: Cell, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.cell.GRACE_S", 100.0)  # a busy machine is late to end what hangs, for 1000 s, or for ever
    words = "".join(f"{name} = {value!r}\n" for name, value in places.items())
    source = textwrap.dedent(MISDEEDS[misdeed])
    program = words + source + ("" if "def f(x)" in source else f"\n{ANSWER}\n")
    before = descendants(cell.pid)
    timeout_s = 0.4 if misdeed in ENDLESS else 60.0
    passed = cell.call(program, [f"assert f(0) == {SECRET!r}"], timeout_s=timeout_s, go_on=True)
    assert passed in ([], [False])
    assert cell.feed(f"{words}{source}\nprint('done')", "", timeout_s=timeout_s) != "done\n" or "def f(x)" in source
    assert descendants(cell.pid) == before and not strays(before)
    # the cell has survived, knows right from wrong, and nothing is left of what came before
    turned = [f"assert f({SECRET!r}) == {SECRET[::-1]!r}", "assert f('ab') == 'ab'"]
    assert cell.call(RIGHT, turned, timeout_s=60, go_on=True) == [True, False]
    assert cell.feed("print(int(input()) + 1)", "41\n", timeout_s=60) == "42\n"


def test_pairs_of_sockets_are_of_one_family(cell: Cell) -> None:
    """The kernel makes no pair of Internet sockets itself, with another error: what is told is the filter's refusal."""
    program = """
        import socket
        for family in (socket.AF_UNIX, socket.AF_INET, 30):
            try: print(socket.socketpair(family)[0].family == family)
            except OSError as error: print(error.errno)
    """
    assert cell.feed(textwrap.dedent(program), "", timeout_s=60) == "True\n1\n1\n"


def test_bubblewraps_namespaces_are_a_wall_of_their_own(program: Callable[[str], str]) -> None:
    """seccomp refuses what leads out of them: were one shared again, no program above would succeed."""
    program("bwrap")
    cell = Cell("bubblewrap", memory_mb=512)
    kinds = ("net", "pid", "ipc", "uts", "mnt")
    shown = cell.feed(f"import os\nfor kind in {kinds}: print(os.readlink('/proc/self/ns/' + kind))", "", timeout_s=60)
    cell.close()
    assert shown is not None
    ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    assert [kind for kind, own, theirs in zip(kinds, ours, shown.split(), strict=True) if own == theirs] == []


def test_the_same_programs_succeed_where_nothing_holds_them(places: dict[str, Any]) -> None:
    """Those that do no harm on this machine: without it the tests above could pass for want of a working misdeed."""
    cell = Cell("none", memory_mb=2048)
    words = "".join(f"{name} = {value!r}\n" for name, value in places.items() if name not in ("PORT", "ABSTRACT"))
    for misdeed in HARMLESS:
        program = f"{words}{textwrap.dedent(MISDEEDS[misdeed])}\n{ANSWER}\n"
        assert cell.call(program, [f"assert f(0) == {SECRET!r}"], timeout_s=60, go_on=True) == [True], misdeed
    cell.close()


def descendants(pid: int) -> set[int]:
    """The process and all it has started, directly or not."""
    found = {pid}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found |= descendants(int(child))
    return found


def strays(known: set[int]) -> set[int]:
    """Other processes of these ones' users, where they are not our own."""
    users = {user(pid) for pid in known} - {os.getuid()}
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if user(int(path.name)) in users} - known


def user(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return None
    return int(next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1])

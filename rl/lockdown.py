"""What a process gives up before it runs code that nobody has read: system calls, files, its user, its privileges.

Plain ctypes on Linux: seccomp(2) and landlock(7). Standard library only, for it is also read inside the cell.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Iterable, Sequence

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_SET_PTRACER = 0x59616D61
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same number on every architecture
LANDLOCK_ABI = 3  # Linux 6.2, the first that guards truncation

# number on x86_64, on aarch64; None where it has no such call (Linux headers: unistd_64.h, asm-generic/unistd.h)
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # other processes: made, entered, signalled, read
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157),
    "setpgid": (109, 154), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # the network, and memory that no limit counts
    "socket": (41, 198), "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180),
    # files of the same user, which Landlock lets anyone touch without opening them
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # the machine, and parts of the kernel that are seldom tried by anyone honest
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92),
    # allowed with some arguments alone
    "clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "socketpair": (53, 199),
    "prctl": (157, 167), "fcntl": (72, 25), "ioctl": (16, 29),
}  # fmt: skip
_CONDITIONAL = ("clone", "kill", "tgkill", "prlimit64", "socketpair", "prctl", "fcntl", "ioctl")
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH of linux/audit.h
_FIRST_COMMON = 424  # from here on a number means the same everywhere; newer calls are refused unless named
_COMMON = (436, 437, 439, 441, 449)  # close_range, openat2, faccessat2, epoll_pwait2, futex_waitv
_CLONE_THREAD = 0x10000
_STREAMS = [socket.SOCK_STREAM | flags for flags in (0, 0x800, 0x80000, 0x80800)]  # with non-blocking, close-on-exec

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_ALLOW, _REFUSE, _UNKNOWN, _KILL = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000

_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Whether the system calls of this processor are known here."""
    return platform.machine() in _ARCHITECTURES


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends, by whatever signal (prctl(2))."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def shield() -> None:
    """No new privileges by exec, and nothing of this process for others of its user to read or trace."""
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def become(uid: int) -> None:
    """Be this user and group alone, with no capability now or after an exec. Raises OSError."""
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails past the last, and for who has none to drop
    if os.geteuid() == 0 and uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def has_capabilities() -> bool:
    """Whether this process may do anything that its user alone may not (capget(2))."""
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    effective, permitted, _, effective_high, permitted_high, _ = struct.unpack("6I", data.raw)
    return bool(effective | permitted | effective_high | permitted_high)


def limit(*, cpu_s: int, file_bytes: int, tasks: int) -> None:
    """CPU seconds, bytes of any file written, processes and threads of the user, open files; no core dump."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name, value in limits.items():
        most = resource.getrlimit(name)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(name, (value, value))


def landlock_abi() -> int:
    """The version of Landlock that this kernel runs; 0 for none."""
    return max(0, _libc.syscall(LANDLOCK_CREATE, None, 0, 1))


def restrict_files(readable: Iterable[str], devices: Iterable[str]) -> None:
    """From now on: read and execute beneath these paths, read and write these devices, open nothing else (Landlock).

    From ABI 4 on no TCP either; from ABI 6 on no abstract sockets of others and no signals to them.
    Raises OSError where the kernel has no Landlock.
    """
    abi = landlock_abi()
    if abi < LANDLOCK_ABI:
        raise OSError(errno.ENOSYS, f"Landlock has ABI {abi} here, and {LANDLOCK_ABI} is needed")
    files = 2**16 - 1 if abi > 4 else 2**15 - 1  # ABI 5 adds ioctl on devices
    # struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped
    rules = struct.pack("3Q", files, 3 if abi > 3 else 0, 3 if abi > 5 else 0)[: 8 * (1 + (abi > 3) + (abi > 5))]
    ruleset = _check(_libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0), "landlock_create_ruleset")
    execute, write, read, read_folder = 1, 2, 4, 8
    granted = [(path, execute | read | read_folder) for path in readable] + [(path, write | read) for path in devices]
    for path, access in granted:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= ~read_folder
        # struct landlock_path_beneath_attr, packed: allowed_access, parent_fd
        rule = struct.pack("=Qi", access, fd)
        _check(_libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule({path})")
        os.close(fd)
    _check(_libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def restrict_calls() -> None:
    """Give up the system calls above for good: no other process, no socket but a connected pair, no mount (seccomp).

    After no_new_privs. The calling process may signal and limit itself, and start threads. Raises OSError.
    """
    program = _program(os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))  # struct sock_fprog
    _check(_libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "prctl(PR_SET_SECCOMP)")


def _program(pid: int) -> list[tuple[int, int, int, int]]:
    """The filter's steps: code, jump if true, jump if false, operand; a jump counts the steps it passes over."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    number = {name: call for name, columns in _CALLS.items() if (call := columns[column]) is not None}
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, len(_COMMON) + 2, _FIRST_COMMON),
        *((_EQUAL, len(_COMMON) - index, 0, call) for index, call in enumerate(_COMMON)),
        (_RETURN, 0, 0, _UNKNOWN),  # x86_64's second table of calls, from 2**30 on, ends here too
        (_RETURN, 0, 0, _ALLOW),
    ]
    for name, call in number.items():
        if name not in _CONDITIONAL:
            steps += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _REFUSE)]
    call = number["socketpair"]  # pairs of Unix sockets alone: other families load modules of the kernel
    steps += [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, socket.AF_UNIX), (_RETURN, 0, 0, _REFUSE)]
    steps += [(_LOAD, 0, 0, 0)]
    own = (0, pid)
    argument_and_values = {"kill": (0, (pid,)), "tgkill": (0, own), "prlimit64": (0, own), "socketpair": (1, _STREAMS)}
    for name, (argument, values) in argument_and_values.items():
        steps += _when(number[name], argument, values, then=_ALLOW, otherwise=_REFUSE)
    refused = {
        "prctl": (0, (PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER)),
        "fcntl": (1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals sent by the kernel
        "ioctl": (1, (0x8901, 0x8902, 0x5412)),  # FIOSETOWN, SIOCSPGRP; TIOCSTI types on a terminal
    }
    for name, (argument, values) in refused.items():
        steps += _when(number[name], argument, values, then=_REFUSE, otherwise=_ALLOW)
    thread = [(_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    return [*steps, (_EQUAL, 0, len(thread), number["clone"]), *thread, (_RETURN, 0, 0, _ALLOW)]


def _when(
    call: int, argument: int, values: Sequence[int], *, then: int, otherwise: int
) -> list[tuple[int, int, int, int]]:
    """For this call, `then` where the low half of an argument is one of the values, else `otherwise`."""
    low = 16 + 8 * argument  # little-endian, in struct seccomp_data
    tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    body = [(_LOAD, 0, 0, low), *tests, (_RETURN, 0, 0, otherwise), (_RETURN, 0, 0, then)]
    return [(_EQUAL, 0, len(body), call), *body]


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result

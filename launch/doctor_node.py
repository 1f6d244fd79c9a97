"""What one machine is: gathered on the spot, here or in a Ray task, and sent as plain values."""

import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from ipaddress import IPv6Address, ip_address
from pathlib import Path

PACKAGES = ("torch", "triton", "ray", "deepspeed", "transformers")
ASK_S = 20.0  # for the driver's own tool


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node. Sizes in bytes; versions None where a package is missing."""

    name: str
    python: str
    packages: dict[str, str | None]
    driver: str | None  # of NVIDIA's GPUs; None without any
    gpus: tuple[str, ...]
    memory: int
    shm_total: int
    shm_free: int
    open_files: tuple[int, int]  # soft and hard limit of file descriptors
    listening: tuple[str, ...]  # "PROGRAM ADDRESS:PORT" of this user's, beyond loopback
    ray_auth: str  # RAY_AUTH_MODE
    uncompiled: tuple[str, ...] = ()  # of the packages, those whose bytecode is not kept, and cannot be


def gather() -> NodeFacts:
    """The facts of the machine this runs on."""
    gpus, driver = _nvidia()
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return NodeFacts(
        name=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        driver=driver,
        gpus=gpus,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        shm_total=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        listening=_listening(),
        ray_auth=os.environ.get("RAY_AUTH_MODE", ""),
        uncompiled=tuple(name for name in PACKAGES if _is_uncompiled(name)),
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_uncompiled(package: str) -> bool:
    """Whether every process that imports the package compiles it anew."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return False
    kept = Path(importlib.util.cache_from_source(found.origin))
    return not kept.exists() and (sys.dont_write_bytecode or not os.access(existing(kept), os.W_OK))


def _nvidia() -> tuple[tuple[str, ...], str | None]:
    """Names of the GPUs and the driver's version."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=ASK_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return (), None
    rows = [line.rsplit(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        return (), None
    return tuple(name for name, _ in rows), rows[0][1].strip()


def _listening() -> tuple[str, ...]:
    """TCP sockets of this user's processes that other machines can reach."""
    import psutil  # type: ignore[import-untyped]

    found = set()
    for process in psutil.process_iter(["pid", "name", "uids"]):
        uids = process.info["uids"]
        if uids is None or uids.real != os.getuid():
            continue
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        for one in connections:
            if one.status == psutil.CONN_LISTEN and not _is_loopback(one.laddr.ip):
                found.add(f"{process.info['name']} {one.laddr.ip}:{one.laddr.port}")
    return tuple(sorted(found))


def _is_loopback(text: str) -> bool:
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback

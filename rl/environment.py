"""Where and from what a run was started: versions, platform, commit, command line."""

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.redact import redact

_PACKAGES = ("paceline", "torch", "transformers", "deepspeed", "ray", "triton", "numpy", "reasoning-gym", "math-verify")


def environment() -> dict[str, Any]:
    """Versions, platform, commit and command line; secrets and environment variables left out."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": [redact(argument) for argument in sys.argv],
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout this code runs from, marked where files differ from it; None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None

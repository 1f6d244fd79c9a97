"""The cell's first steps, as __main__ of an archive: into the sandbox, then to work.

Under bubblewrap one process does both. Under Landlock a first one gives up files and user, and starts Python again
through descriptors: its new user need not be able to reach the folders by name (Python often lives under /root).
Standard library only.
"""

import json
import os
import resource
import sys
from typing import Any, NoReturn

from rl import lockdown
from rl.forkserver import Terms, serve

SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def main() -> None:
    """argv[1] holds the options of rl.cell as JSON."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    if options["step"] == "restrict":
        _restrict(options)
    _work(options)


def _restrict(options: dict[str, Any]) -> NoReturn:
    """Give up files, user and capabilities, and go on in a new interpreter."""
    readable = [options["home"], *options["packages"]]
    folders = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in readable]
    for fd in folders:
        os.set_inheritable(fd, True)
    home, *packages = (f"/proc/self/fd/{fd}" for fd in folders)
    os.chdir("/")
    lockdown.shield()
    lockdown.restrict_files([*SYSTEM, *readable], DEVICES)
    lockdown.become(options["uid"])
    python = os.path.join(home, options["python"])
    environment = os.environ | {
        "PYTHONHOME": home,
        "PYTHONPATH": os.pathsep.join(packages),
        "LD_LIBRARY_PATH": os.path.join(home, "lib"),
    }
    options |= {"step": "work", "keep": folders}
    os.execve(python, [python, "-S", sys.argv[0], json.dumps(options)], environment)


def _work(options: dict[str, Any]) -> None:
    locked = options["kind"] != "none"
    if locked:
        lockdown.become(options["uid"])
        lockdown.shield()
        if lockdown.has_capabilities():
            sys.exit("the sandbox's process could not give its capabilities up")
    if os.getpid() != 1:  # the first process of a PID namespace ends with bubblewrap
        lockdown.die_with_parent(options["parent"])
    memory = options["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(options["fd"], Terms(locked=locked, tasks=options["tasks"], keep=tuple(options["keep"])))

"""Runs the command again and again in processes forked from this one, which has imported what takes long.

A request a line on stdin, JSON: args, env, cwd, out and err (paths for stdout and stderr, which may be the same),
timeout_s. The answer a line on stdout: {"code"}, negative for a signal, null where the time was over.
"""

import json
import os
import signal
import sys
import time

for module in ("deepspeed", "launch.cluster", "pyarrow.parquet", "rich.live"):
    __import__(module)

from launch.cli import main  # noqa: E402  # deepspeed first: it looks for accelerators aloud


def become(request: dict[str, object]) -> None:
    """The child: the command, with this request's environment and outputs."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = sys.orig_argv = ["paceline", *request["args"]]
    main()


def serve() -> bool:
    """Answer until stdin ends; True in a child that has to become the command."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        deadline = time.monotonic() + request["timeout_s"]
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.005)
        if not ended[0]:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(ended[1]) if ended[0] else None}), flush=True)
    return False


if __name__ == "__main__":
    print("ready", flush=True)
    serve()

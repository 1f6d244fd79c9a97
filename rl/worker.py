"""Inside a reward worker: limits first, then the functions, then one answer a request.

Frames on the socket are a 4-byte big-endian length and JSON. First comes {"config"}, answered by {"ready"} or
{"error"}; then {"function", "prompt", "rollout"}, answered by {"value"} or {"kind", "error"}.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import traceback
from typing import Any

from configs.errors import ConfigError
from configs.faults import arm, hit
from configs.schema import RewardConfig
from rollout.types import Prompt, Rollout, SpecStats

PR_SET_PDEATHSIG = 1
MAX_ERROR_CHARS = 500


def main(fd: int, parent_pid: int) -> None:
    """Serve until the driver closes the socket or dies."""
    _die_with(parent_pid)
    arm(process="reward")
    with socket.socket(fileno=fd) as channel:
        request = _receive(channel)
        if request is None:
            return
        config = RewardConfig(**request["config"])
        memory = config.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from rl.reward import build_rewards  # under the memory limit: it runs the user's imports

        try:
            functions = build_rewards(config)
        except ConfigError as error:
            _send(channel, {"error": str(error)})
            return
        _send(channel, {"ready": True})
        while (request := _receive(channel)) is not None:
            prompt, rollout = Prompt(**request["prompt"]), _rollout(request["rollout"])
            try:
                hit("reward.call")
                reply: dict[str, Any] = {"value": functions[request["function"]](prompt, rollout)}
            # a reward may raise anything; the driver decides what follows
            except Exception as error:
                text = traceback.format_exception_only(error)[-1].strip()
                reply = {"kind": type(error).__name__, "error": text[:MAX_ERROR_CHARS]}
            _send(channel, reply)


def _die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends, by whatever signal (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def _rollout(fields: dict[str, Any]) -> Rollout:
    spans = [(version, count) for version, count in fields["version_spans"]]
    return Rollout(**{**fields, "version_spans": spans, "spec": SpecStats(**fields["spec"])})


def _receive(channel: socket.socket) -> Any:
    """The next frame; None at the end of the stream."""
    header = channel.recv(4, socket.MSG_WAITALL)
    if len(header) < 4:
        return None
    (length,) = struct.unpack(">I", header)
    data = channel.recv(length, socket.MSG_WAITALL)
    return json.loads(data) if len(data) == length else None


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    channel.sendall(struct.pack(">I", len(data)) + data)

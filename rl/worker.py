"""Inside a reward worker: limits first, then the functions, then one answer a request.

First comes {"config"}, answered by {"ready"} or
{"error"}; then {"function", "prompt", "rollout"}, answered by {"value"} or {"kind", "error"}.
"""

import resource
import socket
import traceback
from typing import Any

from configs.errors import PacelineError
from configs.faults import arm, hit
from configs.schema import RewardConfig
from rl.frames import receive, send
from rl.lockdown import die_with_parent
from rollout.types import Prompt, Rollout, SpecStats

MAX_ERROR_CHARS = 500


def main(fd: int, parent_pid: int) -> None:
    """Serve until the driver closes the socket or dies."""
    die_with_parent(parent_pid)
    arm(process="reward")
    with socket.socket(fileno=fd) as channel:
        request = receive(channel)
        if request is None:
            return
        config = RewardConfig(**request["config"])
        memory = config.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from rl.reward import build_rewards  # under the memory limit: it runs the user's imports

        try:
            functions = build_rewards(config)
        except PacelineError as error:
            send(channel, {"error": str(error)})
            return
        send(channel, {"ready": True})
        while (request := receive(channel)) is not None:
            prompt, rollout = Prompt(**request["prompt"]), _rollout(request["rollout"])
            try:
                hit("reward.call")
                reply: dict[str, Any] = {"value": functions[request["function"]](prompt, rollout)}
            # a reward may raise anything; the driver decides what follows
            except Exception as error:
                text = traceback.format_exception_only(error)[-1].strip()
                reply = {"kind": type(error).__name__, "error": text[:MAX_ERROR_CHARS]}
            send(channel, reply)


def _rollout(fields: dict[str, Any]) -> Rollout:
    spans = [(version, count) for version, count in fields["version_spans"]]
    return Rollout(**{**fields, "version_spans": spans, "spec": SpecStats(**fields["spec"])})

"""A job for a Ray cluster that is there already: one `ray job submit`."""

import json
import shlex
from dataclasses import dataclass
from urllib.parse import urlsplit

from configs.errors import ConfigError
from launch.render.plan import LaunchPlan
from launch.render.shell import assignments, body, recipe_file

LOOPBACK = ("localhost", "127.0.0.1", "::1")
STOP_S = 300  # for `ray job stop`: a step and a checkpoint must fit


@dataclass(frozen=True, slots=True)
class RayJob:
    """Where the cluster answers: the address of its dashboard, as http://127.0.0.1:8265."""

    address: str


def entrypoint(plan: LaunchPlan) -> list[str]:
    """What the cluster runs on its head, whole in itself: the recipe is in it."""
    script = "\n".join(["set -euo pipefail", assignments(plan), recipe_file(plan), body("train.sh")])
    return ["bash", "-c", script]


def submission_id(plan: LaunchPlan) -> str:
    """The job's name: of the run directory, so that what runs already is not started twice."""
    return f"{plan.name}-{plan.run_dir.name}"


def command(plan: LaunchPlan, job: RayJob) -> list[str]:
    """The `ray job submit` that sends it. Raises ConfigError for an address that is none."""
    parts = urlsplit(job.address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--address {job.address!r} is not the address of a Ray dashboard, as http://127.0.0.1:8265")
    runtime_env = {"env_vars": dict(plan.env) | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
    return [
        *("ray", "job", "submit", "--no-wait"),
        f"--address={job.address}",
        f"--submission-id={submission_id(plan)}",
        f"--runtime-env-json={json.dumps(runtime_env)}",
        "--",
        *entrypoint(plan),
    ]


def render(plan: LaunchPlan, job: RayJob) -> str:
    """The submission as a script; Ray reads the token from RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    exports = "export RAY_AUTH_MODE=token"
    return "\n".join(["#!/usr/bin/env bash", "set -euo pipefail", exports, shlex.join(command(plan, job)), ""])


def notes(job: RayJob) -> list[str]:
    """What is to be known of the way the token takes."""
    parts = urlsplit(job.address)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        return [
            f"--address {job.address} is not encrypted: the token crosses the network as it is. Use a trusted network, "
            "an ssh tunnel or `kubectl port-forward` to 127.0.0.1, or https"
        ]
    return []

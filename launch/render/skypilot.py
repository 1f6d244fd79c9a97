"""A SkyPilot task: https://docs.skypilot.co/en/latest/reference/yaml-spec.html"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from configs.errors import ConfigError
from launch.render.documents import documents
from launch.render.plan import LaunchPlan
from launch.render.shell import assignments, body, recipe_file, size

MOUNT = PurePosixPath("/paceline")  # where the storage is, on every node
RESUMABLE = 75


@dataclass(frozen=True, slots=True)
class SkyPilot:
    """What SkyPilot is asked for beyond the plan; "" leaves it to SkyPilot."""

    gpu: str = ""  # as SkyPilot calls it: H100, A100-80GB
    infra: str = ""  # cloud[/region[/zone]], k8s/CONTEXT
    storage: str = ""  # a SkyPilot volume; object stores do not rename, and so keep no checkpoint


def render(plan: LaunchPlan, sky: SkyPilot) -> str:
    """The task for `sky launch`. Raises ConfigError where something it needs was not said."""
    if plan.gpus_per_node and not sky.gpu:
        raise ConfigError(f"--on skypilot --gpus-per-node {plan.gpus_per_node} needs --gpu, as --gpu H100")
    if plan.nodes > 1 and not sky.storage:
        raise ConfigError(f"--on skypilot --nodes {plan.nodes} needs --storage: a volume that every node mounts")
    if not plan.run_dir.is_relative_to(MOUNT):
        raise ConfigError(f"run.dir={plan.run_dir} is not under {MOUNT}, the storage's place; set run.dir=runs/NAME")
    resources: dict[str, Any] = {"cpus": f"{plan.cpus_per_node}+"}
    if plan.memory_gb:
        resources["memory"] = f"{plan.memory_gb}+"
    if plan.gpus_per_node:
        resources["accelerators"] = {sky.gpu: plan.gpus_per_node}
    if sky.infra:
        resources["infra"] = sky.infra
    if plan.image:
        resources["image_id"] = f"docker:{plan.image}"
    # `sky jobs launch` starts it again when it was told to stop and has saved
    resources["job_recovery"] = {"recover_on_exit_codes": [RESUMABLE]}
    task: dict[str, Any] = {
        "name": plan.name,
        "num_nodes": plan.nodes,
        "resources": resources,
        "secrets": {"RAY_AUTH_TOKEN": None},  # given when it is launched, the same to all nodes, redacted in logs
    }
    if sky.storage:
        task["volumes"] = {str(MOUNT): sky.storage}
    task["run"] = "\n".join(
        ["set -euo pipefail", assignments(plan), size(plan), recipe_file(plan), body("skypilot.sh")]
    )
    token = "RAY_AUTH_TOKEN=$(openssl rand -hex 32)"
    return documents(
        task, comments=[f"Submit with: {token} sky launch --secret RAY_AUTH_TOKEN --cluster {plan.name} FILE"]
    )

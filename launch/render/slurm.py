"""One sbatch script: a Ray head, its workers, and the training that runs on them."""

from dataclasses import dataclass

from launch.render.plan import LaunchPlan
from launch.render.shell import assignments, body, recipe_file, size

GRACE_S = 300  # before the time limit the run is asked to save; a step and a checkpoint must fit


@dataclass(frozen=True, slots=True)
class Slurm:
    """What Slurm is asked for beyond the plan; "" leaves it to the cluster's defaults."""

    partition: str = ""
    account: str = ""
    qos: str = ""


def render(plan: LaunchPlan, slurm: Slurm) -> str:
    """The script for `sbatch`, whole in itself: the recipe is in it."""
    asked = {
        "job-name": plan.name,
        "nodes": plan.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": plan.cpus_per_node,
        "gpus-per-node": plan.gpus_per_node or None,
        "mem": f"{plan.memory_gb}G" if plan.memory_gb else None,
        "time": _clock(plan.time_s) if plan.time_s else None,
        "partition": slurm.partition or None,
        "account": slurm.account or None,
        "qos": slurm.qos or None,
        "output": f"{plan.state_dir}/slurm-%j.log",
        "open-mode": "append",  # a job that was requeued goes on in its log
        "signal": f"B:TERM@{GRACE_S}",
    }
    # the log's folder must be there when the job starts, or Slurm fails it without a word
    head = [
        "#!/usr/bin/env bash",
        f"# Submit with: mkdir -p {plan.state_dir} && sbatch FILE",
        *(f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None),
        "#SBATCH --requeue",
        "",
        "set -euo pipefail",
        "umask 077",
    ]
    return "\n".join([*head, assignments(plan), size(plan), recipe_file(plan), body("slurm.sh")])


def _clock(seconds: int) -> str:
    """Slurm's D-HH:MM:SS."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02}:{minutes:02}:{rest:02}"

"""The targets: what each is given, what is rendered for it, how it is submitted and followed."""

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import ConfigError, PreflightError
from launch.render import kuberay, rayjob, skypilot, slurm
from launch.render.plan import LaunchPlan

Target = Literal["local", "ray-job", "slurm", "kuberay", "skypilot"]

# Options beyond nodes and GPUs, and the targets that have a use for them.
USES: dict[str, tuple[Target, ...]] = {
    "cpus-per-node": ("slurm", "kuberay", "skypilot"),
    "setup": ("ray-job", "slurm", "kuberay", "skypilot"),
    "address": ("ray-job",),
    "partition": ("slurm",),
    "account": ("slurm",),
    "qos": ("slurm",),
    "namespace": ("kuberay",),
    "storage": ("kuberay", "skypilot"),
    "image": ("kuberay", "skypilot"),
    "gpu": ("skypilot",),
    "infra": ("skypilot",),
    "time": ("slurm", "kuberay"),
    "memory-gb": ("slurm", "kuberay", "skypilot"),
    "out": ("ray-job", "slurm", "kuberay", "skypilot"),
}
TOOLS: dict[Target, tuple[str, str]] = {
    "slurm": ("sbatch", "run this on a login node of the cluster"),
    "kuberay": ("kubectl", "install kubectl and point it at the cluster"),
    "skypilot": ("sky", "pip install skypilot, in an environment of its own"),
    "ray-job": ("ray", "install ray[default]"),
}
ANSWER_S = 300.0  # for a tool that hands over a file
PROVISION_S = 7200.0  # for sky, which waits for machines


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a target is sent, what it should be called as a file, and what the user should know."""

    text: str
    suffix: str
    notes: tuple[str, ...] = ()


def render(target: Target, plan: LaunchPlan, options: Mapping[str, str]) -> Rendered:
    """The plan in the target's language. Raises ConfigError for an option that is missing or means nothing there."""
    check_options(target, options)
    match target:
        case "slurm":
            asked = slurm.Slurm(
                partition=options.get("partition", ""), account=options.get("account", ""), qos=options.get("qos", "")
            )
            return Rendered(slurm.render(plan, asked), ".sbatch")
        case "kuberay":
            kube = kuberay.KubeRay(storage=options.get("storage", ""), namespace=options.get("namespace") or "default")
            return Rendered(kuberay.render(plan, kube), ".yaml")
        case "skypilot":
            sky = skypilot.SkyPilot(
                gpu=options.get("gpu", ""), infra=options.get("infra", ""), storage=options.get("storage", "")
            )
            kept = () if sky.storage else ("without --storage the run ends with its machine; copy what you keep",)
            return Rendered(skypilot.render(plan, sky), ".yaml", kept)
        case "ray-job":
            job = rayjob.RayJob(options.get("address") or os.environ.get("RAY_API_SERVER_ADDRESS", ""))
            return Rendered(rayjob.render(plan, job), ".sh", tuple(rayjob.notes(job)))
        case "local":
            raise AssertionError("a local run is not rendered")


def check_options(target: Target, options: Mapping[str, str]) -> None:
    """Raise ConfigError for an option that was given and means nothing there."""
    for name, value in options.items():
        if value and target not in USES[name]:
            raise ConfigError(f"--{name} {value}: --on {target} has no use for it; it is for {', '.join(USES[name])}")


def submit(target: Target, plan: LaunchPlan, path: Path, options: Mapping[str, str]) -> list[str]:
    """Hand the rendered file to the target's own tool; the lines that say its id and how to follow it.

    Raises PreflightError where the tool is missing, or what it says where it refuses.
    """
    tool, remedy = TOOLS[target]
    if shutil.which(tool) is None:
        raise PreflightError(f"--on {target} needs `{tool}`, which is not on PATH; {remedy}, or use --dry-run")
    match target:
        case "slurm":
            with_state = Path(plan.state_dir)
            try:
                with_state.mkdir(parents=True, exist_ok=True)  # Slurm fails a job whose log has no folder
            except OSError as error:
                raise PreflightError(f"cannot make {with_state} ({error.strerror}); set another run.dir") from error
            job = _run(["sbatch", "--parsable", str(path)]).partition(";")[0]
            return [
                f"Slurm job {job}",
                f"follow: tail -F {plan.state_dir}/slurm-{job}.log; squeue -j {job}; paceline status {plan.run_dir}",
                f"done when {plan.state_dir}/SUCCESS is there",
                f"scancel {job} ends it; scancel --signal=TERM --batch {job} saves first, and queues it again",
            ]
        case "kuberay":
            space = options.get("namespace") or "default"
            _check_claim(options["storage"], space, nodes=plan.nodes)
            _run(["kubectl", "apply", "-f", str(path)])
            return [
                f"RayJob {space}/{plan.name}",
                f"follow: kubectl -n {space} get rayjob {plan.name} -w; "
                f"kubectl -n {space} logs -f -l job-name={plan.name}",
            ]
        case "skypilot":
            token = {"RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)}
            flags = ["--yes", "--detach-run", "--down", "--secret", "RAY_AUTH_TOKEN", "--cluster", plan.name]
            _run(["sky", "launch", *flags, str(path)], env=os.environ | token)
            return [f"SkyPilot cluster {plan.name}", f"follow: sky logs {plan.name}; stop: sky down {plan.name}"]
        case "ray-job":
            _check_token()
            _run(["bash", str(path)])
            job = rayjob.submission_id(plan)
            address = options.get("address") or os.environ.get("RAY_API_SERVER_ADDRESS", "")
            return [f"Ray job {job}", f"follow: RAY_AUTH_MODE=token ray job logs --address={address} --follow {job}"]
        case "local":
            raise AssertionError("a local run is not submitted")


def _run(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """What a tool prints. Raises PreflightError with its own last words, or where it takes too long."""
    limit_s = PROVISION_S if command[0] == "sky" else ANSWER_S
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise PreflightError(
            f"{command[0]} has not ended for {limit_s:g} s; see whether what it asks is up, and whether the run began"
        ) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise PreflightError(f"{command[0]} ended with code {done.returncode}: {' '.join(said[-3:])}")
    return done.stdout.strip()


def _check_claim(name: str, namespace: str, *, nodes: int) -> None:
    """Raises PreflightError unless the claim is there and as many nodes as needed may write it."""
    modes = _run(["kubectl", "-n", namespace, "get", "pvc", name, "-o", "jsonpath={.spec.accessModes[*]}"]).split()
    if nodes > 1 and "ReadWriteMany" not in modes:
        raise PreflightError(
            f"--storage {name} is {' '.join(modes) or 'of no access mode'}; {nodes} nodes need ReadWriteMany"
        )


def _check_token() -> None:
    """Raises PreflightError where Ray would find no token to send."""
    own = Path("~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or own.is_file():
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named and Path(named).is_file() and re.search(r"\S", Path(named).read_text(encoding="utf-8")):
        return
    raise PreflightError(
        f"no Ray token: set RAY_AUTH_TOKEN_PATH to the file of the cluster's token, or put it into {own}"
    )

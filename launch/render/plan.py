"""What is launched: one frozen value that every target renders in its own language."""

import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from configs.errors import ConfigError, PreflightError
from configs.load import parse, read_recipe
from configs.schema import Config

# Folders of these vanish with the machine or its memory; a run kept there cannot be gone on with.
_PASSING = {"tmpfs", "ramfs", "overlay"}
_SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "ceph",
    "beegfs",
    "cifs",
    "glusterfs",
    "wekafs",
    "fuse.juicefs",
    "9p",
    "virtiofs",
}
_NAME_LENGTH = 40  # a RayJob's name may have 47 characters, of which a retry's suffix takes its share


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A run on `nodes` equal machines: what it computes, on what, and where it leaves what it makes.

    No token is part of it: each target makes one, or is given one, where the run begins.
    """

    name: str  # letters, digits and dashes: what job, script and manifest are called
    recipe: str  # the YAML text as the user wrote it
    overrides: tuple[str, ...]  # the user's, and those that follow from the size
    run_dir: PurePosixPath  # absolute, as the nodes see it
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_gb: int | None  # a node; None leaves it to the target
    time_s: int | None  # None leaves it to the target
    image: str  # "" where the target has none
    setup: str  # a line of bash that makes `paceline` and `ray` commands of every node
    env: tuple[tuple[str, str], ...]  # nothing secret: it is written into scripts and manifests
    ray_version: str

    @property
    def state_dir(self) -> PurePosixPath:
        """Beside the run directory, which `paceline train` wants empty: recipe, success file, logs of the target."""
        return self.run_dir.with_name(self.run_dir.name + ".launch")


def make_plan(
    config: str,
    overrides: Sequence[str],
    *,
    nodes: int = 1,
    gpus_per_node: int = 0,
    cpus_per_node: int = 0,
    memory_gb: int | None = None,
    time_limit: str = "",
    image: str = "",
    setup: str = "",
    env: Mapping[str, str] | None = None,
    root: PurePosixPath | None = None,
) -> LaunchPlan:
    """The plan of a recipe on so many nodes. Raises ConfigError, as `paceline train` would, before anything is sent.

    root: where a relative run.dir begins; None means the working directory. Workers are Ray's, one a GPU
    (one a node without GPUs), unless an override says how many. cpus_per_node: 0 means eight a GPU; without GPUs, one
    a worker and one for the driver.
    """
    if cpus_per_node < 0:
        raise ConfigError(f"--cpus-per-node {cpus_per_node}: give none, or a number from 1 up")
    text = read_recipe(Path(config))
    sized = spread(text, overrides, origin=config, nodes=nodes, gpus_per_node=gpus_per_node)
    parsed = parse(text, sized, origin=config)
    workers = _workers(parsed)
    place = _run_dir(parsed, root)
    return LaunchPlan(
        name=_label(parsed.run.name),
        recipe=text if text.endswith("\n") else text + "\n",
        overrides=(*(one for one in sized if not one.startswith("run.dir=")), f"run.dir={place}"),
        run_dir=place,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node or (8 * gpus_per_node or 1 + -(-workers // nodes)),
        memory_gb=memory_gb,
        time_s=seconds(time_limit) if time_limit else None,
        image=image,
        setup=setup,
        env=tuple(sorted((env or {}).items())),
        ray_version=metadata.version("ray"),
    )


def seconds(text: str) -> int:
    """Seconds in 30m, 12h, 2d, or Slurm's [D-]HH:MM:SS. Raises ConfigError."""
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        total = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        total = days * 86400 + hours * 3600 + minutes * 60 + rest
    else:
        total = 0
    if total < 60:
        raise ConfigError(f"--time {text!r} is not a time of a minute or more, as 30m, 12h, 2d or 1-12:00:00")
    return total


def here() -> str:
    """The line of bash that finds the programs of this environment, on nodes that see the same file system."""
    return f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH"


def storage_notes(plan: LaunchPlan, mounts: str) -> list[str]:
    """What is to be known of the run directory's storage, as far as this machine can tell; mounts: /proc/mounts.

    Raises PreflightError where several nodes would each write into their own memory.
    """
    kind, point = _file_system(plan.run_dir, mounts)
    if kind in _PASSING and plan.nodes > 1:
        raise PreflightError(
            f"run.dir={plan.run_dir} is on {kind} ({point}), which other nodes cannot see; set run.dir to a folder on "
            "shared storage (NFS, Lustre, ...)"
        )
    if plan.nodes > 1 and kind not in _SHARED:
        return [
            f"{plan.nodes} nodes must all see run.dir={plan.run_dir}, which here is on {kind} ({point}), not known to "
            "be shared; every node looks for the head's files when the job starts, and ends it where they are missing"
        ]
    return []


def path_notes(plan: LaunchPlan, *, shares_files: bool) -> list[str]:
    """Paths in the configuration that another machine may not have."""
    parsed = parse(plan.recipe, plan.overrides)
    named = {"model": parsed.model, "drafter.init": parsed.drafter.init}
    if parsed.data.source == "file":
        named["data.name"] = parsed.data.name
    notes = []
    for key, value in named.items():
        local = bool(value) and Path(value).expanduser().exists()
        if local and not shares_files:
            notes.append(
                f"{key}={value} is a path of this machine; the nodes need it at that path too, or in the image"
            )
        elif local and not Path(value).is_absolute():
            notes.append(f"{key}={value} is relative; the job starts in {os.getcwd()}")
    return notes


def spread(text: str, overrides: Sequence[str], *, origin: str, nodes: int, gpus_per_node: int) -> list[str]:
    """The overrides, and those that spread the recipe over all GPUs, or nodes; what the user's own say stays.

    Raises ConfigError where these ask for more workers than there are GPUs.
    """
    if nodes < 1 or gpus_per_node < 0:
        raise ConfigError(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: at least one node, and no negative number of GPUs"
        )
    places = nodes * max(gpus_per_node, 1)
    own = {override.partition("=")[0] for override in overrides}
    sized = list(overrides)
    if "compute.backend" not in own:
        sized.append("compute.backend=ray")
    compute = parse(text, sized, origin=origin).compute
    if "compute.workers" not in own:
        training = places - compute.rollout_workers if compute.placement == "separate" else places
        sized.append(f"compute.workers={max(training, 1)}")
    parsed = parse(text, sized, origin=origin)
    workers = _workers(parsed)
    if gpus_per_node and workers > places:
        raise ConfigError(
            f"{workers} workers (compute.workers={parsed.compute.workers}, compute.placement="
            f"{parsed.compute.placement}) exceed --nodes {nodes} x "
            f"--gpus-per-node {gpus_per_node}; take fewer, or ask for more"
        )
    if gpus_per_node and parsed.rollout.tensor_parallel > gpus_per_node:
        raise ConfigError(
            f"rollout.tensor_parallel={parsed.rollout.tensor_parallel} exceeds --gpus-per-node {gpus_per_node}, and"
            " what shares an engine is on one node; take fewer, or larger nodes"
        )
    return sized


def _workers(config: Config) -> int:
    """Workers that train, and those that only sample."""
    compute = config.compute
    return compute.workers + (compute.rollout_workers if compute.placement == "separate" else 0)


def _run_dir(config: Config, root: PurePosixPath | None) -> PurePosixPath:
    """Where the run writes: chosen now, so that every attempt of the job finds it again."""
    root = PurePosixPath(os.getcwd()) if root is None else root
    chosen = config.run.dir or f"runs/{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = root / (os.path.expanduser(chosen) if chosen.startswith("~") else chosen)
    if re.search(r"[\x00-\x1f]", str(path)):
        raise ConfigError(f"run.dir={str(path)!r} has control characters; choose another")
    return PurePosixPath(os.path.normpath(path))


def _label(name: str) -> str:
    """The name in the characters that every target takes, starting with a letter."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:_NAME_LENGTH].rstrip("-")


def _file_system(path: PurePosixPath, mounts: str) -> tuple[str, str]:
    """Type and mount point of the file system that a path lies on or would lie on."""
    points = [line.split()[1:3] for line in mounts.splitlines() if len(line.split()) >= 3]
    resolved = PurePosixPath(os.path.realpath(path))
    inside = [(point, kind) for point, kind in points if resolved.is_relative_to(point)]
    assert inside, f"{path} is on no file system, not even on /"
    point, kind = max(reversed(inside), key=lambda entry: len(entry[0]))
    return kind, point

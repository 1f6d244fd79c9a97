"""`paceline launch`: a recipe on this machine or on a cluster."""

import os
import shlex
import sys
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import typer

from configs.errors import ConfigError, StorageError

MOUNTED = PurePosixPath("/paceline")  # where targets that mount a storage have it


def launch(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A .yaml file, or the name of a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Keys to set.")] = None,
    on: Annotated[Literal["local", "ray-job", "slurm", "kuberay", "skypilot"], typer.Option(help="Where.")] = "local",
    nodes: Annotated[int, typer.Option(help="Machines, all alike.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="One worker each; 0 computes on CPUs, one worker a node.")] = 0,
    cpus_per_node: Annotated[int, typer.Option(help="0: eight a GPU; without GPUs, one a worker and one more.")] = 0,
    memory_gb: Annotated[int | None, typer.Option(min=1, help="Of a node.")] = None,
    time: Annotated[str, typer.Option(help="Time limit, as 12h (slurm, kuberay).")] = "",
    setup: Annotated[str, typer.Option(help="A line of bash that finds paceline and ray on a node.")] = "",
    image: Annotated[str, typer.Option(help="Container image (kuberay, skypilot).")] = "",
    storage: Annotated[str, typer.Option(help="Volume of the run directory (kuberay, skypilot).")] = "",
    partition: Annotated[str, typer.Option(help="(slurm)")] = "",
    account: Annotated[str, typer.Option(help="(slurm)")] = "",
    qos: Annotated[str, typer.Option(help="(slurm)")] = "",
    namespace: Annotated[str, typer.Option(help="(kuberay)")] = "",
    gpu: Annotated[str, typer.Option(help="Kind of GPU, as H100 (skypilot).")] = "",
    infra: Annotated[str, typer.Option(help="CLOUD, CLOUD/REGION, CLOUD/REGION/ZONE or k8s/CONTEXT (skypilot).")] = "",
    address: Annotated[str, typer.Option(help="Ray dashboard, as http://127.0.0.1:8265 (ray-job).")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what is sent here.")] = None,
) -> None:
    """Start a run here, on a Ray cluster, or through Slurm, KubeRay or SkyPilot."""
    from launch.cli import ENVIRONMENT
    from launch.render import targets
    from launch.render.plan import here, make_plan, path_notes, storage_notes

    options = {
        "address": address, "partition": partition, "account": account, "qos": qos, "namespace": namespace,
        "storage": storage, "image": image, "gpu": gpu, "infra": infra, "time": time,
        "memory-gb": str(memory_gb or ""), "cpus-per-node": str(cpus_per_node or ""), "setup": setup,
    }  # fmt: skip
    if on == "local":
        targets.check_options(on, options | ({"out": str(out)} if out else {}))
        _local(config, list(overrides or []), nodes, gpus_per_node, dry_run=dry_run)
        return
    shares_files = on == "slurm"
    plan = make_plan(
        config,
        list(overrides or []),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        memory_gb=memory_gb,
        time_limit=time,
        image=image,
        setup=setup or (here() if shares_files else ""),
        env=ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0"},
        root=MOUNTED if on in ("kuberay", "skypilot") else None,
    )
    rendered = targets.render(on, plan, options)
    notes = [*rendered.notes, *path_notes(plan, shares_files=shares_files)]
    if shares_files:
        notes += storage_notes(plan, Path("/proc/mounts").read_text(encoding="utf-8"))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run and out is None:
        print(rendered.text, end="")
        return
    path = out or Path(f"{plan.name}{rendered.suffix}")
    try:
        path.write_text(rendered.text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; name another file with --out") from error
    print(f"wrote {path}")
    if not dry_run:
        print("\n".join(targets.submit(on, plan, path, options)))


def _local(config: str, overrides: list[str], nodes: int, gpus_per_node: int, *, dry_run: bool) -> None:
    """Train in this process: `paceline train`, with a Ray worker a GPU where there are several."""
    from configs.load import parse, read_recipe
    from launch.render.plan import spread

    if nodes != 1:
        raise ConfigError(f"--on local is one machine, not --nodes {nodes}; choose another --on")
    text = read_recipe(Path(config))
    if gpus_per_node not in (0, 1):  # one process needs no Ray
        overrides = spread(text, overrides, origin=config, nodes=nodes, gpus_per_node=gpus_per_node)
    if dry_run:
        parse(text, overrides, origin=config)
        print(shlex.join(["paceline", "train", config, *overrides]))
        return
    from launch.cli import train

    os.environ.pop("RAY_ADDRESS", None)  # local: a cluster of its own, with a token of its own
    train(config, overrides)

"""One recipe, unchanged but for its size: on one worker, on two that both train and sample, on one that does each.

Every arm is a `paceline train` of its own, with the same seed. What they sample, and what becomes of the policy, should
not tell them apart; how long they take does.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, PreflightError, ResourceError
from configs.load import dump
from configs.schema import Config
from launch.bench_recipe import Asked, random_folder
from launch.bench_report import provenance, say
from launch.scale_report import WHAT, report
from rl.export import require_free
from rollout.model import resolve_compute

WORKERS = 2
NODES = "nodes"  # the arm whose workers are on two nodes, simulated on this machine
_COLOCATED = ("compute.backend=ray", f"compute.workers={WORKERS}", "compute.placement=colocated")
ARMS: dict[str, tuple[str, ...]] = {
    "one": ("compute.backend=inline", "compute.workers=1"),
    "colocated": (*_COLOCATED, "train.zero_stage=1"),
    "zero3": (*_COLOCATED, "train.zero_stage=3"),
    "separate": ("compute.backend=ray", "compute.workers=1", "compute.placement=separate", "compute.rollout_workers=1"),
    NODES: (*_COLOCATED, "train.zero_stage=1"),
}
FIXED = ("eval.every=0", "checkpoint.every=1000000", "monitor.port=0", "monitor.sinks=[]")
PATIENCE_S = 30.0  # for an arm that was told to end

Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: steps of every arm, of which the first `skip` (captures, compilation) enter no time.

    minutes: an arm that takes longer is ended.
    """

    arms: tuple[str, ...]
    steps: int
    skip: int
    minutes: float


def run(asked: Asked, job: Job, *, folder: Path, keep: Keep) -> dict[str, Any]:
    """Every arm in turn, its run in a folder of its name; JSON-able. keep is given the result so far after each.

    Raises ConfigError, PreflightError and ResourceError before the first begins; one that fails is named in "failed".
    """
    configs = checked(asked, job)
    config = next(iter(configs.values()))
    device, dtype = resolve_compute(config.compute)
    require_devices(job.arms, device)
    for name in (*job.arms, *(["model"] if asked.shape else [])):
        require_free(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "what": WHAT,
        "recipe": asked.name,
        "device": device,
        "dtype": dtype,
        **provenance(device=device, seed=config.run.seed),
        **asdict(job),
        "settings": {name: list(ARMS[name]) for name in job.arms},
        "config": dump(config),
    }
    if asked.shape:
        seed = config.run.seed
        made = random_folder(config.model, asked.shape, folder / "model", device=device, dtype=dtype, seed=seed)
        asked = replace(asked, overrides=(*asked.overrides, f"model={made.absolute()}"))
    if device == "cuda":
        torch.cuda.empty_cache()  # it is for the arms
    clocks: dict[str, dict[str, Any]] = {}
    for name in job.arms:
        say(f"{name} begins")
        clocks[name] = take(name, asked, job, folder=folder, device=device)
        say(f"{name}: {clocks[name]['error'] or 'done'} after {clocks[name]['end'] - clocks[name]['begin']:.0f} s")
        keep(result | report(folder, clocks, skip=job.skip))
    return result | report(folder, clocks, skip=job.skip)


def checked(asked: Asked, job: Job) -> dict[str, Config]:
    """The configuration of every arm. Raises ConfigError."""
    unknown = [name for name in job.arms if name not in ARMS]
    if unknown or not job.arms or len(set(job.arms)) < len(job.arms):
        raise ConfigError(f"--arms {','.join(job.arms)}: name some of {', '.join(ARMS)}, each once")
    if job.skip >= job.steps:
        raise ConfigError(f"--skip {job.skip} leaves nothing of --steps {job.steps}; lower it")
    return {name: asked.config([*keys(job), *ARMS[name]]) for name in job.arms}


def keys(job: Job) -> tuple[str, ...]:
    """What the benchmark sets in every arm."""
    return (*FIXED, f"train.steps={job.steps}")


def require_devices(arms: Sequence[str], device: str) -> None:
    """Raises PreflightError and ResourceError where these arms cannot all run here."""
    if device != "cuda":
        return
    if NODES in arms:
        raise PreflightError(f"--arms {NODES}: nodes that share a machine share its first GPU; leave it out of --arms")
    if set(arms) - {"one"} and len(visible()) < WORKERS:
        raise ResourceError(f"two workers need two GPUs, and there are {len(visible())}; give --arms one, or more GPUs")


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(torch.cuda.device_count())] if given is None else given.split(",")


def take(name: str, asked: Asked, job: Job, *, folder: Path, device: str) -> dict[str, Any]:
    """One arm's run. When it began and ended, in seconds since the epoch, and what went wrong, "" where nothing did."""
    options = [f"run.dir={folder / name}", *asked.overrides, *keys(job), *ARMS[name]]
    root = Path(__file__).resolve().parents[1]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible()[: 1 if name == "one" else WORKERS])
    log = folder / f"{name}.log"
    with simulated_nodes(environment if name == NODES else None) as more, log.open("wb") as out:
        begin = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", asked.recipe, *options],
            env=environment | more,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        code = ended(process, limit_s=60 * job.minutes)
        end = time.time()
    said = log.read_text(errors="replace").strip().rpartition("\n")[2]
    late = f"took more than {job.minutes:g} minutes; see {log}"
    return {"begin": begin, "end": end, "error": late if code is None else f"ended with {code}: {said}" if code else ""}


def ended(process: subprocess.Popen[bytes], *, limit_s: float) -> int | None:
    """Its exit code; None where it had to be ended."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


@contextmanager
def simulated_nodes(environment: Mapping[str, str] | None) -> Iterator[dict[str, str]]:
    """Two Ray nodes of a CPU each, and the variables to find them by; without an environment none, and {}."""
    if environment is None:
        yield {}
        return
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "launch.simulated_nodes", "1", "1"]
    with subprocess.Popen(
        command, env={**environment, **token}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nodes:
        assert nodes.stdout is not None and nodes.stdin is not None
        if not (address := nodes.stdout.readline().strip()):
            raise PreflightError("two Ray nodes do not start on this machine; see /tmp/ray/session_latest/logs")
        try:
            yield token | {"RAY_ADDRESS": address}
        finally:
            nodes.stdin.close()
            nodes.wait()

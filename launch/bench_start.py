"""From loaded weights to the first token, in a fresh process: with compilers' caches empty, and with them kept."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.table import Table

from configs.errors import PreflightError
from launch.bench_peer import PeerChoice, last_line, running
from launch.bench_report import plain_table, provenance, shape, spread
from launch.geometry import Device, Dtype, Subject

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "VLLM_CACHE_ROOT")
PROMPT_LEN, STEADY_TOKENS = 64, 64
LIMITS = {"cold": 15.0, "warm": 5.0}  # seconds to the first token for the 8B geometry (issue 3)


@dataclass(frozen=True, slots=True)
class Job:
    """What each process starts: see Subject.load. runs: warm starts after the cold one."""

    geometry: str | None
    model: str | None
    device: Device
    dtype: Dtype
    seed: int
    runs: int


def run(job: Job, *, peer: PeerChoice | None) -> dict[str, Any]:
    """Start ours, and the peer, in fresh processes: once cold, then warm; JSON-able."""
    # first: what cannot be loaded is said here, and not by a child
    subject = Subject.load(job.geometry, job.model, device=job.device, dtype=job.dtype, seed=job.seed)
    sides: dict[str, Any] = {"paceline": _starts(job, None)}
    found = provenance(device=str(subject.model.device), seed=job.seed)
    about = {"model": subject.name, "shape": shape(subject.model)}
    if peer is not None:
        sides[peer.name] = _starts(job, (peer, subject))
    return {"what": "seconds from loaded weights to the first token", **about, **found, "sides": sides}


def _starts(job: Job, peer: tuple[PeerChoice, Subject] | None) -> dict[str, Any]:
    """Every start's times; the first one finds empty caches, which the others share with it."""
    with tempfile.TemporaryDirectory(prefix="paceline-cold-") as folder:
        environment = {name: str(Path(folder) / name.lower()) for name in CACHES}
        starts = [_start(job, peer, environment) for _ in range(1 + job.runs)]
    return {
        "cold": starts[0],
        "warm": {name: spread([start[name] for start in starts[1:]]) for name in starts[0]},
    }


def _start(job: Job, peer: tuple[PeerChoice, Subject] | None, environment: dict[str, str]) -> dict[str, float]:
    """One start. first_token_s: from loaded weights, the peer's from nothing, which it does not tell apart."""
    if peer is not None:
        choice, subject = peer
        with running(choice, subject.source, max_len=512, max_num_seqs=256, environment=environment) as other:
            assert other is not None
            ready = other.ready
            return {"ready_s": ready["ready_s"], "first_token_s": ready["ready_s"] + ready["first_token_s"]}
    order = {"geometry": job.geometry, "model": job.model, "device": job.device, "dtype": job.dtype, "seed": job.seed}
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench_start", json.dumps(order)],
        env=os.environ | environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise PreflightError(f"a fresh process ended with {done.returncode}: {last_line(done.stderr)}")
    times: dict[str, float] = json.loads(last_line(done.stdout))
    return times


def start(order: dict[str, Any]) -> dict[str, float]:
    """In the fresh process: load, make an engine, sample one token, then as many as show that all is ready.

    Returns load_s; first_token_s, from loaded weights; steady_s, until STEADY_TOKENS were sampled as well.
    """
    from launch.bench_rollout import Ours, synchronize

    begun = perf_counter()
    subject = Subject.load(
        order["geometry"], order["model"], device=order["device"], dtype=order["dtype"], seed=order["seed"]
    )
    synchronize()
    loaded = perf_counter()
    ours = Ours(subject.model, max_running=256, tokens_each=PROMPT_LEN + STEADY_TOKENS)
    ours.seconds(batch=1, prompt_len=PROMPT_LEN, new_tokens=1, seed=0)
    first = perf_counter()
    ours.seconds(batch=1, prompt_len=PROMPT_LEN, new_tokens=STEADY_TOKENS, seed=1)
    return {"load_s": loaded - begun, "first_token_s": first - loaded, "steady_s": perf_counter() - loaded}


def table(result: dict[str, Any]) -> Table:
    """Seconds to the first token of both sides, cold and warm, beside what was asked of ours."""
    headings = ["", "cold", "warm", "min", "max", "ready cold", "ready warm"]
    shown = plain_table(f"{result['what']}, {result['model']}, {result['shape']['dtype']}", headings)
    for name, side in result["sides"].items():
        ready = "steady_s" if name == "paceline" else "ready_s"
        warm = side["warm"]["first_token_s"]
        shown.add_row(
            name,
            f"{side['cold']['first_token_s']:.1f}",
            *(f"{warm[which]:.1f}" for which in ("median", "min", "max")),
            f"{side['cold'][ready]:.1f}",
            f"{side['warm'][ready]['median']:.1f}",
        )
    if result["model"] == "qwen3-8b":
        shown.add_row("asked", *(f"{LIMITS[which]:.1f}" for which in ("cold", "warm")), "", "", "", "")
    return shown


if __name__ == "__main__":
    print(json.dumps(start(json.loads(sys.argv[1]))))

"""How long training is held up by a checkpoint of the drafter: copies are made at once, files beside training."""

import gc
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file

from configs.errors import ConfigError, ResourceError
from configs.schema import DrafterConfig
from drafter.checkpoint import SUFFIX, CheckpointWriter
from drafter.learner import LAST_GOOD, SERVED, TRAINING
from drafter.trainer import DrafterTrainer
from launch.bench_drafter import DTYPES, random_features, random_trainer
from launch.bench_report import WrongResultError, plain_table, provenance, say
from launch.bench_rollout import synchronize
from launch.geometry import geometry

LIMIT_MS = 10.0  # that a checkpoint may hold training up (issue 4; TLT 97)
WARMUP = 3  # updates: compilation, the optimiser's moments
ALONE = 6  # updates timed without a checkpoint
LEAST = 2  # checkpoints: the first makes what those after it find made

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: `checkpoints` of each geometry's drafter, while it trains on batches of so many tokens.

    seconds: from the third of a geometry on, none is begun that would end later than that after the start; 0: no limit.
    """

    geometries: tuple[str, ...]
    device: str
    tokens: int
    checkpoints: int
    seconds: float
    seed: int


def run(job: Job, *, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time the checkpoints, each proved to hold what stood when it was begun; JSON-able.

    keep is given the result so far after every geometry. Raises ConfigError, ResourceError, StorageError;
    WrongResultError for a checkpoint that training got into.
    """
    begun = perf_counter()
    for name in job.geometries:
        limit = geometry(name).max_position_embeddings
        if job.tokens > limit:
            raise ConfigError(f"--tokens {job.tokens} is beyond the {limit} positions of {name}; go below")
    found = {
        "what": "milliseconds that a drafter's checkpoint holds up its training",
        **provenance(device=job.device, seed=job.seed),
        **asdict(job),
        "limit_ms": LIMIT_MS,
    }
    cells: list[dict[str, Any]] = []
    for name in job.geometries:
        try:
            cells.append(_measure(name, job, begun))
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"--geometry {name}: {job.device} cannot hold its drafter, the optimiser and a copy of both; "
                "take a smaller one, or lower --tokens"
            ) from error
        keep(found | {"cells": cells})
        gc.collect()  # before the next one's weights
        if job.device == "cuda":
            torch.cuda.empty_cache()
    return found | {"cells": cells}


def _measure(name: str, job: Job, begun: float) -> dict[str, Any]:
    """A geometry's cell."""
    at = perf_counter()
    config = DrafterConfig(batch_tokens=job.tokens)
    trainer = random_trainer(name, config, device=job.device, seed=job.seed)
    windows = [min(config.feature_window, job.tokens - first) for first in range(0, job.tokens, config.feature_window)]
    batch = random_features(name, windows, torch.Generator().manual_seed(job.seed), device=job.device)

    def update() -> float:
        """Milliseconds of one."""
        stats = trainer.step(batch)
        if not stats.applied:
            raise WrongResultError(f"an update of {name}'s drafter was not finite (loss {stats.loss}): nothing trains")
        return 1e3 * stats.seconds

    made = perf_counter()
    for _ in range(WARMUP):
        update()
    alone = [update() for _ in range(ALONE)]
    seconds: dict[str, Any] = {"making": made - at, "updates": perf_counter() - made, "writing": [], "proving": []}
    # as a run has them: copies in the dtype served, of which none is made for a checkpoint
    served, last_good = ({k: v.to(DTYPES[job.device]) for k, v in _weights(trainer).items()} for _ in range(2))
    writer, calls, holds, beside, num_bytes = CheckpointWriter(), [], [], [], 0
    with TemporaryDirectory(prefix="paceline-checkpoint-") as root:
        for number in range(job.checkpoints):
            written = seconds["writing"]
            if number >= LEAST and job.seconds and perf_counter() - begun + written[-1] > job.seconds:
                say(f"--seconds {job.seconds:g} end after {number} checkpoints of {name}")
                break
            folder = Path(root) / f"step_{number}"
            before = {key: value.detach().clone() for key, value in trainer.state_dict().items()}
            synchronize()
            at = perf_counter()
            files = {TRAINING: trainer.state_dict(), SERVED: served, LAST_GOOD: last_good}
            writer.begin(folder, files, {"number": number})
            calls.append(1e3 * (perf_counter() - at))
            _until_copied(job.device)
            holds.append(1e3 * (perf_counter() - at))
            num_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
            beside += _updates_beside(writer, update)
            written.append(perf_counter() - at)
            at = perf_counter()
            _prove(folder, before, name=name, device=job.device)
            seconds["proving"].append(perf_counter() - at)
            shutil.rmtree(folder)
    say(f"{name}: " + ", ".join(f"{ms:.2f}" for ms in holds) + " ms held up")
    return {
        "geometry": name,
        "bytes": num_bytes,
        "call_ms": calls,
        "held_up_ms": holds,
        "alone_ms": statistics.median(alone),
        "beside_ms": statistics.median(beside),
        "beside_max_ms": max(beside),
        "num_beside": len(beside),
        "within_limit": max(holds) <= LIMIT_MS,
        "seconds": seconds,
    }


def _weights(trainer: DrafterTrainer) -> Tensors:
    return {name: parameter.detach() for name, parameter in trainer.head.named_parameters()}


def _until_copied(device: str) -> None:
    """Until the device has done what was asked of it so far: the next update's kernels queue behind the copies."""
    if device == "cuda":
        event = torch.cuda.Event()
        event.record()
        event.synchronize()


def _updates_beside(writer: CheckpointWriter, update: Callable[[], float]) -> list[float]:
    """Milliseconds of the updates while the checkpoint is written, one at least. Raises StorageError."""
    taken = [update()]
    while writer.writing:
        taken.append(update())
    writer.wait()
    return taken


def _prove(folder: Path, before: Tensors, *, name: str, device: str) -> None:
    """Raise WrongResultError where the trained copy in the folder is not the one before, bit for bit."""
    found = load_file(folder / f"{TRAINING}{SUFFIX}", device=device)
    wrong = [key for key in before.keys() | found.keys() if not _equal(found.get(key), before.get(key))]
    if wrong:
        raise WrongResultError(f"a checkpoint of {name} holds another {sorted(wrong)[0]} than there was when it began")


def _equal(found: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    return found is not None and wanted is not None and torch.equal(found, wanted.to(found.device))


def table(result: Mapping[str, Any]) -> Table:
    """A row a geometry: the first checkpoint and the worst of the later ones, and updates alone and beside a write."""
    shown = plain_table(
        f"{result['what']}: begin() and until its copies are made; asked {result['limit_ms']:g} at most",
        ["drafter of", "MB", "begin first", "later", "held up first", "later", "within"]
        + ["update ms", "beside", "worst", "write s"],
    )
    for cell in result["cells"]:
        row = [cell["geometry"], f"{cell['bytes'] / 1e6:.0f}"]
        for values in (cell["call_ms"], cell["held_up_ms"]):
            row += [f"{values[0]:.2f}", f"{max(values[1:]):.2f}"]
        row.append("yes" if cell["within_limit"] else "no")
        row += [f"{cell[key]:.1f}" for key in ("alone_ms", "beside_ms", "beside_max_ms")]
        shown.add_row(*row, f"{max(cell['seconds']['writing']):.2f}")
    return shown

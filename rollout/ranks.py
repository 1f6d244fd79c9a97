"""Running one policy in several processes of this host: started and ended together, and deciding alike."""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from configs.errors import PacelineError, PreflightError, ResourceError
from configs.schema import RolloutConfig
from drafter.types import ResidentDrafter, Strategy
from rollout.collectives import Ranks, listening_store, ranks_of
from rollout.engine import NativeEngine
from rollout.strategy import Chooser, CycleReport, FixedChooser
from rollout.transfer import Weights

P = ParamSpec("P")
T = TypeVar("T")

LOOPBACK = "127.0.0.1"
# Set where the user has not: all traffic stays on this host.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # multicast serves nothing here, and where GPUs are shared it can put them out of service
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    # registering memory at capture would need the peers to capture at the same time
    "NCCL_GRAPH_REGISTER": "0",
}
TIMEOUT = timedelta(minutes=10)  # of a collective: rank 0 may measure alone meanwhile
GRACE_S = 3.0  # from the first failure on, for the others to say why they failed
END_S = 10.0  # for a process to end by itself
PR_SET_PDEATHSIG = 1


class RankFailedError(RuntimeError):
    """A rank ended by a bug or a signal; its traceback is on stderr."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rank came to. error: its user error, or the last line of its traceback; at: when, for all ranks alike."""

    value: Any
    error: PacelineError | str | None
    at: float


def run_ranks(
    world: int,
    device: Literal["cpu", "cuda"],
    function: Callable[Concatenate[Ranks, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """What function(ranks, ...) returns in each of world new processes, one a GPU, by rank.

    function is importable, and what goes in and comes out is pickled. No process outlives the call, or this one.
    Raises PreflightError where there are too few GPUs; what the first rank to fail raised where that is a
    PacelineError (memory that does not suffice being a ResourceError); and RankFailedError otherwise.
    """
    if device == "cuda" and torch.cuda.device_count() < world:
        raise PreflightError(f"{world} GPUs are asked for and torch sees {torch.cuda.device_count()}; ask for fewer")
    store = listening_store(LOOPBACK)
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    inboxes: list[Connection] = []
    try:
        for rank in range(world):
            inbox, outbox = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank,
                args=(rank, world, store.port, device, os.getpid(), outbox, function, args, kwargs),
                name=f"rank-{rank}",
                daemon=True,
            )
            process.start()
            outbox.close()  # the rank's end alone is open: its death ends the pipe
            processes.append(process)
            inboxes.append(inbox)
        values = _results(processes, inboxes)
        deadline = time.monotonic() + END_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return values
    finally:
        del store  # the ranks meet in it until here
        # a kernel that waits for a peer never returns, and no handler of a milder signal runs meanwhile
        for process, inbox in zip(processes, inboxes, strict=True):
            process.kill()
            process.join()
            inbox.close()


def _results(processes: list[SpawnProcess], inboxes: list[Connection]) -> list[Any]:
    """Every rank's value, or the error of the one that failed first."""
    outcomes: dict[int, Outcome] = {}
    deadline: float | None = None
    while len(outcomes) < len(inboxes):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        for inbox in wait([box for rank, box in enumerate(inboxes) if rank not in outcomes], left):
            rank = inboxes.index(inbox)  # type: ignore[arg-type]
            outcomes[rank] = _receive(processes[rank], inboxes[rank])
            if outcomes[rank].error is not None and deadline is None:
                deadline = time.monotonic() + GRACE_S
    failed = [(outcome.at, rank) for rank, outcome in outcomes.items() if outcome.error is not None]
    if not failed:
        return [outcomes[rank].value for rank in range(len(inboxes))]
    # a rank whose peer is gone fails as well, a little later
    rank = min(failed)[1]
    error = outcomes[rank].error
    if isinstance(error, PacelineError):
        raise error
    raise RankFailedError(f"rank {rank} failed: {error}")


def _receive(process: SpawnProcess, inbox: Connection) -> Outcome:
    at = time.monotonic()
    try:
        outcome: Outcome = inbox.recv()
        return outcome
    except EOFError:
        process.join(END_S)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return Outcome(None, f"{how} before it was done", at)


def _run_rank(
    rank: int,
    world: int,
    port: int,
    device: Literal["cpu", "cuda"],
    parent: int,
    outbox: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """One rank's process, from its start to the word it leaves for the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    try:
        ranks = _join(rank, world, port, device)
        outcome = Outcome(function(ranks, *args, **kwargs), None, time.monotonic())
    except BaseException as error:
        outbox.send(_failure(rank, error))
        outbox.close()
        # not sys.exit: tearing groups down would wait for peers that are gone
        os._exit(1)
    outbox.send(outcome)
    outbox.close()
    # graphs hold on to the communicator that they were captured with
    del ranks, outcome
    gc.collect()
    dist.destroy_process_group()


def _join(rank: int, world: int, port: int, device: Literal["cpu", "cuda"]) -> Ranks:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if device == "cuda":
        place, backend = torch.device("cuda", rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(place)
    else:
        place, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    store = TCPStore(LOOPBACK, port, is_master=False, timeout=TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    assert dist.group.WORLD is not None
    return Ranks(dist.group.WORLD, place)


def _failure(rank: int, error: BaseException) -> Outcome:
    """An error as the parent can raise it; a bug's traceback goes to stderr."""
    at = time.monotonic()
    if isinstance(error, PacelineError):
        return Outcome(None, error, at)
    last = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Outcome(None, ResourceError(f"rank {rank}: {last}"), at)
    traceback.print_exception(error)
    return Outcome(None, last, at)


class SharedChooser:
    """A chooser whose rank 0 decides for all: what it measures differs from rank to rank, and cycles must not."""

    def __init__(self, inner: Chooser, ranks: Ranks) -> None:
        self.max_num_verify = inner.max_num_verify
        self._inner = inner
        self._ranks = ranks

    def choose(self, *, batch: int, context: float) -> Strategy:
        """Rank 0's choice."""
        mine = self._inner.choose(batch=batch, context=context) if self._ranks.rank == 0 else None
        chosen = self._ranks.share(mine)
        assert chosen is not None
        return chosen

    def observe(self, report: CycleReport) -> None:
        """Rank 0 learns."""
        if self._ranks.rank == 0:
            self._inner.observe(report)

    def policy_changed(self) -> None:
        """The weights of all ranks moved."""
        self._inner.policy_changed()

    def drafter_changed(self, source: str) -> None:
        """The drafters of all ranks changed."""
        self._inner.drafter_changed(source)

    def summary(self) -> dict[str, Any]:
        """What this rank's chooser knows: of rank 0 alone, all there is."""
        return self._inner.summary()


def shared_engine(
    model: PreTrainedModel,
    *,
    drafter: ResidentDrafter | None,
    chooser: Chooser,
    rollout: RolloutConfig,
    weights: Weights | None = None,
) -> NativeEngine:
    """This rank's engine over its share of a policy (rollout/parallel.py): all ranks sample the same rollouts.

    Every rank makes one, of equal configuration and with a drafter whose drafts follow from the texts alone, and runs
    the same calls to the end; rollout/team.py has those follow that nobody calls.
    """
    ranks = ranks_of(model)
    assert ranks is not None, "shard_policy comes first"
    if not isinstance(chooser, FixedChooser):
        chooser = SharedChooser(chooser, ranks)
    return NativeEngine(model, drafter=drafter, chooser=chooser, rollout=rollout, cycles="resident", weights=weights)

"""What the processes that hold one policy together tell one another, one process a GPU of one host.

Sums and gathers run on the device's stream and may be captured in a CUDA graph; the rest is for the host.
"""

import logging
import socket
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import PreTrainedModel

ONE_SHOT_BYTES = 512 << 10  # beyond this, reading every peer's whole tensor costs more than a ring's hops
ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)

# torch 2.13 renames it
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

T = TypeVar("T")

log = logging.getLogger(__name__)


def listening_store(host: str) -> TCPStore:
    """Where processes meet, for the one that all others connect to: at any port of this address alone.

    torch's own would listen to every network.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


class Ranks:
    """The processes that run one policy together, and this one's place among them.

    Every rank makes the same calls in the same order. What sum and gather_columns return has the same bits on all
    ranks, so what is sampled of it is the same, and the ranks' hosts need no further word.
    group: of a backend for the device and one for the CPU. one_shot_bytes: sums of at most so many bytes read the
    peers' memory, where the GPUs can; 0 leaves every sum to NCCL.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, one_shot_bytes: int = ONE_SHOT_BYTES) -> None:
        self.device = device
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self._group = group
        self._first = dist.get_global_rank(group, 0)
        self._one_shot = self._try_one_shot(one_shot_bytes) if device.type == "cuda" and one_shot_bytes else None

    @property
    def transport(self) -> str:
        """What carries small sums."""
        if self._one_shot is not None:
            return "one-shot"
        return "nccl" if self.device.type == "cuda" else "gloo"

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of equally shaped, contiguous tensors, which may be overwritten."""
        if self._one_shot is not None and self._one_shot.takes(partial):
            return self._one_shot.sum(partial)
        dist.all_reduce(partial, group=self._group)
        return partial

    def gather_columns(self, piece: torch.Tensor) -> torch.Tensor:
        """[S, N] of every rank, side by side in the order of ranks: [S, world N]."""
        num_rows, width = piece.shape
        together = piece.new_empty(self.world * num_rows, width)
        _all_gather(together, piece.contiguous(), group=self._group)
        return together.view(self.world, num_rows, width).transpose(0, 1).reshape(num_rows, -1)

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank; it is pickled."""
        values = [value]
        dist.broadcast_object_list(values, src=self._first, group=self._group, device=torch.device("cpu"))
        return values[0]

    def signal(self, number: int) -> int:
        """Rank 0's number, on every rank: sooner there than by share."""
        told = torch.tensor(number)
        dist.broadcast(told, self._first, group=self._group)
        return int(told)

    def least(self, number: int) -> int:
        """The least of all ranks' numbers, on every rank."""
        told = torch.tensor(number)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
        return int(told)

    def all(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return bool(self.least(int(holds)))

    def _try_one_shot(self, num_bytes: int) -> "OneShot | None":
        """Peers' memory as the way of small sums; None, said once, where it is not to be had on every rank."""
        made, reason = None, ""
        try:
            made = OneShot(self._group, self.device, num_bytes)
        except Exception as error:  # whatever the driver, the build or the topology refuses
            reason = _first_line(error)
        # before anything runs: a kernel would wait for a rank that could not open the memory
        if self.all(not reason):
            assert made is not None
            try:
                reason = "" if made.is_right(self.rank, self.world) else "its sums are wrong"
            except Exception as error:
                reason = _first_line(error)
            if self.all(not reason):
                return made
        log.warning("rank %d sums small tensors through NCCL, which is slower: %s", self.rank, reason or "a peer must")
        return None


class OneShot:
    """Sums of small tensors that every rank reads out of its peers' memory: one kernel, and no hops.

    Terms are added in the order of ranks, so all get the same bits. The kernel waits for its peers before it reads and
    before it ends, so calls may follow one another through one buffer. Source: torch's symmetric memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._name = group.group_name
        self._buffer = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._buffer, self._name)

    def takes(self, partial: torch.Tensor) -> bool:
        """Whether this tensor fits."""
        return partial.nbytes <= self._buffer.numel() and partial.nbytes % 16 == 0 and partial.dtype in ONE_SHOT_DTYPES

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in new memory."""
        place = self._buffer[: partial.nbytes].view(partial.dtype).view(partial.shape)
        out: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(place, partial, "sum", self._name)
        return out

    def is_right(self, rank: int, world: int) -> bool:
        """Whether sums whose result is known come out, twice through the same memory."""
        expected = world * (world + 1) // 2
        for width in (self._buffer.numel() // 2, 4096):
            columns = torch.arange(width, device=self._buffer.device) % 16  # small numbers, exact in bfloat16
            total = self.sum(((rank + 1) * columns).to(torch.bfloat16)[None])
            if not torch.equal(total[0], (expected * columns).to(torch.bfloat16)):
                return False
        return True


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The ranks that hold a model's parameters together; None where this process has all of them."""
    held: Any = model.__dict__.get("_paceline_ranks")
    return held


def held_by(model: PreTrainedModel, ranks: Ranks) -> None:
    """Remember that a model's parameters are this rank's share."""
    model.__dict__["_paceline_ranks"] = ranks


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

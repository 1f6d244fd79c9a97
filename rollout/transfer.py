"""Weights on their way from those who train to engines with parameters of their own: in place, whole or not at all.

A policy that trains elsewhere is received into the engine's parameters where they are, so that what was captured over
them stays valid. From the first byte until the last was checked the engine holds no version, and samples nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from configs.errors import ResourceError
from configs.faults import hit
from rollout.pieces import Piece, whole_pieces

WORDS = 1 << 22  # of a parameter summed at a time: bounds the memory that a checksum takes
FACTOR = 1_000_003  # between one parameter's sum and the next one's
WORD = {2: torch.int16, 4: torch.int32}  # by bytes of an element

Named = Iterable[tuple[str, torch.Tensor]]


class StaleWeightsError(ResourceError):
    """An engine does not hold, whole, the version of the policy that it was told to serve."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What moved of one version. checksum: of all parameters, equal where they are."""

    version: int
    num_bytes: int
    checksum: int
    seconds: float


class Weights(Protocol):
    """The parameters of an engine that no trainer updates in place."""

    def take(self, version: int) -> int:
        """See to it that they are this version; the bytes moved for it. Raises StaleWeightsError."""

    def require(self, version: int) -> None:
        """Raise StaleWeightsError unless they are this version, whole."""


class Channel(Protocol):
    """Carries buckets from one sender to all receivers, in order."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send it, or overwrite it with what is sent. Raises RuntimeError where a peer is gone or too slow."""


class Link:
    """A Channel over a process group of its own: rank 0 sends, all others receive.

    It stands beside torch's default group, which ranks that train together have made already. device: of what is sent;
    NCCL carries a GPU's tensors, gloo the CPU's. timeout_s: for one bucket, and for all to join.
    """

    def __init__(self, store: TCPStore, *, rank: int, world: int, device: torch.device | str, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any
        if torch.device(device).type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._group = dist.ProcessGroupNCCL(store, rank, world, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, world, self._timeout)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """As Channel says. On a GPU in the order of the current stream: the host does not wait."""
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, self._timeout
        self._group.broadcast([tensor], options).wait()


class ReceivedWeights:
    """Weights of a policy that trains in another process.

    version: what the parameters hold; None while they are mixed. What they were loaded from is version 0.
    pieces: what this process has of the policy's parameters, by name and in order, where it has not all of them; they
    are sent whole, and cut here.
    """

    def __init__(self, model: nn.Module, pieces: Mapping[str, Piece] | None = None) -> None:
        self.version: int | None = 0
        self._pieces = whole_pieces(trainable(model)) if pieces is None else pieces
        self._device = next(model.parameters()).device
        self._cause = ""

    @property
    def layout(self) -> str:
        """Equal for two policies whose parameters can be sent to one another."""
        return layout((name, each.shape, each.dtype) for name, each in self._pieces.items())

    def take(self, version: int) -> int:
        """As Weights says: it must have been received."""
        self.require(version)
        return 0  # the sender counts what it moved

    def require(self, version: int) -> None:
        """As Weights says."""
        if self.version is None:
            raise StaleWeightsError(f"an engine holds no whole version of the policy: {self._cause}; resume the run")
        if self.version != version:
            raise StaleWeightsError(
                f"an engine is to serve version {version} of the policy and holds {self.version}; resume the run"
            )

    @torch.no_grad()
    def receive(self, channel: Channel, version: int, *, bucket_bytes: int) -> Transfer:
        """Take up a version from whoever calls send for it, with parameters of the same layout, in as large buckets.

        Raises StaleWeightsError where it does not arrive, whole and unaltered.
        """
        begin = perf_counter()
        self.version, self._cause = None, f"version {version} has not arrived"
        try:
            num_bytes, checksum = self._receive(channel, version, bucket_bytes)
        except RuntimeError as error:
            self._cause = f"the transfer of version {version} failed ({str(error).strip().partition(chr(10))[0]})"
            self.require(version)
            raise AssertionError("unreachable") from error
        self.version = version
        return Transfer(version, num_bytes, checksum, perf_counter() - begin)

    def _receive(self, channel: Channel, version: int, bucket_bytes: int) -> tuple[int, int]:
        """The bytes, and their checksum. Raises RuntimeError."""
        device = self._device
        num_bytes = left = sum(piece.shape.numel() * piece.dtype.itemsize for piece in self._pieces.values())
        bucket = torch.empty(min(bucket_bytes, num_bytes), dtype=torch.uint8, device=device)
        checksum = Checksum(device)
        arrived = bucket[:0]
        for piece in self._pieces.values():
            # in place, or beside it to be cut
            is_whole = piece.parameter is not None and piece.parameter.shape == piece.shape
            whole = piece.parameter if is_whole else torch.empty(piece.shape, dtype=piece.dtype, device=device)
            assert whole is not None
            missing = as_bytes(whole)
            while len(missing):
                if not len(arrived):
                    arrived = bucket[:left]
                    channel.broadcast(arrived)
                    hit("transfer.bucket")
                    left -= len(arrived)
                size = min(len(missing), len(arrived))
                missing[:size].copy_(arrived[:size])
                missing, arrived = missing[size:], arrived[size:]
            checksum.add(whole)  # of what stands there now, not of what came by
            if not is_whole:
                piece.keep(whole)
        sent = torch.empty(3, dtype=torch.int64, device=device)
        channel.broadcast(sent)
        found = [version, num_bytes, checksum.value()]
        if sent.tolist() != found:
            raise RuntimeError(f"version, bytes and checksum arrived as {found} and were sent as {sent.tolist()}")
        return num_bytes, found[2]


@torch.no_grad()
def send(parameters: Named, channel: Channel, version: int, *, bucket_bytes: int) -> Transfer:
    """Send a version to every engine that receives it. Raises StaleWeightsError where one is gone."""
    begin = perf_counter()
    num_bytes = filled = 0
    bucket = checksum = None
    for _, parameter in parameters:
        if bucket is None or checksum is None:
            bucket = torch.empty(bucket_bytes, dtype=torch.uint8, device=parameter.device)
            checksum = Checksum(parameter.device)
        rest = as_bytes(parameter)
        num_bytes += len(rest)
        checksum.add(parameter)
        while len(rest):
            size = min(len(rest), bucket_bytes - filled)
            bucket[filled : filled + size].copy_(rest[:size])
            rest, filled = rest[size:], filled + size
            if filled == bucket_bytes:
                _part_with(bucket, channel, version)
                filled = 0
    assert bucket is not None and checksum is not None, "a policy has parameters"
    if filled:
        _part_with(bucket[:filled], channel, version)
    value = checksum.value()
    _part_with(torch.tensor([version, num_bytes, value], device=bucket.device), channel, version)
    return Transfer(version, num_bytes, value, perf_counter() - begin)


def _part_with(tensor: torch.Tensor, channel: Channel, version: int) -> None:
    hit("transfer.bucket")
    try:
        channel.broadcast(tensor)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise StaleWeightsError(f"version {version} of the policy cannot be sent ({reason}); resume the run") from error


class CopiedWeights:
    """A whole copy, for an engine in the process of a trainer that keeps only its share (ZeRO 3).

    source: yields the trained parameters, whole, one after the other; all ranks that train together go through it at
    the same time. changes: tells how often they have changed.
    """

    def __init__(self, model: nn.Module, source: Callable[[], Named], changes: Callable[[], int]) -> None:
        self._parameters = trainable(model)
        self._source = source
        self._changes = changes
        self._taken: int | None = changes()  # None while the copy is mixed
        self._version = 0

    def take(self, version: int) -> int:
        """As Weights says."""
        num_bytes = 0
        if self._taken != self._changes():
            num_bytes = self._copy()
        self._version = version
        return num_bytes

    def require(self, version: int) -> None:
        """As Weights says."""
        if self._taken is None or self._version != version:
            held = "a copy that was cut short" if self._taken is None else f"version {self._version}"
            raise StaleWeightsError(f"an engine is to serve version {version} of the policy and holds {held}")

    @torch.no_grad()
    def _copy(self) -> int:
        self._taken, num_bytes = None, 0
        missing = set(self._parameters)
        for name, parameter in self._source():
            self._parameters[name].copy_(parameter)
            missing.remove(name)
            num_bytes += parameter.nbytes
        assert not missing, f"the trainer has no {sorted(missing)[0]}"
        self._taken = self._changes()
        return num_bytes


class Checksum:
    """A number by which faults on the way are found out; it is linear, and no defence against whoever means harm.

    Of each parameter's words w: sum (2 i + 1) w_i mod 2^64, and the parameters' sums are chained by an odd factor. So
    one altered word always shows, and two that changed places in a parameter. Several may cancel one another, as 3 more
    in the first word and 1 less in the second do. Everything stays on the device until value.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, parameter: torch.Tensor) -> None:
        """The next parameter."""
        words = parameter.detach().reshape(-1).view(WORD[parameter.element_size()])
        own = torch.zeros_like(self._total)
        for start in range(0, len(words), WORDS):
            chunk = words[start : start + WORDS]
            weights = torch.arange(2 * start + 1, 2 * (start + len(chunk)), 2, device=words.device)
            own += (weights * chunk).sum()
        self._total = self._total * FACTOR + own

    def value(self) -> int:
        """Of all that was added. Waits for the device."""
        return int(self._total)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name, tied parameters once: what is sent, in this order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layout(parameters: Iterable[tuple[str, torch.Size, torch.dtype]]) -> str:
    """A digest of names, shapes and dtypes, in order."""
    told = [(name, list(shape), str(dtype)) for name, shape, dtype in parameters]
    return sha256(repr(told).encode()).hexdigest()[:16]


def as_bytes(parameter: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, [nbytes] uint8."""
    assert parameter.is_contiguous()
    return parameter.detach().view(-1).view(torch.uint8)

"""Device memory lent to others: what it held waits on the host, and comes back bit for bit behind every view of it."""

from collections.abc import Iterable

import torch


class Shelf:
    """Keeps the contents of tensors on the host while their device memory is free for others.

    It is the storages that are emptied and filled again, so every view stays what it was: DeepSpeed's flat buffers are
    seen through many. Nobody may read or write them meanwhile. On a GPU copies run in the order of the current stream,
    from and to page-locked memory, which is allocated once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.uint8)
        self._kept: list[tuple[torch.UntypedStorage, int]] = []  # and its size
        self._scratch: list[tuple[torch.UntypedStorage, int]] = []

    def put_away(self, kept: Iterable[torch.Tensor], scratch: Iterable[torch.Tensor]) -> int:
        """Empty these tensors' storages; the bytes that are free now. scratch: comes back as zeros."""
        assert not self._kept and not self._scratch, "it is put away already"
        self._kept = _storages(kept)
        known = {storage.data_ptr() for storage, _ in self._kept}
        self._scratch = [(each, size) for each, size in _storages(scratch) if each.data_ptr() not in known]
        total = sum(size for _, size in self._kept)
        if len(self._host) < total:
            self._host = torch.empty(0, dtype=torch.uint8)  # before the new one is made
            self._host = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for place, (storage, size) in zip(self._places(), self._kept, strict=True):
            place.copy_(self._bytes(storage, size), non_blocking=True)
        for storage, _ in (*self._kept, *self._scratch):
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # whoever asks the device what is free must be told of it
        return total + sum(size for _, size in self._scratch)

    def bring_back(self) -> None:
        """Fill the storages again. Raises torch.OutOfMemoryError where others hold what was lent."""
        for storage, size in (*self._kept, *self._scratch):
            storage.resize_(size)
        for place, (storage, size) in zip(self._places(), self._kept, strict=True):
            self._bytes(storage, size).copy_(place, non_blocking=True)
        for storage, size in self._scratch:
            self._bytes(storage, size).zero_()
        self._kept, self._scratch = [], []

    def _places(self) -> list[torch.Tensor]:
        """Where each storage waits."""
        return list(self._host[: sum(size for _, size in self._kept)].split([size for _, size in self._kept]))

    def _bytes(self, storage: torch.UntypedStorage, size: int) -> torch.Tensor:
        flat = torch.empty(0, dtype=torch.uint8, device=self._device)
        return flat.set_(storage, 0, (size,), (1,))


def _storages(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Each storage once, with its size in bytes; empty ones are left out."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [(storage, storage.nbytes()) for storage in found.values() if storage.nbytes()]

"""Arrays from the host to the device: several in one transfer, behind the work that is already launched."""

import numpy as np
import torch

ALIGNMENT = 16  # bytes: kernels are compiled for pointers that are multiples of it
# Up to so many the driver takes a copy of before it returns, from memory of any kind. More it copies without making the
# host wait from pinned memory alone, which torch gives to nobody else before the transfer is over.
STAGED_BYTES = 1 << 16


def upload(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Each array on the device. One transfer, however many they are: a launch costs the host more than a few bytes do.

    The host does not wait for it. On a CPU nothing is copied: the arrays are not to be written any more.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    begins = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    packed = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=begins[-1] > STAGED_BYTES)
    for array, begin in zip(arrays, begins, strict=False):
        packed.numpy()[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[begin : begin + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, begin in zip(arrays, begins, strict=False)
    ]

"""Arrays reach the device as they were, several in one transfer, small and large, at addresses kernels expect."""

import numpy as np
import pytest
import torch

from kernels.upload import ALIGNMENT, STAGED_BYTES, upload


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("length", [3, STAGED_BYTES])
def test_arrays_arrive_as_they_were(device: str, length: int) -> None:
    arrays: list[np.ndarray] = [
        np.arange(length, dtype=np.int64) - 1,
        np.zeros(0, dtype=np.int64),
        np.arange(12, dtype=np.int32).reshape(4, 3)[:, :2],
        np.array([7], dtype=np.int32),
        np.arange(length, dtype=np.int32),
    ]
    there = upload(torch.device(device), *arrays)
    for array, tensor in zip(arrays, there, strict=True):
        assert tensor.device.type == device
        assert np.array_equal(tensor.cpu().numpy(), array) and tensor.cpu().numpy().dtype == array.dtype
        assert device == "cpu" or tensor.data_ptr() % ALIGNMENT == 0


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(4)
    (tensor,) = upload(torch.device("cpu"), array)
    assert tensor.data_ptr() == array.ctypes.data

"""Cosines and sines of rotary angles against float64."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.turns_triton import cos_sin

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")


@triton.jit
def _turn_kernel(angles, cosines, sines, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.arange(0, BLOCK)
    cosine, sine = cos_sin(tl.load(angles + index))
    tl.store(cosines + index, cosine)
    tl.store(sines + index, sine)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("largest", [1.0, 1e3, 131072.0, 524288.0])
def test_cosines_and_sines_are_exact_to_float32(largest: float, device: str) -> None:
    torch.manual_seed(0)
    random = torch.rand(4096) * largest
    # where quadrants meet, and the largest whole positions
    random[:2048] = torch.arange(2048) * (torch.pi / 4) % largest
    random[2048:2080] = largest - torch.arange(32)
    angles = random.clamp(min=0).to(device)
    cosines, sines = torch.empty_like(angles), torch.empty_like(angles)
    _turn_kernel[(1,)](angles, cosines, sines, BLOCK=4096)
    torch.testing.assert_close(cosines.double(), angles.double().cos(), atol=2e-7, rtol=0)
    torch.testing.assert_close(sines.double(), angles.double().sin(), atol=2e-7, rtol=0)

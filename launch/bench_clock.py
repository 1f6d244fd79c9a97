"""Small device work checked and timed: CUDA-graph replays over rotating operands, so neither host nor cache helps."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from launch.bench_report import WrongResultError, spread

ROTATED_BYTES = 256 << 20  # several times an H100's L2 cache
MOST_COPIES = 64
LEAST_CALLS = 8  # of a graph: one alone would have its launch, some 10 us, counted as its own time
ROUNDS = 7
WARM_S = (
    0.02  # of replays before any counts: an H100 that stood idle moves memory 15 % slower for its first milliseconds
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a result's norm


def copies_for(num_bytes: int, device: torch.device) -> int:
    """How many sets of operands of this size a timing rotates over; one on a CPU, where nothing is claimed."""
    if device.type == "cpu":
        return 1
    return min(MOST_COPIES, max(1, -(-ROTATED_BYTES // max(num_bytes, 1))))


def times_us(call: Callable[..., object], operands: Sequence[tuple[Any, ...]], device: torch.device) -> list[float]:
    """Microseconds a call, a value a round; a round calls with each of the operands in turn, the device being warm."""
    if device.type == "cpu":
        return [_host_us(call, operands) for _ in range(ROUNDS + 1)][1:]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for given in (operands[0], *operands):  # compiles, tunes, and makes what calls keep between one another
            call(*given)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    turns = -(-LEAST_CALLS // len(operands))
    with torch.cuda.graph(graph, stream=stream):
        for given in list(operands) * turns:
            call(*given)
    begun = perf_counter()
    while perf_counter() - begun < WARM_S:
        graph.replay()
        torch.cuda.synchronize(device)
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (turns * len(operands)))
    return times


def _host_us(call: Callable[..., object], operands: Sequence[tuple[Any, ...]]) -> float:
    begun = perf_counter()
    for given in operands:
        call(*given)
    return (perf_counter() - begun) * 1e6 / len(operands)


def compare(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Raise WrongResultError where two results differ by more than rounding explains."""
    theirs = theirs.reshape(ours.shape).float()
    error = float((ours.float() - theirs).norm() / theirs.norm())
    if not error <= TOLERANCE[ours.dtype]:  # written so that NaN fails
        raise WrongResultError(f"{what}: our result is {error:.2g} of its norm away from torch's")


def row(kernel: str, size: str, num_bytes: int, ours: list[float], baseline: list[float], named: str) -> dict[str, Any]:
    """A line of the result: times, what had to be read or written at least, and the baseline's times."""
    us, baseline_us = spread(ours), spread(baseline)
    return {
        "kernel": kernel,
        "size": size,
        "bytes": num_bytes,
        "us": us,
        "gbps": num_bytes / us["median"] / 1e3,
        "baseline": named,
        "baseline_us": baseline_us,
        "ratio": us["median"] / baseline_us["median"],
    }

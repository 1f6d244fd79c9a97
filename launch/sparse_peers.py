"""What sparse decoding is measured beside: vLLM's FlashAttention-3, dense, and TileLang's own sparse kernel."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, PreflightError
from kernels.select import BlockLists
from launch.bench_attention import Heads
from launch.bench_clock import ROTATED_BYTES, ROUNDS, WARM_S, times_us
from launch.bench_peer import last_line
from launch.bench_report import say, spread
from launch.sparse_operands import BLOCK_SIZE, Operands

KERNEL_CLASS = "SparseFlashAttn"
TILE_BLOCK = 64  # of SeerAttention-R's figures for this kernel
TILE_DTYPE = torch.float16  # the published file knows no other
TILE_TOLERANCE = 1e-2  # of a result's norm: ours beside it is bfloat16
TILE_SOURCE = "examples/blocksparse_attention/example_tilelang_sparse_gqa_decode_varlen_indice.py of tile-ai/tilelang"


def fa3(heads: Heads, sizes: Sequence[tuple[int, int]], where: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """FlashAttention-3's answer (launch/bench_fa3.py) at every (batch, keys), from a process of its own.

    where: a Python that has vLLM, or a folder with the flash-attention part of a vLLM wheel made for our torch. Raises
    ConfigError where it is neither, PreflightError where it does not do its work.
    """
    python, environment = _fa3_process(where)
    orders = [
        {
            "batch": batch,
            "keys": keys,
            "query_heads": heads.query,
            "key_heads": heads.key,
            "head_dim": heads.dim,
            "block_size": BLOCK_SIZE,
            "rotated_bytes": ROTATED_BYTES,
            "rounds": ROUNDS,
            "warm_s": WARM_S,
        }
        for batch, keys in sizes
    ]
    script = Path(__file__).with_name("bench_fa3.py")
    told = "".join(json.dumps(order) + "\n" for order in orders)
    try:
        done = subprocess.run([str(python), str(script)], input=told, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise ConfigError(f"--fa3 {where}: does not run ({error}); give the python of a venv that has vLLM") from error
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(answers) < len(orders):
        raise PreflightError(
            f"--fa3 {where}: FlashAttention-3 ended with {done.returncode}: {last_line(done.stderr)}; give a Python "
            f"that has vLLM, or a folder from a vLLM wheel made for torch {torch.__version__}"
        )
    return dict(zip(sizes, answers, strict=True))


def _fa3_process(where: Path) -> tuple[Path, dict[str, str]]:
    """The Python that runs it, and its environment."""
    if not where.is_dir():
        return where, dict(os.environ)
    if not (where / "vllm" / "vllm_flash_attn" / "flash_attn_interface.py").is_file():
        raise ConfigError(
            f"--fa3 {where}: has no vllm/vllm_flash_attn/flash_attn_interface.py; make the folder with `unzip "
            f"vllm-*.whl 'vllm/vllm_flash_attn/*' 'vllm-*/METADATA' -d {where}`, or give a Python that has vLLM"
        )
    if importlib.util.find_spec("vllm") is not None:
        raise ConfigError(f"--fa3 {where}: this Python has a vllm of its own, which hides it; give {sys.executable}")
    found = os.pathsep.join(filter(None, [str(where.resolve()), os.environ.get("PYTHONPATH")]))
    return Path(sys.executable), {**os.environ, "PYTHONPATH": found}


@dataclass(frozen=True, slots=True)
class TileLang:
    """TileLang's block-sparse decode, from the file that the user has of it. It picks nothing: lists are given to it.

    kernel(batch, heads, heads_kv, dim, dim_v, block_size) makes what is called with (query [B, Hq, D], keys and values
    [B, L, Hkv, D], blocks [B, Hkv, K] int32, lengths [B] int32) and returns [B, Hq, D], all float16.
    """

    kernel: Callable[..., Callable[..., torch.Tensor]]
    said: dict[str, str]

    def timed(
        self, rotation: Sequence["TileCache"], expected: torch.Tensor, what: str, picked: Sequence[BlockLists]
    ) -> dict[str, Any]:
        """Times over lists that are there already: {"us": spread, "how": "graph" or "eager"}.

        expected: what the first of each has to give. Raises PreflightError where it gives something else.
        """
        query, keys, device = rotation[0].query, rotation[0].keys, rotation[0].query.device
        dims = (keys.shape[3], rotation[0].values.shape[3])
        operands = [
            (cache.query, cache.keys, cache.values, tile_blocks(lists), cache.lengths)
            for cache, lists in zip(rotation, picked, strict=True)
        ]
        try:
            call = self.kernel(len(query), query.shape[1], keys.shape[2], *dims, TILE_BLOCK)
            first = call(*operands[0])
        except Exception as error:  # whatever its compiler raises
            why = str(error).strip().rpartition("\n")[2]
            raise PreflightError(f"--tilelang: {what}: its kernel fails ({type(error).__name__}: {why})") from error
        check(first, expected, what)
        how, first = _captured(call, operands[0], device)
        check(first, expected, f"{what}, replayed")
        clock = times_us if how == "graph" else eager_us
        return {"us": spread(clock(call, operands, device)), "how": how}


@dataclass(frozen=True, slots=True)
class TileCache:
    """A layer's decode as TileLang's kernel reads it: query [B, Hq, D], keys and values [B, L, Hkv, D], lengths [B]."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor


def tile_cache(given: Operands) -> TileCache:
    """The same decode, out of the paged cache and in float16."""
    keys, values = (side.transpose(1, 2).to(TILE_DTYPE).contiguous() for side in given.whole())
    lengths = torch.full((len(keys),), given.length, dtype=torch.int32, device=keys.device)
    return TileCache(given.query.to(TILE_DTYPE), keys, values, lengths)


def tile_blocks(lists: BlockLists) -> torch.Tensor:
    """The same lists, [B, Hkv, K] int32: newest block first, as the kernel masks no other, and -1 past a list's end."""
    assert lists.select_block == TILE_BLOCK, lists.select_block
    listed = torch.arange(lists.blocks.shape[2], device=lists.blocks.device) < lists.counts[:, :, None]
    return torch.where(listed, lists.blocks, -1).sort(dim=2, descending=True).values.int().contiguous()


def check(theirs: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise PreflightError where TileLang's result is further from torch's than rounding explains."""
    expected = expected.reshape(theirs.shape).float()
    error = float((theirs.float() - expected).norm() / expected.norm())
    if not error <= TILE_TOLERANCE:  # written so that NaN fails
        raise PreflightError(
            f"--tilelang: {what}: its result is {error:.2g} of its norm away from torch's under the same lists, and is "
            f"not timed; give {TILE_SOURCE} as it is, with the release of tilelang that it goes with"
        )


def _captured(
    call: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...], device: torch.device
) -> tuple[str, torch.Tensor]:
    """How it can be timed, and its result that way: replayed from a CUDA graph, or launched where none captures it."""
    if device.type == "cpu":
        return "eager", call(*given)
    graph = torch.cuda.CUDAGraph()
    try:
        # the outer context: a capture that fails leaves its own stream as the current one
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
            result = call(*given)
    except RuntimeError as error:
        # and a generator that takes itself to be captured still: it goes on with a fresh state
        fresh = torch.Generator(device).manual_seed(torch.initial_seed())
        torch.cuda.default_generators[given[0].device.index].graphsafe_set_state(fresh.graphsafe_get_state())
        torch.cuda.synchronize(device)
        why = str(error).partition("\n")[0]
        say(f"TileLang's kernel does not go into a CUDA graph ({why}): its times hold its launches")
        return "eager", call(*given)
    result.zero_()  # a launch that slipped past the graph leaves it so
    graph.replay()
    torch.cuda.synchronize(device)
    return "graph", result.clone()


def eager_us(call: Callable[..., object], operands: Sequence[tuple[Any, ...]], device: torch.device) -> list[float]:
    """Microseconds a call, a value a round, without a graph: where calls are short, the host's time to launch them."""
    if device.type == "cpu":
        return times_us(call, operands, device)
    times = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for given in operands:
            call(*given)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(operands))
    return times[1:]


def tilelang(file: Path) -> TileLang:
    """The kernel of a file as TileLang publishes it. Raises ConfigError, PreflightError."""
    remedy = f"give {TILE_SOURCE}, its heuristic.py beside it"
    if not file.is_file():
        raise ConfigError(f"--tilelang {file}: no such file; {remedy}")
    spec = importlib.util.spec_from_file_location("paceline_tilelang_peer", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--tilelang {file}: not a Python file; {remedy}")
    try:
        version = metadata.version("tilelang")
    except metadata.PackageNotFoundError as error:
        raise PreflightError(f"--tilelang {file}: tilelang is missing; `pip install tilelang`") from error
    module = importlib.util.module_from_spec(spec)
    with _first_on_path(file.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a file for another release raises of this one's names
            why = str(error).strip().rpartition("\n")[2]
            raise PreflightError(f"--tilelang {file}: cannot be imported ({why}); {remedy}") from error
    kernel = getattr(module, KERNEL_CLASS, None)
    if kernel is None:
        raise ConfigError(f"--tilelang {file}: defines no {KERNEL_CLASS}; {remedy}")
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    return TileLang(kernel, {"file": file.name, "sha256": sha, "tilelang": version, "dtype": "float16"})


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours by name, as it does when it is run."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))

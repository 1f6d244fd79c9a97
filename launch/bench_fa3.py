"""FlashAttention-3, as vLLM ships it, under the clock: the dense decode that sparse kernels are published against.

A script of its own, run by a Python that has vLLM, or that finds vLLM's vllm_flash_attn alone: it imports nothing of
Paceline. Standard input holds one JSON object a line (timed's arguments); each is answered by one JSON line on standard
output: {"us": [microseconds a call, one a round], "splits": which way was the faster one, "versions": {...}}.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from time import perf_counter
from typing import Any

TOLERANCE = 1e-2  # of a result's norm, in bfloat16
MOST_SPLITS = 32  # vLLM's bound in a CUDA graph (attention_config.flash_attn_max_num_splits_for_cuda_graph)


def main() -> None:
    """Serve orders until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(timed(**json.loads(line))), file=answers, flush=True)


def flash_attention() -> Any:
    """vLLM's module of FlashAttention's functions. Ends the process with the reason where FA3 does not load."""
    import torch

    name = "vllm.vllm_flash_attn.flash_attn_interface"
    why = None
    try:
        import vllm.vllm_flash_attn  # noqa: F401
    except ImportError as error:
        why = error
    # its package gives up where neither FA2 nor FA3 loads, and does not say why; the module below it knows
    module = sys.modules.get(name)
    if module is None:
        sys.exit(f"there is no {name}: {why}")
    if not module.FA3_AVAILABLE:
        sys.exit(f"its FA3 library does not load beside torch {torch.__version__}: {module.FA3_UNAVAILABLE_REASON}")
    return module


def timed(
    *,
    batch: int,
    keys: int,
    query_heads: int,
    key_heads: int,
    head_dim: int,
    block_size: int,
    rotated_bytes: int,
    rounds: int,
    warm_s: float,
) -> dict[str, Any]:
    """Decode one token of each sequence over its keys, whose blocks are strewn over a paged cache.

    Two ways, of which the faster one counts: splits chosen in every call, and planned once for all layers of a step and
    bounded, as vLLM does in its CUDA graphs. Both are checked before and after.
    """
    flash = flash_attention()
    import torch

    blocks_each = -(-keys // block_size)
    cache_bytes = 2 * batch * blocks_each * block_size * key_heads * head_dim * 2

    def cache() -> torch.Tensor:
        shape = (batch * blocks_each, block_size, key_heads, head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    def operands() -> dict[str, Any]:
        return {
            "q": torch.randn(batch, query_heads, head_dim, dtype=torch.bfloat16, device="cuda"),
            "k": cache(),
            "v": cache(),
            "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
            "seqused_k": torch.full((batch,), keys, dtype=torch.int32, device="cuda"),
            "block_table": torch.randperm(batch * blocks_each, device="cuda").int().view(batch, blocks_each),
        }

    rotation = [operands() for _ in range(min(64, max(1, -(-rotated_bytes // cache_bytes))))]
    planned = flash.get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=keys,
        num_heads_q=query_heads,
        num_heads_kv=key_heads,
        headdim=head_dim,
        cache_seqlens=rotation[0]["seqused_k"],
        cu_seqlens_q=rotation[0]["cu_seqlens_q"],
        page_size=block_size,
        causal=True,
        num_splits=MOST_SPLITS,
    )
    ways = {"in every call": {}, "once a step": {"scheduler_metadata": planned, "num_splits": MOST_SPLITS}}

    def call(given: dict[str, Any], way: dict[str, Any]) -> torch.Tensor:
        result: torch.Tensor = flash.flash_attn_varlen_func(
            max_seqlen_q=1, max_seqlen_k=keys, causal=True, fa_version=3, **given, **way
        )
        return result

    expected = first_sequence(rotation[0], keys)

    def check(name: str, way: dict[str, Any]) -> None:
        error = float((call(rotation[0], way)[0].float() - expected).norm() / expected.norm())
        if not error <= TOLERANCE:  # written so that NaN fails
            sys.exit(f"its result, splits planned {name}, is {error:.2g} of its norm away from torch's")

    times = {}
    for name, way in ways.items():
        check(name, way)
        times[name] = replays_us(partial(call, way=way), rotation, rounds, warm_s)
        check(name, way)  # a plan holds a counter that every call has to leave as it was
    best = min(times, key=lambda name: sorted(times[name])[rounds // 2])
    versions = {name: metadata.version(name) for name in ("vllm", "torch")}
    return {"us": times[best], "splits": f"planned {best}", "versions": versions}


def first_sequence(given: dict[str, Any], keys: int) -> Any:
    """What the first sequence's token has to get, by torch: float32 [Hq, D]."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    rows = given["block_table"][0].long()
    key, value = (given[side][rows].flatten(0, 1)[:keys].transpose(0, 1)[None] for side in ("k", "v"))
    return sdpa(given["q"][:1, :, None], key, value, enable_gqa=True)[0, :, 0].float()


def replays_us(call: Callable[[Any], object], rotation: Sequence[Any], rounds: int, warm_s: float) -> list[float]:
    """Microseconds a call, one a round, of a CUDA graph of a call on each operand, the device being warm."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for given in (rotation[0], *rotation):
            call(given)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for given in rotation:
            call(given)
    begun = perf_counter()
    while perf_counter() - begun < warm_s:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(rotation))
    return times


if __name__ == "__main__":
    main()

"""FlashAttention-3, as vLLM ships it, under the clock: the dense decode that sparse kernels are published against.

A script of its own, run by a Python that has vLLM: it imports nothing of Paceline. Standard input holds one JSON object
a line (batch, keys, query_heads, key_heads, head_dim, block_size, rotated_bytes, rounds); each is answered by one JSON
line on standard output, {"us": [microseconds a call, one a round]} of CUDA-graph replays over rotating caches.
"""

import json
import os
import sys
from importlib import metadata
from typing import Any

WARM_REPLAYS = 5


def main() -> None:
    """Serve orders until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(timed(**json.loads(line))), file=answers, flush=True)


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
) -> dict[str, Any]:
    """Decode one token of each sequence over its keys, whose blocks are strewn over a paged cache."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

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

    def call(given: dict[str, Any]) -> None:
        flash_attn_varlen_func(max_seqlen_q=1, max_seqlen_k=keys, causal=True, fa_version=3, **given)

    rotation = [operands() for _ in range(min(64, max(1, -(-rotated_bytes // cache_bytes))))]
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
    for _ in range(WARM_REPLAYS):
        graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(rotation))
    return {"us": times, "versions": {name: metadata.version(name) for name in ("vllm", "torch")}}


if __name__ == "__main__":
    main()

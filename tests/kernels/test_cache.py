"""KV entries land in their slots and nowhere else, turned as transformers turns them; moves read before they write."""

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from kernels.cache import compact_reference, move_kv, rope_and_write_reference, write_kv
from kernels.cache_triton import compact_triton, rope_and_write_triton


def test_written_entries_land_in_their_slots_alone() -> None:
    caches = torch.full((4, 3, 2, 5), torch.nan), torch.full((4, 3, 2, 5), torch.nan)
    slots = torch.tensor([7, 0, 11, 2])
    key, value = torch.randn(2, 4, 2, 5)
    write_kv(key, value, *caches, slots)
    for cache, written in zip(caches, (key, value), strict=True):
        for slot, entry in zip(slots.tolist(), written, strict=True):
            assert torch.equal(cache[slot // 3, slot % 3], entry)
        assert cache.isnan().sum() == (12 - 4) * 2 * 5


def test_overlapping_moves_act_in_every_layer_as_if_all_reads_came_first() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 7, 12):
        storage = torch.randn(3, 2, 4, 3, 2, 5)  # 3 layers, 4 blocks of 3 slots
        wanted = storage.clone().view(3, 2, 12, 2, 5)
        old = wanted.clone()
        src = torch.randint(12, (count,), generator=generator)
        dst = torch.randperm(12, generator=generator)[:count]
        move_kv(storage, src, dst)
        for source, target in zip(src.tolist(), dst.tolist(), strict=True):
            wanted[:, :, target] = old[:, :, source]
        assert torch.equal(storage.view(3, 2, 12, 2, 5), wanted)


def test_a_move_is_one_read_and_one_write_however_many_layers() -> None:
    slots = torch.arange(2)
    with torch.profiler.profile() as profile:
        move_kv(torch.zeros(7, 2, 4, 3, 2, 5), slots, slots + 1)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert (calls["aten::index_select"], calls["aten::index_copy_"]) == (1, 1)


def rope_case(
    device: str, dtype: torch.dtype, *, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: bool
) -> dict[str, Any]:
    """Arguments of rope_and_write for 5 tokens, all but the caches."""
    generator = torch.Generator().manual_seed(head_dim + heads)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    width = (heads + 2 * kv_heads) * head_dim
    angles = torch.arange(40)[:, None] * 0.3 ** torch.arange(rotary_dim // 2)
    angles = torch.cat((angles, angles), dim=1)
    return {
        "qkv": randn(5, width + 16)[:, :width],  # strided, as a view of wider rows is
        "positions": torch.tensor([3, 0, 39, 4, 4], device=device),
        "cos": angles.cos().to(device=device, dtype=dtype),
        "sin": angles.sin().to(device=device, dtype=dtype),
        "slots": torch.tensor([7, 0, 11, 2, 8], device=device),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "q_norm": randn(head_dim) if norm else None,
        "k_norm": randn(head_dim) if norm else None,
        "eps": 1e-6,
    }


def test_rope_and_write_is_what_qwen3_does_to_queries_and_keys() -> None:
    arguments = rope_case("cpu", torch.bfloat16, heads=4, kv_heads=2, head_dim=16, rotary_dim=16, norm=True)
    caches = [torch.zeros(4, 3, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    output = rope_and_write_reference(**arguments, key_cache=caches[0], value_cache=caches[1])
    query, key, value = arguments["qkv"].unflatten(1, (8, 16)).split([4, 2, 2], dim=1)
    normed = []
    for heads, weight in ((query, arguments["q_norm"]), (key, arguments["k_norm"])):
        norm = Qwen3RMSNorm(16, eps=1e-6)
        norm.weight.data = weight
        normed.append(norm(heads).transpose(0, 1)[None])
    cos, sin = (arguments[name][arguments["positions"]][None] for name in ("cos", "sin"))
    query, key = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*normed, cos, sin))
    assert torch.equal(output, query)
    for cache, entries in zip(caches, (key, value), strict=True):
        assert torch.equal(cache.flatten(0, 1)[arguments["slots"]], entries)


DEVICES = [
    pytest.param(
        "cpu",
        torch.float32,
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets where no CUDA device is seen"),
    ),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(4, 2, 16, 16), (9, 3, 64, 64), (3, 1, 80, 32), (2, 2, 96, 96)]
)
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_the_kernel_writes_what_the_reference_writes_and_nothing_else(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: bool
) -> None:
    arguments = rope_case(
        device, dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, norm=norm
    )
    results = []
    for write in (rope_and_write_reference, rope_and_write_triton):
        caches = [torch.full((4, 3, kv_heads, head_dim), torch.nan, device=device, dtype=dtype) for _ in range(2)]
        results.append((write(**arguments, key_cache=caches[0], value_cache=caches[1]), *caches))
    # bfloat16: the mean of squares is summed in another order, so a norm may round to its neighbour
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", None), *DEVICES])
def test_compacting_closes_up_each_row_and_leaves_the_rest(device: str, dtype: torch.dtype | None) -> None:
    move = compact_reference if dtype is None else compact_triton
    storage = torch.randn(3, 2, 6, 4, 3, 5).to(device=device, dtype=dtype)
    wanted = storage.clone().flatten(2, 3)
    old = wanted.clone()
    # a path with gaps whose targets are others' sources; nothing to do; padding before, between and after
    src = torch.tensor([[4, 6, 7, 9, -1], [12, 13, -1, -1, -1], [-1, 22, -1, 23, 20]])
    dst = torch.tensor([[4, 5, 6, 7, -1], [12, 13, 14, 15, 16], [18, 19, 21, 20, -1]])
    for source, target in zip(src.flatten().tolist(), dst.flatten().tolist(), strict=True):
        if source >= 0 and target >= 0:
            wanted[:, :, target] = old[:, :, source]
    move(storage, src.to(device), dst.to(device))
    assert torch.equal(storage.flatten(2, 3), wanted)

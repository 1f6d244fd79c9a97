"""KV entries land in their slots and nowhere else, and overlapping moves read before they write."""

import torch

from kernels.cache import move_kv, write_kv


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

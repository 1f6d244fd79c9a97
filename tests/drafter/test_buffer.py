"""The feature buffer: bounds, favours, held-out prompts and threads."""

import threading
from collections import Counter

import pytest
import torch

from drafter.buffer import MAX_AGE, FeatureBuffer, FeatureWindow, is_heldout

H = 4
TRAINED = next(f"p{index}" for index in range(100) if not is_heldout(f"p{index}"))
HELDOUT = next(f"p{index}" for index in range(100) if is_heldout(f"p{index}"))


def window(first: int, length: int = 8, *, prompt_id: str = TRAINED, version: int = 0) -> FeatureWindow:
    """Features that tell their position: every field holds it, next_ids the one after."""
    positions = torch.arange(first, first + length)
    column = positions.float()[:, None]
    return FeatureWindow(
        prompt_id=prompt_id,
        first=first,
        version=version,
        token_ids=positions.int(),
        next_ids=positions.int() + 1,
        aux=column.expand(-1, 3 * H).contiguous(),
        hidden=column.expand(-1, H).contiguous(),
        alt_ids=torch.full_like(positions, -1),
        alt_hidden=torch.zeros(length, H),
    )


def buffer(windows: int = 64) -> FeatureBuffer:
    """Room for about so many windows of 8 positions to train on."""
    return FeatureBuffer(max_bytes=window(0).num_bytes * windows * 8 // 7 + 8, temperature=1.0)


def test_a_batch_is_windows_end_to_end_at_their_true_positions() -> None:
    kept = buffer()
    for first, length in ((0, 8), (40, 3), (200, 5)):
        kept.add(window(first, length, version=2))
    batch = kept.batch(1000)
    bounds = batch.cu_seqlens.tolist()
    assert sorted(end - begin for begin, end in zip(bounds, bounds[1:], strict=False)) == [3, 5, 8]
    assert bounds[-1] == 16 and batch.cu_seqlens.dtype == torch.int32
    assert torch.equal(batch.positions, batch.token_ids) and torch.equal(batch.next_ids, batch.token_ids + 1)
    assert torch.equal(batch.hidden[:, 0].long(), batch.positions)
    assert batch.versions.tolist() == [2, 2, 2] and batch.temperature == 1.0


def test_memory_stays_within_the_bound_and_the_oldest_go_first() -> None:
    kept = FeatureBuffer(max_bytes=window(0).num_bytes * 8, temperature=1.0)
    for version in range(5):
        for _ in range(7):
            kept.add(window(0, version=version))
    assert kept.num_bytes <= window(0).num_bytes * 8
    assert kept.batch(1000).versions.tolist() == [4] * 7


def test_a_rare_late_window_outlives_many_early_ones() -> None:
    kept = buffer(windows=10)
    kept.add(window(4096))
    for _ in range(100):
        kept.add(window(0))
    assert 4096 in kept.batch(10_000).positions


def test_late_windows_are_drawn_as_often_as_early_ones() -> None:
    kept = buffer(windows=64)
    for first in [0] * 40 + [1000] * 4:
        kept.add(window(first))
    drawn = Counter(int(kept.batch(8).positions[0]) for _ in range(400))
    assert drawn[1000] == pytest.approx(200, abs=50)


def test_no_window_is_in_a_batch_twice_and_a_batch_keeps_its_size() -> None:
    kept = buffer()
    for index in range(20):
        kept.add(window(8 * index))
    batch = kept.batch(50)
    assert batch.token_ids.shape[0] == 48
    assert batch.token_ids.unique().shape[0] == 48


def test_held_out_prompts_are_never_trained_on() -> None:
    kept = buffer()
    kept.add(window(0))
    kept.add(window(600, prompt_id=HELDOUT))
    kept.add(window(700, prompt_id=HELDOUT))
    assert kept.batch(1000).positions.max() < 8
    heldout = kept.heldout(1000, version=0)
    assert heldout is not None and heldout.positions.min() >= 600 and len(heldout.positions) == 16
    newest = kept.heldout(8, version=0)
    assert newest is not None and newest.positions.min() == 700, "the newest come first"


def test_only_features_of_the_version_asked_for_judge() -> None:
    kept = buffer()
    kept.add(window(600, prompt_id=HELDOUT))
    assert kept.heldout(8, version=1) is None, "the present policy has answered no held-out prompt yet"
    kept.add(window(0, version=1))
    assert kept.heldout(8, version=1) is None and kept.heldout(8, version=0) is None
    kept.add(window(700, prompt_id=HELDOUT, version=1))
    kept.add(window(800, prompt_id=HELDOUT, version=0))  # late: of a policy that is no more
    heldout = kept.heldout(1000, version=1)
    assert heldout is not None and heldout.versions.tolist() == [1]


def test_features_of_old_policies_are_dropped() -> None:
    kept = buffer()
    kept.add(window(0))
    kept.add(window(0, prompt_id=HELDOUT))
    kept.add(window(1000, version=MAX_AGE + 1))
    assert kept.batch(1000).versions.tolist() == [MAX_AGE + 1]
    assert kept.num_bytes == window(0).num_bytes and kept.newest == MAX_AGE + 1


def test_windows_made_in_inference_mode_can_be_learned_from() -> None:
    kept = buffer()
    with torch.inference_mode():
        kept.add(window(0))
    weight = torch.ones(H, requires_grad=True)
    (kept.batch(8).hidden * weight).sum().backward()
    assert weight.grad is not None


def test_batches_can_be_drawn_while_windows_are_added() -> None:
    kept = buffer(windows=16)
    kept.add(window(0))
    failures: list[BaseException] = []

    def add() -> None:
        try:
            for index in range(500):
                kept.add(window(8 * (index % 300), version=index // 100))
        except BaseException as error:
            failures.append(error)

    adders = [threading.Thread(target=add) for _ in range(2)]
    for adder in adders:
        adder.start()
    while any(adder.is_alive() for adder in adders):
        batch = kept.batch(64)
        assert torch.equal(batch.positions, batch.token_ids)
    assert not failures

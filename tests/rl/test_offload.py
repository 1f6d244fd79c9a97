"""Memory that is lent comes back bit for bit, and training does not notice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.offload import Shelf
from rl.trainer import DeepSpeedTrainer
from rl.types import Batch

MakeTrainer = Callable[..., DeepSpeedTrainer]
KINDS = [
    ("float32", 0),
    ("float32", 1),
    ("float32", 2),
    ("float32", 3),
    ("bfloat16", 1),
    ("bfloat16", 2),
    ("bfloat16", 3),
]


def test_storages_are_emptied_and_filled_again_behind_their_views() -> None:
    flat, buffer = torch.randn(1000), torch.randn(10)
    views = [flat[:300], flat[300:].view(70, 10), buffer[5:]]
    before = [view.clone() for view in views]
    shelf = Shelf(torch.device("cpu"))
    assert shelf.put_away([flat, views[0], views[1]], [buffer, flat]) == 4000 + 40
    assert all(view.untyped_storage().nbytes() == 0 for view in views)
    shelf.bring_back()
    assert all(torch.equal(view, old) for view, old in zip(views[:2], before[:2], strict=True))
    assert views[0].data_ptr() + 1200 == views[1].data_ptr()  # still one storage
    assert torch.equal(views[2], torch.zeros(5))
    views[1].add_(1)
    assert shelf.put_away([flat], []) == 4000
    shelf.bring_back()
    assert torch.equal(views[1], before[1] + 1)


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
def test_lending_optimiser_states_changes_no_bit(
    make_trainer: MakeTrainer, batch: Batch, tmp_path: Path, dtype: str, stage: int
) -> None:
    options = {"dtype": dtype, "zero_stage": stage, "max_grad_norm": 0.5, "micro_tokens": 40, "updates_per_step": 2}
    options |= {} if stage == 3 else {"kl_coef": 0.1}
    keeping, lending = make_trainer(**options), make_trainer(offload="rollout", **options)
    for _ in range(3):
        kept, lent = keeping.step(batch), lending.step(batch)
        assert kept.offloaded_bytes == 0 < lent.offloaded_bytes
        assert replace(kept, seconds=0) == replace(lent, seconds=0, offloaded_bytes=0)
    for trainer, folder in ((keeping, tmp_path / "keeping"), (lending, tmp_path / "lending")):
        folder.mkdir()
        trainer.save(folder)
    for file in (tmp_path / "keeping").iterdir():
        assert file.read_bytes() == (tmp_path / "lending" / file.name).read_bytes(), file.name
    lending.load(tmp_path / "keeping")
    assert replace(keeping.supervise(batch, 1e-3), seconds=0) == replace(lending.supervise(batch, 1e-3), seconds=0)


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
def test_what_is_lent_is_all_but_what_is_sampled_from(
    make_trainer: MakeTrainer, batch: Batch, dtype: str, stage: int
) -> None:
    trainer = make_trainer(dtype=dtype, zero_stage=stage, offload="rollout")
    trainer.step(batch)
    parameters = sum(shape.numel() for shape in trainer.shares.shapes.values())
    masters = 0 if stage == 0 else 4
    assert trainer.lent_bytes >= (8 + masters) * parameters
    assert all(state.untyped_storage().nbytes() == 0 for state in trainer.shares.states())
    assert all(buffer.untyped_storage().nbytes() == 0 for buffer in trainer.shares.gradient_buffers())
    logprobs, _ = trainer.policy(trainer._rounds(batch)[0], 1.0)  # the policy itself is where it was
    assert logprobs.isfinite().all()


def test_room_is_made_before_the_states_come_back(make_trainer: MakeTrainer, batch: Batch, tmp_path: Path) -> None:
    trainer = make_trainer(offload="rollout")
    held: list[int] = []
    trainer.make_room = lambda: held.append(sum(state.untyped_storage().nbytes() for state in trainer.shares.states()))
    trainer.step(batch)
    trainer.save(tmp_path)
    assert held == [0, 0]

"""Sparse decoding under the clock: what is checked and what is told."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from kernels.select import BlockLists, Choice
from launch import bench_sparse
from launch.bench import app
from launch.bench_attention import Heads
from launch.bench_report import WrongResultError
from launch.sparse_operands import Operands, masked, operands

HEADS = Heads(4, 2, 64)


def make_job(**changes: object) -> bench_sparse.Job:
    how = {"sizes": ((2, 300),), "sparsities": (0.5,), "selectors": ("gate", "gate-fp8", "quest", "mean"), "seed": 0}
    return bench_sparse.Job(heads=HEADS, device="cpu", dtype="float32", **(how | changes))  # type: ignore[arg-type]


def test_the_command_writes_a_line_for_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "sparse.json"
    options = ["--heads", "4,2,64", "--batches", "1,2", "--contexts", "1280", "--left-out", "50,90"]
    done = CliRunner().invoke(app, ["sparse", *options, "--device", "cpu", "--json", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [(cell["selector"], cell["batch"], cell["sparsity"]) for cell in result["cells"]] == [
        (selector, batch, share) for batch in (1, 2) for selector in ("gate", "quest") for share in (0.5, 0.9)
    ]
    for cell in result["cells"]:
        fastest = min(times["median"] for times in cell["dense_us"].values())
        assert cell["speedup"] == pytest.approx(fastest / cell["us"]["median"])


@pytest.mark.parametrize("selector", ["gate", "gate-fp8", "quest", "mean"])
def test_lists_are_short_and_their_masked_form_is_what_sparse_attention_computes(selector: str) -> None:
    torch.manual_seed(0)
    given = operands(HEADS, 2, 300, selector, dtype=torch.float32, device=torch.device("cpu"))
    block = {"gate": 64, "gate-fp8": 64, "quest": 16, "mean": 64}[selector]
    choice = Choice(max_blocks=2, budget_blocks=2)
    lists = given.lists(choice, block)
    assert int(lists.counts.max()) <= 2
    torch.testing.assert_close(given.sparse(choice, block, 0.125), masked(given, lists, 0.125)[:, 0])


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(given: Operands, lists: BlockLists, scale: float) -> torch.Tensor:
        return masked(given, BlockLists(lists.blocks, lists.counts - 1, lists.select_block), scale)

    monkeypatch.setattr(bench_sparse, "masked", forgetful)
    with pytest.raises(WrongResultError, match="quest, 2 x 300"):
        bench_sparse.run(make_job(selectors=("quest",)), fa3_at=None, tilelang_file=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--selectors", "guess"], "'guess' is none of gate, gate-fp8, quest, mean"),
        (["--selectors", ""], "--selectors '': give different names with commas between"),
        (["--selectors", "quest,quest"], "--selectors 'quest,quest': give different names"),
        (
            ["--contexts", "1280,300"],
            "--contexts 300: gate reads 2 blocks of 64 in any case, more than --left-out 90% leaves; give 1280 or more",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_timed(options: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        app(["sparse", "--heads", "4,2,64", "--batches", "1", "--device", "cpu", *options], standalone_mode=False)

"""The peers of sparse decoding: FlashAttention-3 in a process of its own, TileLang's kernel from the user's file."""

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from configs.errors import ConfigError, PreflightError
from kernels.select import BlockLists, Choice
from launch import bench_sparse, sparse_peers
from launch.bench import app
from launch.bench_attention import Heads
from launch.sparse_operands import Operands, masked, operands
from launch.sparse_peers import TILE_BLOCK, TileLang, tile_blocks, tile_cache

HEADS = Heads(4, 2, 64)
SCALE = 64**-0.5
SIZES = ((2, 300),)

# A stand-in with the published kernel's ways: it masks the first listed block alone, and leaves out -1.
STAND_IN = """
import torch
from heuristic import SIGN


class SparseFlashAttn(torch.nn.Module):
    def __init__(self, batch, heads, heads_kv, dim, dim_v, block_size):
        super().__init__()
        self.groups, self.block = heads // heads_kv, block_size

    def forward(self, query, keys, values, blocks, lengths):
        assert query.dtype == keys.dtype == values.dtype == torch.float16 and keys.is_contiguous()
        out = torch.empty_like(query)
        for b, head in [(b, head) for b in range(query.shape[0]) for head in range(query.shape[1])]:
            listed = [i for i in blocks[b, head // self.groups].tolist() if i >= 0]
            tokens = [torch.arange(i * self.block, min((i + 1) * self.block, keys.shape[1])) for i in listed]
            tokens[0] = tokens[0][tokens[0] < lengths[b]]
            seen = torch.cat(tokens)
            key, value = (side[b, seen, head // self.groups].float() for side in (keys, values))
            scores = key @ query[b, head].float() * query.shape[2] ** -0.5
            out[b, head] = SIGN * (scores.softmax(0) @ value)
        return out
"""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file beside its neighbour, as if tilelang were installed."""
    monkeypatch.setattr(sparse_peers.metadata, "version", lambda name: "0.0")
    monkeypatch.delitem(sys.modules, "heuristic", raising=False)
    (tmp_path / "heuristic.py").write_text("SIGN = 1\n")
    (tmp_path / "published.py").write_text(STAND_IN)
    return tmp_path / "published.py"


def decode(length: int, *, kept: int, device: str = "cpu") -> tuple[Operands, BlockLists]:
    torch.manual_seed(0)
    given = operands(HEADS, 2, length, "mean", dtype=torch.float32, device=torch.device(device))
    return given, given.lists(Choice(max_blocks=kept, budget_blocks=kept), TILE_BLOCK)


def make_job(**changes: object) -> bench_sparse.Job:
    how = {"sizes": SIZES, "sparsities": (0.5,), "selectors": ("mean", "quest"), "seed": 0}
    return bench_sparse.Job(heads=HEADS, device="cpu", dtype="float32", **(how | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [256, 300])
def test_tilelangs_operands_say_the_same_decode(length: int, published: Path) -> None:
    given, lists = decode(length, kept=3)
    peer, cache = sparse_peers.tilelang(published), tile_cache(given)
    kernel = peer.kernel(2, HEADS.query, HEADS.key, HEADS.dim, HEADS.dim, TILE_BLOCK)
    result = kernel(cache.query, cache.keys, cache.values, tile_blocks(lists), cache.lengths)
    torch.testing.assert_close(result.float(), masked(given, lists, SCALE)[:, 0], rtol=1e-2, atol=1e-2)


def test_tilelangs_lists_begin_with_the_newest_block_and_end_with_what_is_none() -> None:
    blocks = torch.tensor([[[0, 2, 5, 7], [1, 4, 0, 9]]], dtype=torch.int32)
    lists = BlockLists(blocks, torch.tensor([[4, 2]], dtype=torch.int32), TILE_BLOCK)
    assert tile_blocks(lists).tolist() == [[[7, 5, 2, 0], [4, 1, -1, -1]]]


def test_tilelang_is_timed_over_the_same_lists_of_64_token_blocks(published: Path) -> None:
    result = bench_sparse.run(make_job(), fa3_at=None, tilelang_file=published)
    mean, quest = result["cells"]
    assert mean["tilelang"]["how"] == "eager" and mean["tilelang"]["us"]["median"] > 0
    assert quest["tilelang"] is None
    assert result["tilelang"]["file"] == "published.py"
    page = io.StringIO()
    Console(file=page, width=240).print(bench_sparse.table(result))
    assert "TileLang 0.0" in page.getvalue() and f"{mean['tilelang']['us']['median']:.1f}*" in page.getvalue()


def test_a_wrong_peer_is_not_timed(published: Path) -> None:
    (published.parent / "heuristic.py").write_text("SIGN = -1\n")
    with pytest.raises(PreflightError, match=r"--tilelang: 2 x 512: its result is 2 of its norm away"):
        bench_sparse.run(make_job(), fa3_at=None, tilelang_file=published)


def test_a_kernel_that_does_not_compile_says_why(published: Path) -> None:
    (published.parent / "heuristic.py").write_text("SIGN = None\n")
    with pytest.raises(PreflightError, match=r"--tilelang: 2 x 512: its kernel fails \(TypeError: .*NoneType"):
        bench_sparse.run(make_job(), fa3_at=None, tilelang_file=published)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["graph", "eager"])
def test_a_kernel_that_no_graph_captures_is_timed_by_its_launches(how: str) -> None:
    given, lists = decode(256, kept=2, device="cuda")
    expected = masked(given, lists, SCALE)

    def call(*operands: torch.Tensor) -> torch.Tensor:
        if how == "eager":
            float(operands[0].sum())  # a capture does not wait for the device
        return expected[:, 0].half()

    peer = TileLang(lambda *shape: call, said={})
    assert peer.timed([tile_cache(given)], expected, "2 x 256", [lists])["how"] == how
    assert torch.randn(8, device="cuda").isfinite().all()


def test_a_file_that_is_not_tilelangs_is_refused_with_the_one_to_give(published: Path) -> None:
    for file, why in (
        (published.parent / "none.py", "no such file"),
        (published.parent / "heuristic.py", "defines no"),
    ):
        with pytest.raises(ConfigError, match=f"--tilelang .*{why}.*example_tilelang_sparse_gqa_decode") as refused:
            sparse_peers.tilelang(file)
        assert refused.value.exit_code == 2


def test_a_file_whose_neighbour_is_missing_is_refused_and_leaves_the_path_as_it_was(published: Path) -> None:
    (published.parent / "heuristic.py").unlink()
    before = list(sys.path)
    with pytest.raises(PreflightError, match="cannot be imported .*heuristic.*its heuristic.py beside it"):
        sparse_peers.tilelang(published)
    assert sys.path == before


def test_a_file_of_another_release_of_tilelang_says_what_it_misses(published: Path) -> None:
    published.write_text("import json\n\njson.PassConfigKey\n")
    with pytest.raises(PreflightError, match="cannot be imported .*no attribute 'PassConfigKey'.*; give examples/"):
        sparse_peers.tilelang(published)


def test_a_machine_without_tilelang_is_told_to_install_it(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(PreflightError, match="tilelang is missing; `pip install tilelang`"):
        sparse_peers.tilelang(published)


def test_tilelang_needs_blocks_of_its_size_and_a_gpu(published: Path) -> None:
    with pytest.raises(ConfigError, match="add gate or mean to --selectors"):
        bench_sparse.run(make_job(selectors=("quest",)), fa3_at=None, tilelang_file=published)
    done = CliRunner().invoke(app, ["sparse", "--device", "cpu", "--tilelang", str(published)])
    assert isinstance(done.exception, ConfigError) and "needs a GPU" in str(done.exception)


def test_flash_attentions_times_come_from_the_other_python(tmp_path: Path) -> None:
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\nwhile read line; do echo '{\"us\": [3.0, 1.0, 2.0]}'; done\n")
    peer.chmod(0o755)
    result = bench_sparse.run(make_job(selectors=("mean",)), fa3_at=peer, tilelang_file=None)
    (cell,) = result["cells"]
    assert cell["dense_us"]["fa3"]["median"] == 2.0 and cell["fastest"] == "fa3"
    assert result["fa3"] == [{"batch": 2, "keys": 300, "us": [3.0, 1.0, 2.0]}]


def test_a_python_without_vllm_is_refused_by_name() -> None:
    with pytest.raises(PreflightError, match=r"--fa3 .* ended with 1: there is no vllm.*No module named 'vllm'; give"):
        sparse_peers.fa3(HEADS, SIZES, Path(sys.executable))


def test_what_is_neither_a_python_nor_a_folder_of_vllms_is_refused(tmp_path: Path) -> None:
    for where, remedy in ((tmp_path, "unzip vllm-.*whl"), (tmp_path / "none", "give the python of a venv")):
        with pytest.raises(ConfigError, match=f"--fa3 {where}.*{remedy}") as refused:
            sparse_peers.fa3(HEADS, SIZES, where)
        assert refused.value.exit_code == 2


def test_a_folder_whose_library_does_not_load_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    reason = "FA3_AVAILABLE = False\nFA3_UNAVAILABLE_REASON = 'undefined symbol: c10'\n"
    (folder / "flash_attn_interface.py").write_text(reason)
    (folder / "__init__.py").write_text(
        "from vllm.vllm_flash_attn import flash_attn_interface\nraise ImportError('no')\n"
    )
    with pytest.raises(PreflightError, match="does not load beside torch .*undefined symbol: c10; give a Python that"):
        sparse_peers.fa3(HEADS, SIZES, tmp_path)

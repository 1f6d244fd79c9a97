"""Rollouts over long contexts under the clock: drafts change nothing, lossy modes are marked, and all are ready."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.schema import SparseConfig
from drafter.eagle import EagleConfig, EagleHead
from drafter.export import write_drafter
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from drafter.layouts import Origin
from launch import bench_sparse_rollout
from launch.bench import app
from launch.bench_rollout import sampling
from launch.geometry import Subject
from launch.natural_text import overlapping_pieces
from rollout.model import load_policy
from rollout.types import Prompt

TEXT = "".join(f"{number} sheep and {number * number} goats, of which {number % 7} are lame. " for number in range(40))
BUDGET = 128  # holds what verifying samples


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return Subject("tiny", load_policy(tiny_model_dir, device="cpu", dtype="float32"), tiny_model_dir)


def make_job(**changes: Any) -> bench_sparse_rollout.Job:
    how: dict[str, Any] = {
        "sequences": 3,
        "prompt_tokens": 200,
        "new_tokens": 12,
        "modes": ("off", "draft", "rectified", "plain"),
        "selectors": ("quest", "verified"),
        "sparse": SparseConfig(budget_tokens=BUDGET, select_block=8, depth=4, every=5, window=16),
        "rounds": 1,
        "seed": 0,
    }
    return bench_sparse_rollout.Job(**(how | changes))


def measured(subject: Subject, job: bench_sparse_rollout.Job) -> dict[str, dict[str, Any]]:
    token_ids = [3 + byte for byte in TEXT.encode()]
    bench_sparse_rollout.require(job)
    pieces = overlapping_pieces("the text", token_ids, job.sequences, job.prompt_tokens)
    result = bench_sparse_rollout.run(subject, job, name="the text", pieces=pieces)
    assert result["kv_bytes"] == 3 * 256 * 2 * 2 * 2 * 16 * 4  # sequences, tokens in blocks, layers, K and V, heads
    return {cell["name"]: cell for cell in result["cells"]}


def test_drafts_of_every_selector_sample_what_is_sampled_without(subject: Subject) -> None:
    cells = measured(subject, make_job())
    assert list(cells) == ["off", "draft quest", "draft verified", "rectified quest", "plain quest"]
    for name in ("draft quest", "draft verified"):
        assert (cells[name]["equal"], cells[name]["compared"]) == (3, 3)
        assert cells[name]["accept_length"]["median"] > 1.5
        assert cells[name]["agreement"]["rollouts_equal"] == 3
    assert cells["off"]["accept_length"]["median"] == 1 and cells["off"]["budget"] is None
    under = {name: cell["sampled_under"] for name, cell in cells.items()}
    assert under["rectified quest"] == "rectified" and under["plain quest"] == "sparse" and under["off"] == "dense"


def test_drafts_that_another_drafter_speeds_up_sample_the_same(deep_model_dir: Path, tmp_path: Path) -> None:
    deep = Subject("deep", load_policy(deep_model_dir, device="cpu", dtype="float32"), deep_model_dir)
    head = EagleHead(EagleConfig.of(deep.model.config, draft_vocab=64, window=32))
    (tmp_path / "head").mkdir()
    origin = Origin("policy", [], "0" * 64, 1, 3)
    write_drafter(tmp_path / "head", head, layout="eagle3", dtype=torch.float32, origin=origin)
    job = make_job(
        modes=("off", "draft"),
        selectors=("verified",),
        inners=("off", "suffix", "eagle"),
        drafter=str(tmp_path / "head"),
    )
    bench_sparse_rollout.require(job)
    bench_sparse_rollout.require_fit(job, deep.model.config)
    token_ids = [3 + byte % 90 for byte in TEXT.encode()]
    pieces = overlapping_pieces("the text", token_ids, job.sequences, job.prompt_tokens)
    cells = bench_sparse_rollout.run(deep, job, name="the text", pieces=pieces)["cells"]
    assert [cell["name"] for cell in cells] == [
        "off",
        "draft verified",
        "draft verified suffix",
        "draft verified eagle",
    ]
    assert [cell["inner"] for cell in cells] == ["off", "off", "suffix", "eagle"]
    assert [cell["equal"] for cell in cells[1:]] == [3, 3, 3]


def test_engines_that_do_not_fit_together_take_turns_in_memory(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sparse_rollout, "available_bytes", lambda device: 0)
    cells = measured(subject, make_job(selectors=("streaming",), modes=("off", "draft"), rounds=2))
    assert cells["draft streaming"]["equal"] == 6
    assert len(cells["draft streaming"]["tokens_per_s"]["rounds"]) == 2


def test_drafts_alone_read_a_copy_of_the_weights(subject: Subject) -> None:
    sparse = SparseConfig(budget_tokens=BUDGET, select_block=8, weights="int8")
    sides = bench_sparse_rollout.make_sides(subject.model, make_job(sparse=sparse, selectors=("streaming",)))
    assert [side.config.weights for side in sides] == ["policy", "int8", "policy", "policy"]


def test_descriptors_in_fp8_are_a_side_of_their_own(subject: Subject, tmp_path: Path) -> None:
    gates = Gates(GateConfig.of(subject.model.config, select_block=8), seed=1)
    write_gates(tmp_path, gates, model_config=subject.model.config, base_model="tiny", dtype=torch.float32)
    sparse = SparseConfig(budget_tokens=BUDGET, select_block=8, depth=4, window=16, gate=str(tmp_path))
    cells = measured(subject, make_job(sparse=sparse, selectors=("gate", "gate-fp8"), modes=("off", "draft")))
    assert [cell["selector"] for cell in cells.values()] == [None, "gate", "gate-fp8"]
    assert [cells[name]["equal"] for name in ("draft gate", "draft gate-fp8")] == [3, 3]


def test_a_timed_run_finds_all_its_rows_made(subject: Subject) -> None:
    job = make_job(modes=("draft",), selectors=("streaming",))
    (side,) = bench_sparse_rollout.make_sides(subject.model, job)
    prompts = [Prompt(f"p{index}", [5 + index] * 200, "") for index in range(3)]
    bench_sparse_rollout.make_ready(side, subject.model, prompts, job)
    residency = side.engine._workspace.residency
    bench_sparse_rollout.roll_out(side.engine, prompts, sampling(12, seed=1))
    assert side.engine._workspace.residency is residency and residency is not None


def test_a_rollout_quicker_than_its_prompts_alone_has_no_rate_of_decoding(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sparse_rollout, "make_ready", lambda *_: 1e9)
    job = make_job(modes=("off",), sequences=1)
    pieces = [[3 + byte for byte in TEXT.encode()][: job.prompt_tokens]]
    result = bench_sparse_rollout.run(subject, job, name="the text", pieces=pieces)
    assert result["cells"][0]["decoded_per_s"] is None
    decoding = bench_sparse_rollout.table(result).columns[5]
    assert (decoding.header, list(decoding.cells)) == ("decoding", [""])


def test_the_command_writes_its_modes_and_draws_a_line_for_each(tiny_model_dir: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "rollout.json", tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--sequences", "2", "--prompt-tokens", "300", "--new-tokens", "4", "--budget", "256", "--depth", "2"]
    options += ["--modes", "off,plain", "--rounds", "1", "--text", str(text), "--device", "cpu", "--json", str(out)]
    done = CliRunner().invoke(app, ["sparse-rollout", "--model", str(tiny_model_dir), *options])
    assert done.exit_code == 0, done.output
    assert "plain quest" in done.stdout
    result = json.loads(out.read_text())
    assert [cell["name"] for cell in result["cells"]] == ["off", "plain quest"]
    assert set(result["verified"]) == {"off", "plain quest"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"selectors": ("quest", "best")}, "--selectors: 'best' is none of quest, resa, gate, "),
        ({"selectors": ("gate",)}, "--selectors gate needs --gate"),
        ({"modes": ("off", "fast")}, "--modes: 'fast' is none of off, draft, rectified, plain"),
        (
            {"sparse": SparseConfig(budget_tokens=96)},
            "--budget 96: mode rectified is proven on texts it reads whole",
        ),
        ({"selectors": ("verified",)}, "--selectors: plain goes by the first, and verifies nothing"),
        ({"new_tokens": 400}, "prompts and answers of 600 tokens exceed the model's context of 512"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(subject: Subject, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bench_sparse_rollout.require(job := make_job(**changes))
        bench_sparse_rollout.require_fit(job, subject.model.config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--modes", "off,fast"], "--modes: 'fast' is none of off, draft"),
        (["--selectors", "guess"], "--selectors: 'guess' is none of quest"),
        (["--selectors", "gate"], "--selectors gate needs --gate"),
        (["--selectors", "gate-fp8,duo", "--gate", "G"], "--selectors: gate and duo each read another --gate"),
        (["--selectors", "gate,duo", "--gate", "G"], "--selectors: gate and duo each read another --gate"),
        (["--selectors", "duo", "--gate", "/no/such/heads"], "^--gate /no/such/heads is no full_attention_heads.tsv"),
        (["--gate", "G"], "--gate G: nobody reads it; add gate or duo to --selectors, or leave it out"),
        (["--modes", "off,plain", "--weights", "int8"], "--weights int8: drafts alone read them; add draft to --modes"),
        (["--budget", "304"], "--budget 304 is all of 304 tokens, .* give less, or more --prompt-tokens"),
        (["--budget", "200"], "--budget 200: quest reads 256 tokens in any case; give 256 or more"),
        (["--block", "48"], "--block 48: blocks divide 64; give 16, 32 or 64"),
        (["--inner", "off,medusa"], "--inner: 'medusa' is none of off, suffix, eagle"),
        (["--inner", "suffix", "--modes", "off,plain"], "--inner suffix: speeds drafts up alone; add draft to --modes"),
        (["--inner", "eagle"], "--inner eagle needs --drafter FOLDER, as `paceline drafter train` writes it"),
        (["--drafter", "D"], "--drafter D: nobody reads it; add eagle to --inner, or leave it out"),
        (["--inner", "eagle", "--drafter", "/no/such/head"], "/no/such/head"),
        (["--new-tokens", "413"], "prompts and answers of 713 tokens exceed the model's context of 512"),
        (["--sequences", "9999"], "9999 texts of 300 tokens cannot differ"),
        (["--text", "/no/such/text"], "--text /no/such/text cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_the_weights_are_read(
    refuses_unread: Callable[[str, Sequence[str], str, str], None], options: list[str], says: str
) -> None:
    usual = ["--sequences", "2", "--prompt-tokens", "300", "--new-tokens", "4", "--budget", "256"]
    refuses_unread("sparse-rollout", [*usual, *options], TEXT, says)

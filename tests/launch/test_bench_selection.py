"""Quality of selection on a tiny model: what is reported follows from its definition."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError, DataError
from configs.schema import SparseConfig
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import write_gates
from kernels.attention import PackedSequences, paged_sequences
from launch import bench_selection
from launch.bench import app
from launch.bench_report import WrongResultError
from launch.geometry import Subject
from launch.natural_text import last_pieces, natural_tokens, overlapping_pieces
from launch.teacher_forced import BLOCK_SIZE, Forced
from launch.weighed import block_shares
from rollout.model import forward_packed, load_config, load_policy
from rollout.pretrained import load_tokenizer
from rollout.selectors import make_sparse

TOKENS = 300
TEXT = "".join(f"{number} sheep and {number * number} goats, of which {number % 7} are lame. " for number in range(40))


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return Subject("tiny", load_policy(tiny_model_dir, device="cpu", dtype="float32"), tiny_model_dir)


def make_job(**changes: object) -> bench_selection.Job:
    how = {"batch": 1, "tokens": TOKENS, "places": 20, "draws": 2, "selectors": ("quest",), "budgets": (64,), "seed": 0}
    return bench_selection.Job(**({"sparse": SparseConfig(window=16, select_block=4)} | how | changes))  # type: ignore[arg-type]


def measured(subject: Subject, job: bench_selection.Job) -> dict[tuple[str, int], dict[str, float]]:
    token_ids = load_tokenizer(Path(str(subject.folder))).encode(TEXT)
    pieces = last_pieces("the text", token_ids, job.batch, job.tokens)
    result = bench_selection.run(subject, job, name="the text", pieces=pieces)
    return {(cell["selector"], cell["budget"]): cell for cell in result["cells"]}


def test_the_command_writes_a_line_for_every_selector_and_budget(tiny_model_dir: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "selection.json", tmp_path / "text.txt"
    text.write_text(TEXT)
    options = [
        "--text",
        str(text),
        "--texts",
        "1",
        "--tokens",
        "400",
        "--places",
        "4",
        "--draws",
        "2",
        "--budgets",
        "256,320",
    ]
    done = CliRunner().invoke(
        app, ["selection", "--model", str(tiny_model_dir), *options, "--device", "cpu", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    names = ["quest", "mean", "streaming", "verified", "best"]
    assert [(cell["budget"], cell["selector"]) for cell in result["cells"]] == [
        (budget, name) for budget in (256, 320) for name in names
    ]
    assert all(0 < cell["mass_of_worst_layer"] <= cell["mass"] <= 1 for cell in result["cells"])
    assert all(0 <= cell["accept"] <= 1 and cell["places"] == 4 for cell in result["cells"])


def test_a_budget_of_everything_keeps_everything_and_draws_what_dense_draws(subject: Subject) -> None:
    names = ("quest", "mean", "streaming", "verified", "best")
    in_blocks = SparseConfig(window=16, select_block=4)
    cells = measured(subject, make_job(selectors=names, budgets=(64, 512), sparse=in_blocks))
    for name in names:
        whole = cells[name, 512]
        assert whole["mass_of_worst_layer"] == pytest.approx(1, abs=1e-5) and whole["kl"] < 1e-6, name
        assert cells[name, 64]["kl_median"] <= cells[name, 64]["kl_p90"], name
        assert (whole["accept"], whole["top1"]) == (1, 1), name
        assert cells[name, 64]["kl"] > 1e-4, name


def test_the_best_blocks_keep_more_attention_than_any_selector_finds(subject: Subject) -> None:
    cells = measured(subject, make_job(selectors=("quest", "streaming", "verified", "best")))
    # of the first layer alone all sides ask the same: deeper ones ask what the layers before made of them
    assert cells["best", 64]["mass"] > max(cells[name, 64]["mass"] for name in ("quest", "streaming", "verified"))


def test_descriptors_in_fp8_are_compared_with_those_of_the_policys_type(subject: Subject, tmp_path: Path) -> None:
    gates = Gates(GateConfig.of(subject.model.config, select_block=4), seed=1)
    write_gates(tmp_path, gates, model_config=subject.model.config, base_model="tiny", dtype=torch.float32)
    sparse = SparseConfig(window=16, select_block=4, gate=str(tmp_path))
    job = make_job(selectors=("gate", "gate-fp8"), sparse=sparse)
    bench_selection.require(job)
    cells = measured(subject, job)
    assert cells["gate-fp8", 64]["mass"] == pytest.approx(cells["gate", 64]["mass"], abs=0.05)
    assert cells["gate-fp8", 64]["kl"] != cells["gate", 64]["kl"]


@pytest.mark.parametrize("place", [63, 64, 65, 130, 191])
def test_a_place_says_what_decoding_there_says_and_leaves_its_text_as_it_was(subject: Subject, place: int) -> None:
    texts = torch.randint(259, (2, 192), generator=torch.Generator().manual_seed(1))
    sparse = make_sparse(SparseConfig(selector="verified", window=16), subject.model)
    forced = Forced(subject.model, texts, [sparse], num_rows=4, window=2)
    before = forced.cache.storage[:, :, : 2 * (-(-192 // BLOCK_SIZE))].clone()
    begin = place - 3
    logits = forced.logits(forced.places(1, begin, 4), None)
    with torch.no_grad():
        index = torch.arange(place + 1)
        seqs = PackedSequences(torch.tensor([0, place + 1], dtype=torch.int32), place + 1)
        wanted = forward_packed(subject.model, texts[1, : place + 1], index, seqs, index[-4:])
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(forced.cache.storage[:, :, : before.shape[2]], before, atol=0, rtol=0)


def test_shares_are_those_of_softmax_over_the_text_up_to_the_token(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(259, (1, 200), generator=generator)
    forced = Forced(subject.model, texts, [], num_rows=2, window=2)
    places = forced.places(0, 150, 2)
    keys, values = forced.cache.layer(0)
    query = torch.randn(2, 4, 16, generator=generator)
    shares = block_shares(query, keys, places, scale=0.3, select_block=16)
    for row, place in enumerate((150, 151)):
        # the row's own block holds the keys before it, and its own
        table = places.seqs.block_tables[row].long()
        seen = keys[table].flatten(0, 1)[: place + 1]
        probs = torch.einsum("hgd,shd->hgs", query[row].unflatten(0, (2, 2)) * 0.3, seen).softmax(dim=2)
        for block in range(shares.shape[3]):
            wanted = probs[:, :, block * 16 : (block + 1) * 16].sum(dim=2)
            torch.testing.assert_close(shares[row, :, :, block], wanted)


def test_what_does_not_say_what_training_says_is_not_measured(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_off(**given: Any) -> object:
        return paged_sequences(**given | {"context_lens": (given["context_lens"] - 1).clamp(min=0)})

    monkeypatch.setattr("launch.teacher_forced.paged_sequences", one_off)
    with pytest.raises(WrongResultError, match="dense places differ from the training forward by"):
        measured(subject, make_job())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 1024}, "--tokens 1024 exceeds the model's context of 512"),
        ({"places": 295}, "--tokens 300 leaves nothing before the last --places 295"),
        ({"selectors": ("guess",)}, "'guess' is none of quest, mean"),
        (
            {"selectors": ("quest", "duo")},
            "duo: .* sparse-rollout --selectors duo --gate FILE` measures",
        ),
        ({"selectors": ("gate",)}, "--selectors gate needs --gate FOLDER"),
        (
            {"sparse": SparseConfig(dense_layers=2, window=16, select_block=4)},
            "--dense-layers 2: no layer of 2 is left to select in; give fewer",
        ),
        ({"sparse": SparseConfig(select_block=48)}, "--block 48 does not divide 64; give 16, 32 or 64"),
        ({"budgets": (256, 95), "sparse": SparseConfig()}, "--budgets 95: quest reads 256 tokens .*; give 256"),
        (
            {"selectors": ("streaming",), "budgets": (95,), "sparse": SparseConfig()},
            "streaming reads 96 tokens .*; give 96",
        ),
        (
            {"selectors": ("mean",), "budgets": (128,), "sparse": SparseConfig()},
            "--budgets 128: mean reads 192 tokens in any case",
        ),
        (
            {"selectors": ("resa",), "budgets": (128,), "sparse": SparseConfig()},
            "--budgets 128: resa reads 256 tokens in any case",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    subject: Subject, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        bench_selection.require(job := make_job(**changes))
        bench_selection.require_fit(job, subject.model.config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--selectors", "guess"], "--selectors: 'guess' is none of quest"),
        (["--selectors", "gate"], "--selectors gate needs --gate FOLDER"),
        (["--gate", "/no/such/gates"], "/no/such/gates holds no gates: .*; set --gate to the folder of `paceline gate"),
        (
            ["--gate", "G", "--selectors", "quest"],
            "--gate G: nobody reads it; add gate to --selectors, or leave it out",
        ),
        (["--budgets", "256,300"], "--budgets 300 is all of 300 tokens, .* give less, or more --tokens"),
        (["--budgets", "100"], "--budgets 100: quest reads 256 tokens in any case"),
        (["--block", "48"], "--block 48 does not divide 64; give 16, 32 or 64"),
        (["--tokens", "1024"], "--tokens 1024 exceeds the model's context of 512; give fewer"),
        (["--texts", "9"], "9 texts of 300 tokens are 2700, and"),
        (["--text", "/no/such/text"], "--text /no/such/text cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_the_weights_are_read(
    refuses_unread: Callable[[str, Sequence[str], str, str], None], options: list[str], says: str
) -> None:
    usual = ["--texts", "1", "--tokens", "300", "--places", "4", "--budgets", "256"]
    refuses_unread("selection", [*usual, *options], TEXT, says)


def test_gates_of_other_blocks_name_the_options_that_were_given(
    refuses_unread: Callable[[str, Sequence[str], str, str], None], tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = load_config(tiny_model_dir)
    gates = Gates(GateConfig.of(config, select_block=16))
    write_gates(tmp_path, gates, model_config=config, base_model="tiny", dtype=torch.float32)
    given = ["--texts", "1", "--tokens", "300", "--places", "4", "--selectors", "gate", "--gate", str(tmp_path)]
    says = rf"^--gate {tmp_path} scores blocks of 16 tokens, not of 64; set --block 16$"
    refuses_unread("selection", [*given, "--budgets", "256"], TEXT, says)


def test_pieces_come_from_the_end_of_a_text_or_begin_evenly_apart() -> None:
    tokens = list(range(10))
    assert last_pieces("it", tokens, 2, 3) == [[4, 5, 6], [7, 8, 9]]
    assert overlapping_pieces("it", tokens, 3, 4) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert overlapping_pieces("it", tokens, 1, 10) == [tokens], "one need not differ from any"
    for count, length in ((12, 4), (2, 10), (1, 11)):
        with pytest.raises(ConfigError, match=f"{count} texts of {length} tokens cannot differ in it, which has 10"):
            overlapping_pieces("it", tokens, count, length)


def test_without_a_file_the_text_is_english() -> None:
    class Words:
        def __call__(self, text: str, **options: object) -> dict[str, list[bool]]:
            return {"input_ids": [word == "the" for word in text.split()]}

    _, words = natural_tokens(Words(), None)
    assert len(words) > 40_000 and sum(words) > 2000


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--text .*nothing\.txt cannot be read"):
        natural_tokens(None, tmp_path / "nothing.txt")

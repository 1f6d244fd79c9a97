"""Prompts from generators, files and the hub: what a row becomes, what is refused, and which step draws what."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from configs.errors import ConfigError, DataError, PacelineError, PreflightError
from configs.schema import DataConfig
from rl.data import DataSet, load_data

Load = Callable[..., DataSet]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Load:
    """load_data with small limits; keywords it does not know go to DataConfig."""

    def load_small(
        name: str | Path, *, num_heldout: int = 0, seed: int = 0, context: int = 2048, **options: Any
    ) -> DataSet:
        suffix = Path(name).suffix
        source = "file" if suffix else "reasoning_gym"
        config = DataConfig(**{"source": source, "name": str(name), "size": 200, **options})
        return load_data(
            config,
            tokenizer,
            seed=seed,
            context_length=context,
            max_new_tokens=16,
            num_heldout=num_heldout,
            quarantine=tmp_path / "quarantine.jsonl",
        )

    return load_small


def write_jsonl(path: Path, rows: list[Row | str | bytes]) -> Path:
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def numbered(count: int) -> list[Row | str | bytes]:
    return [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(count)]


def quarantined(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_a_row_becomes_the_chat_template_around_its_question(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "{x} and {question}?", "answer": 0.5, "solution": "half"}])
    (prompt,) = load(path, system="Be brief.", template="Q: {question} {0}").prompts(0, 1)
    assert tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: {x} and {question}? {0}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (prompt.id, prompt.answer) == ("a.jsonl:1", "0.5")
    assert prompt.task == {"question": "{x} and {question}?", "solution": "half"}


def test_a_tokenizer_without_a_chat_template_reads_plain_text(
    tokenizer: Any, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1))
    (prompt,) = load(path, system="Be brief.").prompts(0, 1)
    assert tokenizer.decode(prompt.token_ids) == "Be brief.\n\nWhat is 0 + 1?"


def test_jsonl_and_parquet_give_the_same_prompts(load: Load, tmp_path: Path) -> None:
    rows = [{"id": i, "q": f"{i}?", "a": str(i), "metadata": {"level": i}, "unused": [1.0] * 50} for i in range(30)]
    jsonl = load(write_jsonl(tmp_path / "a.jsonl", list(rows)), prompt_field="q", answer_field="a")
    parquet = load(write_parquet(tmp_path / "a.parquet", rows), prompt_field="q", answer_field="a")
    assert jsonl.prompts(1, 10) == parquet.prompts(1, 10)
    assert jsonl.prompts(0, 1)[0].task["metadata"] == {"level": int(jsonl.prompts(0, 1)[0].id)}


def test_a_hub_data_set_is_read_through_the_library(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}

    class Table(list[Row]):
        column_names = ["question", "answer", "audio"]

        def select_columns(self, names: list[str]) -> list[Row]:
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(path: str, **options: str) -> Table:
        asked.update(options, path=path)
        return Table({"question": f"{i}?", "answer": str(i), "audio": b""} for i in range(5))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load("org/gsm", source="hub", split="test", options={"name": "main"}, prompt_field="question")
    assert asked == {"path": "org/gsm", "split": "test", "name": "main"}
    assert sorted(prompt.answer for prompt in data.prompts(0, 5)) == ["0", "1", "2", "3", "4"]
    assert data.prompts(0, 1)[0].id.startswith("gsm:")
    with pytest.raises(ConfigError, match="data.options.trust_remote_code is unknown"):
        load("org/gsm", source="hub", options={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="data.prompt_field='prompt' is not a column of org/gsm"):
        load("org/gsm", source="hub")


def test_the_hub_needs_its_package_and_a_network(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PreflightError, match=r'pip install "paceline\[hub\]"'):
        load("org/gsm", source="hub")

    def load_dataset(name: str, **_: str) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        PreflightError, match="cannot load 'org/gsm' split 'train' from the hub: Couldn't reach the Hub;"
    ):
        load("org/gsm", source="hub")


BAD_LINES: list[tuple[Row | str | bytes, str]] = [
    ("{not json", "not JSON: "),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    ("[1]", "a JSON list, not an object"),
    ({"question": "?", "answer": "1"}, "no field 'prompt' among 'question', 'answer'; set data.prompt_field"),
    ({"prompt": "?"}, "no field 'answer' among 'prompt'; set data.answer_field"),
    ({"prompt": " ", "answer": "1"}, "field 'prompt' is empty"),
    ({"prompt": ["?"], "answer": "1"}, "field 'prompt' is a list, not text"),
    ({"prompt": "?", "answer": True}, "field 'answer' is a bool, not text"),
    ({"prompt": "\ud800", "answer": "1"}, "field 'prompt' holds half a surrogate pair at character 0"),
    ({"prompt": "?", "answer": "1", "id": "twice"}, "id 'twice' was seen before"),
    ({"prompt": "x" * 400, "answer": "1"}, "prompt of 419 tokens exceeds data.max_prompt_tokens=300; raise it"),
]


def test_bad_rows_are_quarantined_with_place_and_reason(load: Load, tmp_path: Path) -> None:
    good: list[Row | str | bytes] = [*numbered(20), {"prompt": "first", "answer": "1", "id": "twice"}, ""]
    path = write_jsonl(tmp_path / "a.jsonl", good + [row for row, _ in BAD_LINES])
    data = load(path, max_prompt_tokens=300, max_bad_fraction=0.5)
    assert len(data) == 21
    found = quarantined(tmp_path)
    assert [(row["file"], row["line"]) for row in found] == [(str(path), 23 + i) for i in range(len(BAD_LINES))]
    for row, (_, reason) in zip(found, BAD_LINES, strict=True):
        assert row["reason"].startswith(reason)


def test_loading_again_repeats_no_quarantined_row(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*numbered(9), "{"])
    for _ in range(2):
        load(path, max_bad_fraction=0.1)
    assert len(quarantined(tmp_path)) == 1


def test_too_many_bad_rows_stop_the_run(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*numbered(98), "{", "["])
    assert len(load(path, max_bad_fraction=0.02)) == 98
    with pytest.raises(DataError) as caught:
        load(path, max_bad_fraction=0.01)
    message = str(caught.value)
    assert caught.value.exit_code == 8
    assert message.startswith("2 of 100 rows are bad, data.max_bad_fraction=0.01 allows 1; first: ")
    assert f"{path}:99: not JSON" in message
    assert message.endswith(f"all are listed in {tmp_path / 'quarantine.jsonl'}")
    assert "\n" not in message


def test_a_parquet_row_that_is_not_utf8_is_bad_and_its_neighbours_are_not(load: Load, tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a?", b"\xff\xfe", b"c?"]).buffers())
    pq.write_table(pa.table({"prompt": broken, "answer": ["1", "2", "3"]}), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", max_bad_fraction=0.5)
    assert sorted(prompt.answer for prompt in data.prompts(0, 2)) == ["1", "3"]
    assert [(row["line"], row["reason"]) for row in quarantined(tmp_path)] == [(2, "not UTF-8 at byte 0")]


def test_a_prompt_longer_than_the_context_names_both_limits(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 100, "answer": "1"}])
    expected = "prompt of 119 tokens exceeds the 48 that rollout.max_new_tokens=16 leaves of the model's context of 64"
    with pytest.raises(DataError, match=expected):
        load(path, context=64)


def test_a_tokenizer_that_needs_more_tokens_than_bytes_is_caught_at_the_draw(
    tokenizer: Any, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("message['content']", "message['content'] * 20")
    )
    data = load(write_jsonl(tmp_path / "a.jsonl", numbered(1)), max_prompt_tokens=200)
    with pytest.raises(DataError, match=r"a.jsonl, row 'a.jsonl:1': prompt of \d+ tokens exceeds"):
        data.prompts(0, 1)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (PreflightError, "does not exist", {"name": "absent.jsonl"}),
        (ConfigError, "must end in one of .jsonl, .parquet", {"name": "rows.csv"}),
        (PreflightError, "as Parquet", {"name": "broken.parquet"}),
        (DataError, "has no rows to train on", {"name": "empty.jsonl"}),
        (ConfigError, "did you mean 'question'", {"name": "columns.parquet", "prompt_field": "questio"}),
        (ConfigError, "have no meaning for a file", {"name": "empty.jsonl", "options": {"a": 1}}),
        (ConfigError, "data.name is empty", {"name": "", "source": "file"}),
        (ConfigError, "has no {question}", {"name": "empty.jsonl", "template": "Solve."}),
        (ConfigError, "max_new_tokens=16 leaves no room", {"name": "empty.jsonl", "context": 16}),
        (ConfigError, "is not a reasoning-gym task; did you mean 'chain_sum'?", {"name": "chainsum"}),
        (ConfigError, "unexpected keyword argument 'min_term'", {"name": "chain_sum", "options": {"min_term": 2}}),
        (ConfigError, "min_terms must be positive", {"name": "chain_sum", "options": {"min_terms": 0}}),
        (ConfigError, "set by run.seed", {"name": "chain_sum", "options": {"seed": 2}}),
        (DataError, "prompt of", {"name": "chain_sum", "max_prompt_tokens": 10}),
        (DataError, "data.size=0", {"name": "chain_sum", "size": 0}),
    ],
)
def test_wrong_data_is_refused_in_one_line(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[PacelineError], message: str, options: Row
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.parquet").write_bytes(b"PAR1 not really")
    Path("empty.jsonl").write_bytes(b"\n")
    write_parquet(Path("columns.parquet"), [{"question": "?", "answer": "1"}])
    with pytest.raises(error) as caught:
        load(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_without_reference_answers_are_declared(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Write a poem."}])
    assert load(path, answer_field="").prompts(0, 1)[0].answer == ""


def test_no_more_rows_than_size_are_used(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*numbered(50), "{"])
    assert len(load(path, size=50)) == 50


@pytest.mark.parametrize("name", ["chain_sum", "rows.jsonl"])
def test_the_prompts_of_a_step_depend_on_seed_step_and_count_alone(load: Load, tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / name, numbered(50)) if name == "rows.jsonl" else name
    data, again = load(source, size=50, seed=3), load(source, size=50, seed=3)
    forward = [data.prompts(step, 8) for step in range(13)]
    assert [again.prompts(step, 8) for step in reversed(range(13))] == forward[::-1]
    assert [p.answer for p in load(source, size=50, seed=4).prompts(0, 8)] != [p.answer for p in forward[0]]


def test_an_epoch_draws_no_row_twice_and_the_next_is_shuffled_anew(load: Load, tmp_path: Path) -> None:
    data = load(write_jsonl(tmp_path / "a.jsonl", numbered(50)))
    epochs = [[p.id for step in range(6) for p in data.prompts(epoch * 6 + step, 8)] for epoch in range(2)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 48
    assert epochs[0] != epochs[1]
    with pytest.raises(ConfigError, match="51 prompts a step exceed the 50 training rows"):
        data.prompts(0, 51)


def test_held_out_file_rows_are_never_trained_on_and_ignore_seed_and_order(load: Load, tmp_path: Path) -> None:
    rows = [*numbered(100), *numbered(100)]  # every question twice, so that a split by row would leak
    data = load(write_jsonl(tmp_path / "a.jsonl", rows), num_heldout=12)
    held = [prompt.task["question"] for prompt in data.heldout(12)]
    assert len(set(held)) == 12
    assert len(data) == 200 - 24
    assert not set(held) & {prompt.task["question"] for prompt in data.prompts(0, len(data))}
    turned = load(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), num_heldout=12, seed=9)
    assert [prompt.task["question"] for prompt in turned.heldout(12)] == held


def test_at_most_a_tenth_of_a_file_is_held_out(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(45))
    assert len(load(path, num_heldout=64).heldout(64)) == 4
    with pytest.raises(ConfigError, match="has 9 rows, too few to hold out one in 10"):
        load(write_jsonl(tmp_path / "b.jsonl", numbered(9)), num_heldout=1)


def test_held_out_generated_questions_are_never_trained_on(load: Load) -> None:
    # 400 possible questions: among 200 training rows the generator repeats many of the 60 held out
    options = {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}
    data = load("chain_sum", options=options, num_heldout=60)
    held = {prompt.task["question"] for prompt in data.heldout(60)}
    trained = data.prompts(0, 200)
    assert len(held) == 60
    assert not held & {prompt.task["question"] for prompt in trained}
    assert len({prompt.id for prompt in trained}) == 200
    assert any(prompt.id.endswith(".1") for prompt in trained)
    other_seed = load("chain_sum", options=options, num_heldout=60, seed=1)
    assert data.heldout(10) == other_seed.heldout(10)


def test_too_few_distinct_questions_to_hold_out_say_so(load: Load) -> None:
    options = {"min_digits": 1, "max_digits": 1, "min_terms": 1, "max_terms": 1}
    with pytest.raises(ConfigError, match=r"eval.num_prompts=64 asks for more than the \d+ distinct questions"):
        load("chain_sum", options=options, num_heldout=64)


def test_generated_rows_that_are_too_long_are_replaced_and_counted(load: Load, tmp_path: Path) -> None:
    data = load(
        "spell_backward", options={"min_word_len": 3, "max_word_len": 12}, max_prompt_tokens=75, max_bad_fraction=1
    )
    prompts = data.prompts(0, 200)
    assert len({prompt.id for prompt in prompts}) == 200
    assert max(len(prompt.token_ids) for prompt in prompts) == 75
    reasons = [row["reason"] for row in quarantined(tmp_path)]
    assert reasons and all("exceeds data.max_prompt_tokens=75" in reason for reason in reasons)
    assert data.prompts(0, 200) == prompts


def test_neighbouring_seeds_share_no_rows(load: Load) -> None:
    # generators seed row i with seed + i
    questions = [{p.task["question"] for p in load("chain_sum", seed=seed).prompts(0, 200)} for seed in (0, 1)]
    assert len(questions[0] & questions[1]) < 5


def test_prompts_of_a_generator_survive_json(load: Load) -> None:
    for name in ("countdown", "graph_color", "course_schedule"):
        for prompt in load(name, size=32).prompts(0, 4):
            assert json.loads(json.dumps(prompt.task)) == prompt.task


def test_a_composite_of_tasks_is_a_task(load: Load) -> None:
    parts = [{"name": "chain_sum", "weight": 2.0}, {"name": "gcd", "config": {"max_numbers": 3}}]
    prompts = load("composite", options={"datasets": parts}).prompts(0, 32)
    assert {prompt.task["metadata"]["source_dataset"] for prompt in prompts} == {"chain_sum", "gcd"}

"""The sample browser's data: pages of a step's rollouts, and one with its drafts marked."""

from pathlib import Path

import pytest

from launch.monitor.reader import RunReader
from launch.monitor.samples import find_tokenizer, pieces, sample, sample_page


@pytest.fixture
def samples(written) -> Path:
    written.step(1)
    path = RunReader(written.path).samples(1)
    assert path is not None
    return path


def test_pages_cover_every_rollout_once(samples: Path) -> None:
    pages = [sample_page(samples, offset=offset, limit=3, order="prompt") for offset in (0, 3, 6, 9)]
    assert [row["row"] for page in pages for row in page["rows"]] == list(range(8))
    assert {page["total"] for page in pages} == {8}


@pytest.mark.parametrize(("order", "first"), [("best", 7), ("long", 7), ("reward", 0)])
def test_orders_put_the_wanted_first(samples: Path, order: str, first: int) -> None:
    assert sample_page(samples, offset=0, limit=1, order=order)["rows"][0]["row"] == first


def test_rollout_is_cut_where_drafts_begin(samples: Path, tiny_model_dir: Path) -> None:
    found = sample(samples, 3, find_tokenizer(str(tiny_model_dir)))
    assert found is not None
    assert found["pieces"] == [("say", False), (" 3", True)]
    assert found["plain"] == "" and "token_ids" not in found


def test_row_past_the_last_is_none(samples: Path) -> None:
    assert sample(samples, 8, None) is None


def test_text_without_its_tokenizer_is_whole_and_says_so(samples: Path) -> None:
    found = sample(samples, 3, find_tokenizer("/nowhere/model"))
    assert found is not None
    assert (found["text"], found["pieces"]) == ("say 3", [])
    assert "tokenizer is not on this machine" in found["plain"]


def test_tokenizer_is_that_of_the_model_and_of_none_whose_name_only_begins_alike(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-large-0123456789ab").symlink_to(tiny_model_dir)
    assert find_tokenizer("there/tiny-large.gguf") is not None
    assert find_tokenizer("tiny-large") is not None
    assert find_tokenizer("there/tiny.gguf") is None
    assert find_tokenizer("") is None


def test_character_of_several_tokens_stays_whole(tiny_model_dir: Path) -> None:
    tokenizer = find_tokenizer(str(tiny_model_dir))
    assert tokenizer is not None
    ids = tokenizer.encode("a€b").ids
    assert len(ids) == 5  # the tokenizer's are bytes
    assert pieces(ids, [False, False, False, True, True], tokenizer) == [("a", False), ("€b", True)]

"""Batches to train a drafter on: every position as likely as any other, whatever text it stands in."""

from pathlib import Path

import pytest
import torch

from drafter.eagle import EagleConfig
from drafter.features import FeatureBatch
from launch.subject import Subject, load_subject
from launch.windows import cut, features, training_batches
from rl.features import Text

LENGTHS = [3, 40, 8, 9, 1, 16, 100]


@pytest.fixture(scope="module")
def harvest() -> FeatureBatch:
    """Positions of seven texts, each known by its number."""
    total = sum(LENGTHS)
    numbers = torch.arange(total)
    return FeatureBatch(
        token_ids=numbers,
        next_ids=numbers + 1,
        positions=torch.cat([torch.arange(length) + 5 for length in LENGTHS]),
        aux=numbers[:, None] * torch.ones(6),
        hidden=numbers[:, None] * torch.ones(2),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        versions=torch.arange(len(LENGTHS)),
        alt_ids=numbers - 1,
        alt_hidden=numbers[:, None] * torch.ones(2),
        temperature=0.5,
    )


def test_windows_cover_every_position_once_and_never_two_texts(harvest: FeatureBatch) -> None:
    found = list(cut(harvest, window=8, num_windows=1, seed=0))
    assert torch.cat([batch.token_ids for batch in found]).sort().values.tolist() == list(range(sum(LENGTHS)))
    for batch in found:
        (version,) = batch.versions.tolist()
        start, end = harvest.cu_seqlens[version : version + 2].tolist()
        assert start <= batch.token_ids[0] and batch.token_ids[-1] < end
        assert len(batch.token_ids) <= 8 and batch.cu_seqlens.tolist() == [0, len(batch.token_ids)]
        assert (batch.positions.diff() == 1).all()
        assert torch.equal(batch.aux[:, 0].long(), batch.token_ids)
        assert torch.equal(batch.hidden[:, 0].long(), batch.alt_hidden[:, 1].long())
        assert torch.equal(batch.next_ids, batch.token_ids + 1) and torch.equal(batch.alt_ids, batch.token_ids - 1)
    lengths = [len(batch.token_ids) for batch in found if batch.versions.item() == 1]
    assert lengths == [8] * 5
    assert {len(batch.token_ids) for batch in found if batch.versions.item() == 3} == {4, 5}, "no slivers"


def test_batches_hold_equally_many_windows_and_what_is_left_is_dropped(harvest: FeatureBatch) -> None:
    found = list(cut(harvest, window=8, num_windows=4, seed=0))  # 1 + 5 + 1 + 2 + 1 + 2 + 13 windows
    assert [len(batch.versions) for batch in found] == [4] * 6
    assert all(len(batch.next_ids) == batch.cu_seqlens[-1] for batch in found)
    (whole,) = cut(harvest, window=100, num_windows=32, seed=0)
    assert sorted(whole.cu_seqlens.diff().tolist()) == sorted(LENGTHS), "fewer than a batch are one"
    again, other = (next(cut(harvest, window=8, num_windows=4, seed=seed)) for seed in (0, 1))
    assert torch.equal(again.token_ids, found[0].token_ids) and not torch.equal(other.token_ids, again.token_ids)


@pytest.fixture
def subject(tmp_path: Path, deep_model_dir: Path) -> Subject:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {deep_model_dir}\ncompute: {{device: cpu, dtype: float32}}\ndata: {{name: chain_sum}}\n")
    return load_subject(recipe, ["drafter.batch_tokens=32", "drafter.feature_window=8", "rollout.max_new_tokens=16"])


def test_windows_hold_the_features_of_their_texts_in_both_contexts(subject: Subject) -> None:
    texts = [Text([20 * n + i for i in range(20)], 7) for n in range(1, 9)]
    config = EagleConfig.of(subject.policy.config, draft_vocab=32, window=16)
    whole = features(subject, texts, config, 1.0, "server")
    place = {token: index for index, token in enumerate(whole.token_ids.tolist())}
    endless = training_batches(subject, [texts[0]], config, contexts=("rollout", "server"))
    first, second = next(endless), next(endless)
    assert first.token_ids.min() == 26 and second.token_ids.min() == 20, "from the prompt's last token, and all of it"
    assert len(first.token_ids) == 13 and len(second.token_ids) == 19
    for token, row in zip(first.token_ids.tolist(), first.aux, strict=True):
        torch.testing.assert_close(row, whole.aux[place[token]], rtol=1e-4, atol=1e-4)
    many = training_batches(subject, texts, config, contexts=("rollout",))
    assert [len(next(many).versions) for _ in range(5)] == [4] * 5

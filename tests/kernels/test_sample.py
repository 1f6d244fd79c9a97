"""The noise is noise, the samples follow the filtered distribution, and nothing but key and position decides them."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from kernels.sample import gumbel_noise, noise_key, sample

UNFILTERED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS: list[dict[str, Any]] = [
    UNFILTERED,
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.7, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.15},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


def filtered_probs(logits: list[float], *, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The definition, in float64 and plain loops: filter, renormalise, filter the rest."""
    largest = max(logits)
    weights = [math.exp((value - largest) / temperature) for value in logits]
    if top_k:
        threshold = sorted(weights, reverse=True)[:top_k][-1]
        weights = [w if w >= threshold else 0.0 for w in weights]
    total, mass, threshold = sum(weights), 0.0, math.inf
    for weight in sorted(weights, reverse=True):
        if mass < top_p * total and weight > 0:
            threshold = weight
        mass += weight
    weights = [w if w >= threshold else 0.0 for w in weights]
    threshold = min_p * max(weights)
    weights = [w if w >= threshold else 0.0 for w in weights]
    total = sum(weights)
    return [w / total for w in weights]


def chi_square_z(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    freedom = counts.numel() - 1
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def random_keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("filters", FILTERS)
def test_samples_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    keys = random_keys(50_000)
    token_ids, logprobs = sample(logits.expand(len(keys), -1), keys, torch.arange(len(keys)) % 7, **filters)
    probs = torch.tensor(filtered_probs(logits.tolist(), **filters), dtype=torch.float64)
    counts = torch.bincount(token_ids, minlength=24)
    assert not counts[probs == 0].any()
    assert abs(chi_square_z(counts[probs > 0], probs[probs > 0] * len(keys))) < 4
    torch.testing.assert_close(logprobs, probs.log().float()[token_ids], atol=2e-6, rtol=1e-5)


def test_every_token_of_every_sequence_has_its_enumerated_probability() -> None:
    """Three positions of a toy chain: the joint frequencies match the product of its conditionals."""
    vocab, runs = 3, 60_000
    table = torch.randn(vocab + 1, vocab, generator=torch.Generator().manual_seed(2))
    keys = torch.tensor([noise_key(seed=3, step=0, prompt_id="toy", sample=index) for index in range(runs)])
    previous, sequences = torch.full((runs,), vocab), []
    for position in range(3):
        previous, _ = sample(table[previous], keys, torch.full((runs,), position), **UNFILTERED)
        sequences.append(previous)
    counts = torch.bincount((sequences[0] * vocab + sequences[1]) * vocab + sequences[2], minlength=vocab**3)
    conditional = torch.softmax(table.double(), dim=1)
    joint = [
        conditional[vocab, a] * conditional[a, b] * conditional[b, c] for a, b, c in product(range(vocab), repeat=3)
    ]
    assert abs(chi_square_z(counts, torch.stack(joint) * runs)) < 4


def test_greedy_takes_the_largest_logit_with_logprob_zero() -> None:
    logits = torch.randn(5, 11)
    token_ids, logprobs = sample(
        logits, random_keys(5), torch.arange(5), **{**UNFILTERED, "temperature": 0.0, "top_k": 3}
    )
    assert token_ids.tolist() == logits.argmax(dim=1).tolist()
    assert logprobs.tolist() == [0.0] * 5


def test_logprobs_are_those_of_the_filtered_distribution_at_real_size() -> None:
    logits = (torch.randn(4, 49152, generator=torch.Generator().manual_seed(3)) * 3).bfloat16()
    filters: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
    token_ids, logprobs = sample(logits, random_keys(4), torch.arange(4), **filters)
    for row, token, logprob in zip(logits, token_ids.tolist(), logprobs.tolist(), strict=True):
        assert logprob == pytest.approx(math.log(filtered_probs(row.double().tolist(), **filters)[token]), abs=1e-5)


def test_tied_logits_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).expand(2000, -1)
    tied: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}]
    for filters in tied:
        token_ids, _ = sample(logits, random_keys(2000), torch.arange(2000), **{**UNFILTERED, **filters})
        assert set(token_ids.tolist()) == {0, 1, 2, 3}


def test_a_masked_logit_is_never_drawn() -> None:
    logits = torch.full((500, 40), -torch.inf)
    logits[:, 7] = -3.0
    token_ids, logprobs = sample(logits, random_keys(500), torch.arange(500), **UNFILTERED)
    assert set(token_ids.tolist()) == {7}
    assert not logprobs.any()


@pytest.mark.parametrize("vocab", [1, 3, 259, 50_257])
@pytest.mark.parametrize("filters", [UNFILTERED, {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01}])
def test_no_batch_or_order_changes_a_sample(vocab: int, filters: dict[str, Any]) -> None:
    rows = 33  # more than one chunk at the largest vocabulary
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4))
    keys, positions = random_keys(rows), torch.arange(rows)
    whole, logprobs = sample(logits, keys, positions, **filters)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
    for pieces in (order.split(1), order.split(7), (order,)):
        for piece in pieces:
            token_ids, piece_logprobs = sample(logits[piece], keys[piece], positions[piece], **filters)
            assert token_ids.tolist() == whole[piece].tolist()
            torch.testing.assert_close(piece_logprobs, logprobs[piece], atol=2e-6, rtol=1e-6)


def test_noise_is_the_same_in_any_batch_and_vocabulary() -> None:
    keys, positions = random_keys(9), torch.arange(9)
    whole = gumbel_noise(keys, positions, 1009)
    for index in range(9):
        assert torch.equal(gumbel_noise(keys[index : index + 1], positions[index : index + 1], 1009)[0], whole[index])
    assert torch.equal(gumbel_noise(keys, positions, 17), whole[:, :17])


def test_noise_has_pinned_values() -> None:
    """A run resumed under a later version must sample what it would have sampled."""
    key = noise_key(seed=7, step=11, prompt_id="gsm8k/12", sample=3)
    assert key == -1740612252045302714
    noise = gumbel_noise(torch.tensor([key]), torch.tensor([129]), 5)
    torch.testing.assert_close(
        noise, torch.tensor([[-0.616806, -0.191904, -0.914937, 2.692542, -1.45797]]), atol=1e-6, rtol=1e-6
    )


def test_every_part_of_the_identity_changes_the_key() -> None:
    identity: dict[str, Any] = {"seed": 1, "step": 2, "prompt_id": "3", "sample": 4}
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 2},
        {"step": 1},
        {"prompt_id": "4:3"},
        {"sample": 3},
        {"seed": 2, "step": 1},
    ]
    keys = {noise_key(**{**identity, **change}) for change in changes}
    assert len(keys) == len(changes)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_noise_is_finite_and_within_the_range_of_its_uniform() -> None:
    noise = gumbel_noise(random_keys(64), torch.arange(64), 49152)
    assert noise.isfinite().all()
    assert noise.min() >= -math.log(24 * math.log(2)) - 1e-4  # E <= -log(2^-24)
    assert noise.max() <= 32 * math.log(2) + 1e-4  # E >= 2^-32


def uniforms(keys: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """The noise turned back into uniforms, [N, vocab] float64."""
    return -torch.expm1(-torch.exp(-gumbel_noise(keys, positions, vocab).double()))


@pytest.mark.parametrize("source", ["positions", "samples", "consecutive keys"])
def test_noise_passes_uniformity_correlation_and_serial_tests(source: str) -> None:
    rows, vocab = 600, 4096
    if source == "positions":
        keys, positions = random_keys(1).expand(rows), torch.arange(rows)
    elif source == "samples":
        keys = torch.tensor([noise_key(seed=0, step=0, prompt_id="p", sample=index) for index in range(rows)])
        positions = torch.full((rows,), 12)
    else:
        keys, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    values = uniforms(keys, positions, vocab)
    scores = {"uniform": chi_square_z(torch.histc(values, 256, 0, 1), torch.full((256,), values.numel() / 256.0))}
    for tail in (1e-3, 1e-5):  # where winners come from
        expected = tail * values.numel()
        scores[f"tail {tail}"] = ((values < tail).sum().item() - expected) / math.sqrt(expected)
    normal = (values - 0.5) * math.sqrt(12)
    for row_lag, token_lag in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 1024)):
        first = normal[: rows - row_lag, : vocab - token_lag]
        second = normal[row_lag:, token_lag:]
        scores[f"lag {row_lag, token_lag}"] = (first * second).sum().item() / math.sqrt(first.numel())
        squares = (first**2 - 1) * (second**2 - 1) / 0.8
        scores[f"squares {row_lag, token_lag}"] = squares.sum().item() / math.sqrt(first.numel())
        pairs = (values[: rows - row_lag, : vocab - token_lag] * 16).long() * 16 + (
            values[row_lag:, token_lag:] * 16
        ).long()
        counts = torch.bincount(pairs.flatten(), minlength=256)
        scores[f"pairs {row_lag, token_lag}"] = chi_square_z(counts, torch.full((256,), pairs.numel() / 256.0))
    assert all(abs(score) < 4.5 for score in scores.values()), scores

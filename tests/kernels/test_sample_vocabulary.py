"""A reduced vocabulary is sampled with the noise of the tokens that its columns stand for."""

from typing import Any

import pytest
import torch

from kernels.sample import gumbel_noise, log_exponential_noise, sample_reference
from kernels.sample_triton import sample_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNFILTERED: dict[str, Any] = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
KINDS = [UNFILTERED, {**UNFILTERED, "temperature": 0.0}, {**UNFILTERED, "top_k": 5}, {**UNFILTERED, "top_p": 0.7}]


def random_rows(rows: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab_size, generator=random) * 3
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random)
    positions = torch.randint(0, 2**17, (rows,), generator=random)
    return logits.to(DEVICE), keys.to(DEVICE), positions.to(DEVICE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sample", [sample_reference, sample_triton])
def test_a_reduced_vocabulary_draws_what_the_whole_one_draws_from_it(sample, kind: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    logits, keys, positions = random_rows(6, 3000)
    kept = torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:1100].sort().values.to(DEVICE)
    whole = torch.full_like(logits, -torch.inf)
    whole[:, kept] = logits[:, kept]
    expected_ids, expected_logprobs = sample_reference(whole, keys, positions, **kind)
    token_ids, logprobs = sample(logits[:, kept].contiguous(), keys, positions, token_ids=kept.int(), **kind)
    assert token_ids.dtype == torch.int64
    assert token_ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logprobs, expected_logprobs, atol=3e-6, rtol=2e-6)


def test_the_noise_of_tokens_is_that_of_their_columns() -> None:
    _, keys, positions = random_rows(5, 1)
    token_ids = torch.tensor([70, 3, 999, 0], dtype=torch.int32, device=DEVICE)
    noise = log_exponential_noise(keys, positions, token_ids)
    assert torch.equal(-noise, gumbel_noise(keys, positions, 1000)[:, token_ids.long()])

"""What verification leaves behind of its scores, against every score written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.attention import BlockMaxima, paged_attention, paged_attention_reference

SCALE = 0.3
TREE = [-1, 0, 0, 1, 1, 2, 3]


def room(paged: Any, select_block: int, num_blocks: int) -> BlockMaxima:
    """Full of nothing a kernel may leave."""
    num_tokens, num_heads, _ = paged.query.shape
    device = paged.query.device
    return BlockMaxima(
        torch.full((num_tokens, num_heads, num_blocks), torch.nan, device=device),
        torch.full((num_tokens, num_heads), torch.nan, device=device),
        select_block,
    )


def check(
    attend: Callable[..., torch.Tensor],
    paged: Any,
    select_block: int,
    *,
    softcap: float | None = None,
    tolerance: float = 1e-5,
) -> None:
    longest = max(len(slots) for slots in paged.slots)
    maxima = room(paged, select_block, -(-longest // select_block) + 3)
    options: dict[str, Any] = {"scale": SCALE, "sliding_window": None, "softcap": softcap}
    output = attend(paged.query, *paged.caches, paged.seqs, **options, maxima=maxima)
    plain = attend(paged.query, *paged.caches, paged.seqs, **options)
    torch.testing.assert_close(output, plain, atol=tolerance, rtol=tolerance)
    for token, scores in enumerate(paged.scores(SCALE)):
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
            unseen = torch.ones(scores.shape[1], dtype=torch.bool)
            unseen[paged.seen[token][1]] = False
            scores[:, unseen] = -torch.inf
        wanted = torch.full(maxima.scores.shape[1:], -torch.inf, dtype=torch.float64)
        for block, part in enumerate(scores.split(select_block, dim=1)):
            wanted[:, block] = part.amax(dim=1)
        torch.testing.assert_close(maxima.scores[token].double().cpu(), wanted, atol=tolerance, rtol=tolerance)
        lse = scores.logsumexp(dim=1)
        torch.testing.assert_close(maxima.lse[token].double().cpu(), lse, atol=tolerance, rtol=tolerance)


CASES = [
    pytest.param([5, 0, 67], [1, 1, 1], None, id="decode"),
    pytest.param([0, 33], [40, 21], None, id="prefill"),
    pytest.param([3, 0, 130, 8], [4, 17, 1, 2], None, id="ragged"),
    pytest.param([16, 15, 17], [16, 17, 15], None, id="whole blocks"),
    pytest.param([60, 9, 30], [8, 7, 5], [TREE, TREE, [-1, 0, 0]], id="trees"),
]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("contexts", "news", "parents"), CASES)
def test_each_block_has_the_largest_score_a_token_sees_in_it(
    make_paged: Callable[..., Any],
    contexts: list[int],
    news: list[int],
    parents: list[list[int]] | None,
    softcap: float | None,
) -> None:
    check(paged_attention_reference, make_paged(contexts, news, parents=parents), 8, softcap=softcap)


def test_the_largest_weight_of_a_block_follows_from_both(make_paged: Callable[..., Any]) -> None:
    paged = make_paged([50], [1])
    maxima = room(paged, 16, 4)
    paged_attention(
        paged.query, *paged.caches, paged.seqs, scale=SCALE, sliding_window=None, softcap=None, maxima=maxima
    )
    weights = torch.softmax(paged.scores(SCALE)[0], dim=1)
    largest = torch.stack([part.amax(dim=1) for part in weights.split(16, dim=1)], dim=1)
    torch.testing.assert_close((maxima.scores[0] - maxima.lse[0, :, None]).exp().double(), largest)

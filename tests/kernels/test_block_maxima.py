"""What verification leaves behind of its scores, against every score written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.check import MOST_WEIGHED
from kernels.attention import BlockMaxima, paged_attention, paged_attention_reference
from kernels.attention_plan import Launch
from kernels.paged_attention import MAX_SELECT_BLOCK, paged_attention_triton

SCALE = 0.3
TREE = [-1, 0, 0, 1, 1, 2, 3]


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="triton interprets only where no CUDA device is seen")


def interpreted(*args: Any, fold: bool, slices: int = 1, **options: Any) -> torch.Tensor:
    """The kernel in small steps, so that few keys are cut into several chunks and steps."""
    launch = Launch(16, 16 * slices, num_warps=slices, num_stages=2, programs_per_sm=1, fold=fold, slices=slices)
    return paged_attention_triton(*args, launch=launch, min_chunk=16, **options)


def folded(*args: Any, **options: Any) -> torch.Tensor:
    return interpreted(*args, fold=True, **options)


def combined(*args: Any, **options: Any) -> torch.Tensor:
    return interpreted(*args, fold=False, **options)


def sliced(*args: Any, **options: Any) -> torch.Tensor:
    return interpreted(*args, fold=True, slices=2, **options)


KERNELS = [
    pytest.param(paged_attention_reference, id="reference"),
    pytest.param(folded, id="folded", marks=on_cpu),
    pytest.param(combined, id="combined", marks=on_cpu),
    pytest.param(sliced, id="sliced", marks=on_cpu),
]


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
    pytest.param([5, 0, 67], [1, 1, 1], None, None, id="decode"),
    pytest.param([0, 33], [20, 11], None, None, id="prefill"),
    pytest.param([3, 0, 50, 8], [4, 17, 1, 2], None, 2.0, id="ragged"),
    pytest.param([16, 15, 17], [16, 17, 15], None, None, id="whole blocks"),
    pytest.param([30, 9, 30], [8, 7, 5], [TREE, TREE, [-1, 0, 0]], None, id="trees"),
]


@pytest.mark.parametrize(("contexts", "news", "parents", "softcap"), CASES)
@pytest.mark.parametrize("attend", KERNELS)
def test_each_block_has_the_largest_score_a_token_sees_in_it(
    make_paged: Callable[..., Any],
    attend: Callable[..., torch.Tensor],
    contexts: list[int],
    news: list[int],
    parents: list[list[int]] | None,
    softcap: float | None,
) -> None:
    check(attend, make_paged(contexts, news, parents=parents), 8, softcap=softcap)


@pytest.mark.parametrize("select_block", [4, 32])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 2)])
@pytest.mark.parametrize("attend", KERNELS)
def test_blocks_of_any_size_and_any_number_of_heads(
    make_paged: Callable[..., Any], attend: Callable[..., torch.Tensor], heads: tuple[int, int], select_block: int
) -> None:
    paged = make_paged([70, 7], [2, 5], heads=heads, block_size=32)
    check(attend, paged, select_block)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 2), 128), ((9, 3), 64)])
@pytest.mark.parametrize(
    ("contexts", "news"), [([900, 64, 5], [1, 1, 1]), ([900, 64, 0], [17] * 3), ([0, 300], [300, 90])]
)
def test_maxima_on_the_gpu(
    make_paged: Callable[..., Any],
    contexts: list[int],
    news: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    paged = make_paged(contexts, news, heads=heads, head_dim=head_dim, block_size=64, device="cuda", dtype=dtype)
    for select_block in (16, 64):
        check(paged_attention, paged, select_block, tolerance=1e-3 if dtype == torch.float32 else 3e-2)


def test_the_largest_weight_of_a_block_follows_from_both(make_paged: Callable[..., Any]) -> None:
    paged = make_paged([50], [1])
    maxima = room(paged, 16, 4)
    paged_attention(
        paged.query, *paged.caches, paged.seqs, scale=SCALE, sliding_window=None, softcap=None, maxima=maxima
    )
    weights = torch.softmax(paged.scores(SCALE)[0], dim=1)
    largest = torch.stack([part.amax(dim=1) for part in weights.split(16, dim=1)], dim=1)
    torch.testing.assert_close((maxima.scores[0] - maxima.lse[0, :, None]).exp().double(), largest)


def test_a_config_asks_for_no_larger_blocks_than_a_step_holds() -> None:
    assert MOST_WEIGHED == MAX_SELECT_BLOCK

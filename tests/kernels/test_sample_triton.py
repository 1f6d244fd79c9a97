"""The Triton sampler draws what the reference draws, from the same bits, in any batch.

Without a CUDA device the kernels run under Triton's interpreter.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import kernels.sample
import kernels.sample_triton
from kernels.sample import noise_key, noise_words, sample, sample_reference
from kernels.sample_filter_triton import thresholds, tile_maxima
from kernels.sample_triton import TILE, sample_triton
from kernels.sample_triton import noise_words as kernel_noise_words
from kernels.sample_triton import row_words as kernel_row_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNFILTERED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
GREEDY = {**UNFILTERED, "temperature": 0.0}
FILTERS = [
    {"temperature": 0.7, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in product((0, 7), (1.0, 0.8), (0.0, 0.05))
]
KINDS = [UNFILTERED, GREEDY, *FILTERS[1:]]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter's NaN


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_rows(rows: int, vocab: int, *, seed: int = 0, spread: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Logits, keys and positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 2**17, (rows,), generator=generator)
    return logits.to(DEVICE), keys.to(DEVICE), positions.to(DEVICE)


def assert_same_draws(logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, **kind: Any) -> None:
    token_ids, logprobs = sample_triton(logits, keys, positions, **kind)
    expected_ids, expected_logprobs = sample_reference(logits.float(), keys, positions, **kind)
    assert token_ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert token_ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logprobs, expected_logprobs, atol=3e-6, rtol=2e-6)


def filtered_probs(logits: torch.Tensor, *, temperature: float, **filters: Any) -> torch.Tensor:
    """What the reference draws from. logits [N, V]. Returns [N, V]."""
    scaled = logits / temperature
    kernels.sample._filter(scaled, **filters)
    return torch.softmax(scaled, dim=1)


@triton.jit
def words_kernel(keys, positions, words, VOCAB: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0)
    low, high = kernel_row_words(tl.load(keys + row), tl.load(positions + row))
    token = tl.arange(0, VOCAB)
    tl.store(words + row * VOCAB + token, kernel_noise_words(token, low, high))


def test_noise_comes_from_the_bits_of_the_reference() -> None:
    _, keys, positions = random_rows(9, 1)
    keys[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    positions[3] = 0
    words = torch.empty(9, 4096, dtype=torch.int32, device=DEVICE)
    words_kernel[(9,)](keys, positions, words, VOCAB=4096)
    assert torch.equal(words, noise_words(keys, positions, 4096))


def test_the_bits_are_pinned() -> None:
    key = torch.tensor([noise_key(seed=7, step=11, prompt_id="gsm8k/12", sample=3)], device=DEVICE)
    words = torch.empty(1, 4, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](key, torch.tensor([129], device=DEVICE), words, VOCAB=4)
    assert words.tolist() == [[1810831031, 1508104590, 1970610242, 140589882]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 3), (2, TILE + 33)])
def test_draws_equal_the_reference(rows: int, vocab: int, kind: dict[str, Any]) -> None:
    assert_same_draws(*random_rows(rows, vocab), **kind)


@pytest.mark.parametrize("temperature", [0.05, 0.6, 5.0])
@pytest.mark.parametrize("spread", [0.01, 10.0])
def test_draws_equal_the_reference_on_flat_and_peaked_rows(temperature: float, spread: float) -> None:
    assert_same_draws(*random_rows(4, 3000, spread=spread), **{**UNFILTERED, "temperature": temperature})


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_no_winner_is_pruned(spread: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tiles, walked by one program, few are looked at closely."""
    monkeypatch.setattr(kernels.sample_triton, "TILE", 64)
    monkeypatch.setattr(kernels.sample_triton, "PROGRAMS", 1)
    assert_same_draws(*random_rows(8, 2000, spread=spread), **{**UNFILTERED, "temperature": temperature})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [UNFILTERED, GREEDY, FILTERS[-1]])
def test_half_precision_logits_are_read_as_they_are(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    logits, keys, positions = random_rows(2, 1300)
    assert_same_draws(logits.to(dtype), keys, positions, **kind)


@pytest.mark.parametrize("kind", [UNFILTERED, GREEDY, FILTERS[1]])
def test_rows_may_lie_anywhere(kind: dict[str, Any]) -> None:
    logits, keys, positions = random_rows(4, 90)
    assert_same_draws(logits[:, 5:72], keys, positions, **kind)
    assert_same_draws(logits[::2], keys[::2], positions[::2], **kind)
    assert_same_draws(logits[:1].expand(4, -1), keys, positions, **kind)
    assert_same_draws(logits.T[:4], keys, positions, **kind)


def test_no_rows_are_no_launch() -> None:
    token_ids, logprobs = sample_triton(*random_rows(0, 7), **UNFILTERED)
    assert token_ids.shape == logprobs.shape == (0,)


@pytest.mark.parametrize("kind", [UNFILTERED, GREEDY, FILTERS[-1]])
def test_no_batch_and_no_grid_changes_a_bit(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4, 4 * TILE + 5 if kind is not FILTERS[-1] else TILE + 5)
    token_ids, logprobs = sample_triton(*rows, **kind)
    for programs in (1, 11, 10_000):
        monkeypatch.setattr(kernels.sample_triton, "PROGRAMS", programs)
        again, again_logprobs = sample_triton(*(tensor[1:] for tensor in rows), **kind)
        assert torch.equal(again, token_ids[1:])
        assert torch.equal(again_logprobs, logprobs[1:])


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("levels", [None, 8, 0])
def test_thresholds_keep_what_the_reference_keeps(levels: int | None, filters: dict[str, Any]) -> None:
    """levels: of how many negative and positive values the logits are, zeros of both signs among them."""
    logits, _, _ = random_rows(2, 700)
    if levels is not None:
        logits = (logits * levels / 8).round()  # -0.0 too
    grid: dict[str, Any] = {"grid": (2, 1), "tile": TILE, "tiles_per_program": 1}
    least = thresholds(logits, tile_maxima(logits, **grid), **filters, **grid)
    assert torch.equal(logits >= least[:, None], filtered_probs(logits, **filters) > 0)


def test_a_top_k_of_the_vocabulary_and_more_keeps_all() -> None:
    rows = random_rows(3, 40)
    for top_k in (39, 40, 41):
        assert_same_draws(*rows, **{**UNFILTERED, "top_k": top_k})


@pytest.mark.parametrize("kind", [UNFILTERED, GREEDY, FILTERS[2], FILTERS[-1]])
def test_a_masked_logit_is_never_drawn(kind: dict[str, Any]) -> None:
    logits, keys, positions = random_rows(2, 2 * TILE + 9)
    logits[:, 4 : 2 * TILE + 4] = -torch.inf  # more than top_k are gone, and all of a tile
    logits[1] = -torch.inf
    logits[1, 2 * TILE + 6] = -30
    assert_same_draws(logits, keys, positions, **kind)


@pytest.mark.parametrize("kind", [UNFILTERED, GREEDY, FILTERS[1], FILTERS[-2]])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_shows_in_its_logprob_and_in_no_other(bad: float, kind: dict[str, Any]) -> None:
    logits, keys, positions = random_rows(4, TILE + 9)
    _, whole = sample_triton(logits, keys, positions, **kind)
    logits[0, 7] = bad
    logits[1, TILE + 2] = bad
    logits[2] = -torch.inf
    token_ids, logprobs = sample_triton(logits, keys, positions, **kind)
    assert logprobs.isfinite().tolist() == [False, False, False, True]
    assert logprobs[3] == whole[3]
    assert ((token_ids >= 0) & (token_ids < logits.shape[1])).all()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 3 * TILE, device=DEVICE)
    logits[0, [TILE + 5, TILE + 900, 2 * TILE + 1]] = 1
    logits[1, 0] = -1
    token_ids, logprobs = sample_triton(logits, *random_rows(3, 1)[1:], **GREEDY)
    assert token_ids.tolist() == [TILE + 5, 1, 0]
    assert logprobs.tolist() == [0, 0, 0]


def chi_square_z(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    expected = probs * counts.sum()
    freedom = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def draw_many(logits: torch.Tensor, count: int, **kind: Any) -> torch.Tensor:
    """How often each token comes of `count` rows of these logits [V], by consecutive keys. Returns [V] float64."""
    keys = torch.arange(count, device=DEVICE)
    token_ids, _ = sample_triton(logits.to(DEVICE).expand(count, -1), keys, keys % 5, **kind)
    return torch.bincount(token_ids, minlength=logits.shape[0]).double().cpu()


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2, 0.9])
    counts = draw_many(logits, 400, **{**UNFILTERED, "temperature": 0.8})
    assert abs(chi_square_z(counts, torch.softmax(logits.double() / 0.8, dim=0))) < 4


@pytest.mark.gpu
@pytest.mark.parametrize("filters", [UNFILTERED, *FILTERS])
def test_many_draws_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    (probs,) = filtered_probs(logits[None].double(), **filters)
    counts = draw_many(logits, 2_000_000, **filters)
    assert not counts[probs == 0].any()
    assert abs(chi_square_z(counts[probs > 0], probs[probs > 0])) < 4


def distance_to_target(logits: torch.Tensor, *, temperature: float, top_p: float, top_k: int, min_p: float) -> float:
    """How near the mass of some tokens and all larger ones comes to top_p: where float32 may decide either way."""
    scaled = logits.double() / temperature
    if top_k:
        scaled = scaled[logits >= logits.topk(top_k).values[-1]]
    masses = torch.softmax(scaled, dim=0).sort(descending=True).values.cumsum(dim=0)
    return float((masses - top_p).abs().min()) if top_p < 1 else math.inf


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_equal_the_reference_at_real_size(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    """The same token but where two scores, or a mass and its target, are equal to the last float32 digits."""
    for rows, vocab in ((1, 262_144), (130, 151_936), (2100, 49_152), (3, 50_257)):
        logits, keys, positions = random_rows(rows, vocab)
        logits = logits.to(dtype)
        token_ids, logprobs = sample_triton(logits, keys, positions, **kind)
        expected_ids, expected_logprobs = sample_reference(logits, keys, positions, **kind)
        if kind["temperature"] == 0:
            expected_ids = (logits == logits.amax(dim=1, keepdim=True)).to(torch.int8).argmax(dim=1)
        same = token_ids == expected_ids
        assert (~same).sum() <= rows // 1000
        equal = torch.isclose(logprobs, expected_logprobs, atol=1e-4, rtol=1e-5)
        for row in (same & ~equal).nonzero().flatten().tolist():
            assert distance_to_target(logits[row], **kind) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [UNFILTERED, GREEDY, FILTERS[-1]])
def test_a_captured_sample_replays(kind: dict[str, Any]) -> None:
    logits, keys, positions = random_rows(5, 49_152)
    expected = sample(logits, keys, positions, **kind)
    buffer = torch.zeros_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids, logprobs = sample(buffer, keys, positions, **kind)
    for _ in range(2):  # totals start from zero each time
        buffer.copy_(logits)
        graph.replay()
        assert torch.equal(token_ids, expected[0])
        assert torch.equal(logprobs, expected[1])

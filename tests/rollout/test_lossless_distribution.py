"""Rollouts under bad drafts are distributed as the model says: every outcome of a toy vocabulary is enumerated."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.schema import RolloutConfig
from drafter.types import Strategy
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

VOCAB = 5
LENGTH = 3
PROMPT = [1, 3, 0, 4]
NUM_SAMPLES = 8_000
KEEP = 4


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over five tokens with clearly unequal probabilities."""
    folder = tmp_path_factory.mktemp("toy-model")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def outcome_probabilities(folder: Path, *, temperature: float, top_k: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of PROMPT, by transformers' own attention."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for prefix, probability in probabilities.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].double() / temperature
            logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
            for token, share in enumerate(logits.softmax(dim=0).tolist()):
                longer[*prefix, token] = probability * share
        probabilities = longer
    return probabilities


@pytest.mark.parametrize("top_k", [VOCAB, KEEP])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_the_joint_distribution_of_three_tokens_is_the_models(
    shape: str,
    top_k: int,
    toy_dir: Path,
    collect: Callable[..., dict[tuple[str, int], Rollout]],
    scripted_drafter: type,
    request: pytest.FixtureRequest,
) -> None:
    strategy: Strategy = request.getfixturevalue(shape)
    drafter = scripted_drafter(truth={}, hit_rate=0.0, vocab_size=VOCAB)
    engine = NativeEngine(
        load_policy(toy_dir, device="cpu", dtype="float32"),
        drafter=drafter,
        chooser=FixedChooser(strategy),
        rollout=RolloutConfig(max_running=2048, prefill_tokens=8192, block_size=4),
    )
    sampling = Sampling(
        num_samples=NUM_SAMPLES,
        max_new_tokens=LENGTH,
        stop_token_ids=(),
        seed=2,
        step=1,
        temperature=0.8,
        top_k=top_k if top_k < VOCAB else 0,
    )
    rollouts = collect(engine, [Prompt(id="toy", token_ids=PROMPT, answer="")], sampling)
    expected = outcome_probabilities(toy_dir, temperature=0.8, top_k=top_k)
    for rollout in rollouts.values():
        exact = math.log(expected[tuple(rollout.token_ids)])
        assert sum(rollout.logprobs) == pytest.approx(exact, abs=1e-4)
    assert sum(rollout.spec.accepted for rollout in rollouts.values()) > NUM_SAMPLES // 10

    counts = Counter(tuple(rollout.token_ids) for rollout in rollouts.values())
    outcomes = [o for o in itertools.product(range(VOCAB), repeat=LENGTH) if expected[o] > 0]
    assert sum(counts[outcome] for outcome in outcomes) == NUM_SAMPLES
    # outcomes too rare for the approximation are counted together
    frequent = [outcome for outcome in outcomes if expected[outcome] * NUM_SAMPLES >= 5]
    rare_share = 1 - sum(expected[outcome] for outcome in frequent)
    cells = [(counts[outcome], expected[outcome] * NUM_SAMPLES) for outcome in frequent]
    if rare_share * NUM_SAMPLES >= 1:
        cells.append((NUM_SAMPLES - sum(count for count, _ in cells), rare_share * NUM_SAMPLES))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    # the 99.9% point of chi-square (Wilson and Hilferty 1931)
    critical = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 40 and statistic < critical

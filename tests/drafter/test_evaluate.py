"""Acceptance walked over a finished text is what drafting and verifying it, token by token, would have given."""

import pytest
import torch
import torch.nn.functional as F

from drafter.eagle import EagleConfig, EagleHead
from drafter.evaluate import Cycles, walk
from drafter.features import FeatureBatch
from kernels.sample import gumbel_noise

VOCAB, DRAFT_VOCAB, DEPTH = 12, 7, 3
CONFIG = EagleConfig(
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=VOCAB,
    draft_vocab=DRAFT_VOCAB,
    window=6,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=256,
    aux_layers=(2, 4, 5),
)


@pytest.fixture
def head() -> EagleHead:
    head = EagleHead(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    head.t2d.zero_()
    head.t2d[[0, 1, 3, 4, 7, 8, 11]] = True
    head.d2t.copy_(head.t2d.nonzero().flatten() - torch.arange(DRAFT_VOCAB))
    return head


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(VOCAB, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))


def drafted(
    head: EagleHead,
    embedding: torch.Tensor,
    tokens: list[int],
    aux: torch.Tensor,
    *,
    begin: int,
    first: int,
    temperature: float,
    key: int,
) -> list[int]:
    """The chain an engine drafts with token begin + 1 pending, whose head has read the text from position first on."""
    known = torch.arange(first, begin + 1)
    states = head.fuse(aux[known])
    seen = (known[:, None] >= known) & (known[:, None] - known < CONFIG.window)
    outputs, past = head.step(
        F.embedding(torch.tensor(tokens)[known + 1], embedding), states, known, head.empty_past(), seen
    )
    chain: list[int] = []
    for depth in range(DEPTH):
        logits = head.logits(outputs[-1:]).float()
        if temperature:
            place = torch.tensor([begin + depth + 2])
            noise = gumbel_noise(torch.tensor([key]), place, VOCAB)
            logits = logits / temperature + noise[:, head.target_ids()]
        chain.append(int(head.target_ids()[logits.argmax()]))
        position = begin + depth + 1
        everyone = torch.arange(first, position + 1)
        seen = (position - everyone < CONFIG.window)[None]
        outputs, past = head.step(
            F.embedding(torch.tensor(chain[-1:]), embedding), outputs[-1:], torch.tensor([position]), past, seen
        )
    return chain


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("with_prompt", [True, False])
@torch.no_grad()
def test_the_walk_is_what_an_engine_would_have_done(
    head: EagleHead, embedding: torch.Tensor, temperature: float, with_prompt: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    keys = torch.tensor([11, -7])
    prompts, lengths = [4, 2], [31, 22]
    texts, auxs, expected = [], [], Cycles(DEPTH, [], [])
    for key, num_prompt, length in zip(keys.tolist(), prompts, lengths, strict=True):
        aux = torch.randn(length, 3 * CONFIG.hidden_size, generator=generator)
        first = 0 if with_prompt else num_prompt - 1
        tokens = torch.randint(0, VOCAB, (num_prompt + 1,), generator=generator).tolist()
        begins = {}
        while len(tokens) < length:  # a text that agrees with its drafts now and then
            begin = len(tokens) - 2
            chain = drafted(head, embedding, tokens, aux, begin=begin, first=first, temperature=temperature, key=key)
            agreed = int(torch.randint(0, DEPTH + 1, (1,), generator=generator))
            wrong = (chain[agreed] + 1) % VOCAB if agreed < DEPTH else 0
            tokens += [*chain[:agreed], wrong]
            begins[begin] = agreed
        for begin, agreed in begins.items():
            expected.places.append(begin - num_prompt + 2)
            expected.accepted.append(min(agreed, length - begin - 2))
        texts.append(tokens[:length])
        auxs.append(aux)
    windows = [0 if with_prompt else num_prompt - 1 for num_prompt in prompts]
    positions = [torch.arange(first, length - 1) for first, length in zip(windows, lengths, strict=True)]
    total = sum(map(len, positions))
    batch = FeatureBatch(
        token_ids=torch.cat([torch.tensor(text)[at] for text, at in zip(texts, positions, strict=True)]),
        next_ids=torch.cat([torch.tensor(text)[at + 1] for text, at in zip(texts, positions, strict=True)]),
        positions=torch.cat(positions),
        aux=torch.cat([aux[at] for aux, at in zip(auxs, positions, strict=True)]),
        hidden=torch.zeros(total, CONFIG.hidden_size),
        cu_seqlens=torch.tensor([0, len(positions[0]), total], dtype=torch.int32),
        versions=torch.zeros(2, dtype=torch.int64),
        alt_ids=torch.full((total,), -1),
        alt_hidden=torch.zeros(total, CONFIG.hidden_size),
        temperature=temperature,
    )
    found = walk(
        head,
        batch,
        first=[num_prompt - 1 - first for num_prompt, first in zip(prompts, windows, strict=True)],
        embedding=embedding,
        depth=DEPTH,
        keys=keys if temperature else None,
    )
    assert found == expected
    assert len(set(found.accepted)) > 2, "the texts should have drafts accepted to different depths"


def test_tables_count_as_vllm_does() -> None:
    cycles = Cycles(3, places=[0, 4, 32], accepted=[2, 0, 3]) + Cycles(3, places=[100], accepted=[1])
    assert cycles.accept_length == 1 + 6 / 4
    assert cycles.table() == {
        "depth": 3,
        "drafts": 4,
        "draft_tokens": 12,
        "accepted": 6,
        "accept_length": 2.5,
        "by_depth": [0.75, 0.5, 0.25],
        "by_place": [
            {"from": 0, "to": 32, "drafts": 2, "accept_length": 2.0},
            {"from": 32, "to": 64, "drafts": 1, "accept_length": 4.0},
            {"from": 64, "to": 128, "drafts": 1, "accept_length": 2.0},
        ],
    }
    assert Cycles(3, [], []).table()["accept_length"] is None

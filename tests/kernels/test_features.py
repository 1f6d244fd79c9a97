"""Hidden states of committed tokens reach the ring of their text, and nothing else does."""

import pytest
import torch

from kernels.cycle import Drafts, Texts
from kernels.features import Rings, keep_features
from kernels.features_triton import keep_features_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RING, NUM_TEXTS, SLOTS, MAX_LENGTH, HIDDEN = 24, 9, 6, 90, 40


def random_case(seed: int, num_rows: int, num_nodes: int) -> dict:
    """A cycle over rows of which some commit nothing and some have no slot; trees of few tokens, so that some agree."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.int32).to(DEVICE)

    texts = Texts(integers(0, 3, NUM_TEXTS, MAX_LENGTH), integers(70, MAX_LENGTH, NUM_TEXTS), integers(0, 3, NUM_TEXTS))
    slot_of = torch.full((NUM_TEXTS,), SLOTS, dtype=torch.int32)
    slot_of[torch.randperm(NUM_TEXTS, generator=random)[: SLOTS - 1]] = torch.arange(SLOTS - 1, dtype=torch.int32)
    num_tokens = 1 + num_nodes
    host = integers(0, num_tokens + 1, num_rows, 5)  # counts are a strided view, as in CycleResult
    host[0, 0] = num_tokens
    parents = integers(-1, 60, num_rows + 2, num_nodes) if num_nodes else None
    drafts = None
    if parents is not None:
        parents = torch.minimum(parents, torch.arange(num_nodes, device=DEVICE) - 1)
        drafts = Drafts(integers(0, 3, num_rows + 2, num_nodes), parents.int(), integers(0, 9, num_rows + 2))
    states = torch.randn(4, num_rows * num_tokens, HIDDEN, generator=random).to(DEVICE)
    path = torch.stack([torch.randperm(num_tokens, generator=random) for _ in range(num_rows)]).int().to(DEVICE)
    return {
        "texts": texts,
        "slot_of": slot_of.to(DEVICE),
        "text": torch.randperm(NUM_TEXTS, generator=random)[: num_rows + 1].int().to(DEVICE),
        "aux": tuple(states[:3]),
        "hidden": states[3],
        "counts": host[:, 0],
        "path": path,
        "num_valid": integers(0, num_nodes + 1, num_rows),
        "drafts": drafts,
    }


def empty_rings(slot_of: torch.Tensor, dtype: torch.dtype = torch.float32) -> Rings:
    none = torch.zeros(SLOTS + 1, dtype=torch.int32, device=DEVICE)
    states = torch.full((SLOTS + 1, RING, 5 * HIDDEN), -7.0, dtype=dtype, device=DEVICE)
    return Rings(slot_of, none, none, states, torch.full((SLOTS + 1, RING), -9, dtype=torch.int32, device=DEVICE))


def brute_force(case: dict, rings: Rings) -> None:
    texts, drafts, num_tokens = case["texts"], case["drafts"], case["path"].shape[1]
    for row in range(len(case["path"])):
        text, count = int(case["text"][row]), int(case["counts"][row])
        slot = int(case["slot_of"][text])
        for place in range(count if slot < SLOTS else 0):
            position = int(texts.lengths[text]) - count - 1 + place
            column = int(case["path"][row, place])
            at = row * num_tokens + column
            alt_id, alt = -1, at
            for node in range(int(case["num_valid"][row]) if drafts else 0):
                token = int(drafts.token_ids[row, node])
                if int(drafts.parents[row, node]) == column - 1 and token != int(texts.tokens[text, position + 1]):
                    alt_id, alt = token, row * num_tokens + 1 + node
                    break
            vectors = [x[at] for x in (*case["aux"], case["hidden"])] + [case["hidden"][alt]]
            rings.states[slot, position % RING] = torch.cat(vectors)
            rings.alt_ids[slot, position % RING] = alt_id


@pytest.mark.parametrize("keep", [keep_features, keep_features_triton])
@pytest.mark.parametrize("num_nodes", [0, 1, 5, 16])
@pytest.mark.parametrize("seed", range(3))
def test_committed_states_are_kept_at_their_positions(keep, num_nodes: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    case = random_case(seed, 7, num_nodes)
    rings, expected = empty_rings(case["slot_of"]), empty_rings(case["slot_of"])
    brute_force(case, expected)
    del case["slot_of"]
    texts, text = case.pop("texts"), case.pop("text")
    keep(rings, texts, text, **case)
    assert torch.equal(rings.states, expected.states)
    assert torch.equal(rings.alt_ids, expected.alt_ids)
    assert num_nodes < 16 or (expected.alt_ids >= 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [576, 4096])
def test_wide_states_are_kept_in_half_precision(hidden_size: int) -> None:
    case = random_case(0, 7, 6)
    states = torch.randn(4, 7 * 7, hidden_size, device=DEVICE, dtype=torch.bfloat16)
    case |= {"aux": tuple(states[:3]), "hidden": states[3]}
    slot_of, texts, text = (case.pop(name) for name in ("slot_of", "texts", "text"))
    both = []
    for device in (DEVICE, torch.device("cpu")):

        def on(x, device=device):  # type: ignore[no-untyped-def]
            return x.to(device)

        none = torch.zeros(SLOTS + 1, dtype=torch.int32, device=device)
        ring = torch.zeros(SLOTS + 1, RING, 5 * hidden_size, dtype=torch.bfloat16, device=device)
        rings = Rings(on(slot_of), none, none, ring, torch.zeros(SLOTS + 1, RING, dtype=torch.int32, device=device))
        keep_features(
            rings,
            Texts(on(texts.tokens), on(texts.lengths), on(texts.groups)),
            on(text),
            aux=tuple(on(x) for x in case["aux"]),
            hidden=on(case["hidden"]),
            counts=on(case["counts"]),
            path=on(case["path"]),
            num_valid=on(case["num_valid"]),
            drafts=Drafts(*(on(getattr(case["drafts"], name)) for name in ("token_ids", "parents", "num_nodes"))),
        )
        both.append((rings.states.cpu(), rings.alt_ids.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

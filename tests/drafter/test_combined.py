"""Several drafters as one: who is asked, who takes which texts, and what a run remembers of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from drafter.combined import CombinedDrafter
from drafter.ngram import NgramDrafter
from drafter.types import Drafts, ResidentDrafter, Rows, Strategy, Texts

SUFFIX, EAGLE = (Strategy(source, depth=2, top_k=1, num_verify=2) for source in ("suffix", "eagle"))


@dataclass
class Noted:
    """Takes as many free texts as it wants, and notes all it hears."""

    wants: int
    heard: list[tuple[Any, ...]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def attach(self, texts: Texts) -> None:
        self.heard.append(("attach",))

    def begin(self, text: int, group: int, prompt_id: str, prompt_ids: Sequence[int], free_texts: Sequence[int]) -> int:
        self.heard.append(("begin", text, list(free_texts)))
        return min(self.wants, len(free_texts))

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        self.heard.append(("propose", strategy))

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        self.heard.append(("finish", text))

    def release(self, texts: Sequence[int]) -> None:
        self.heard.append(("release", list(texts)))

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def some_texts() -> tuple[Texts, Rows, Drafts]:
    """Six texts of nothing and one of nobody, no row active, room for two nodes."""
    texts = Texts(*(torch.zeros(shape, dtype=torch.int32) for shape in ((7, 32), (7,), (7,))))
    texts.lengths.fill_(1)
    texts.groups.fill_(-1)
    rows = Rows(
        text=torch.tensor([6], dtype=torch.int32),
        keys=torch.zeros(1, dtype=torch.int64),
        max_lengths=torch.zeros(1, dtype=torch.int32),
        active=torch.zeros(1, dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
    )
    node = torch.zeros(1, 2, dtype=torch.int32)
    return texts, rows, Drafts(node, node.clone(), torch.full((1,), 9, dtype=torch.int32))


def test_all_hear_of_every_sequence_and_one_is_asked() -> None:
    drafters = {"suffix": Noted(wants=2), "eagle": Noted(wants=1)}
    combined = CombinedDrafter(drafters)
    assert isinstance(combined, ResidentDrafter)
    texts, rows, drafts = some_texts()
    combined.attach(texts)
    assert combined.begin(0, 0, "p", [1, 2], [5, 4, 3, 2]) == 3
    combined.propose(texts, rows, EAGLE, drafts)
    combined.propose(texts, rows, SUFFIX, drafts)
    combined.finish(0, "p", [7])
    combined.release([0, 5, 4, 3])
    told = [("finish", 0), ("release", [0, 5, 4, 3])]
    assert drafters["suffix"].heard == [("attach",), ("begin", 0, [5, 4, 3, 2]), ("propose", SUFFIX), *told]
    assert drafters["eagle"].heard == [("attach",), ("begin", 0, [3, 2]), ("propose", EAGLE), *told]


@pytest.mark.parametrize("first", ["suffix", "eagle"])
def test_earlier_rollouts_are_recalled_past_what_another_took(first: str) -> None:
    ngram, other = NgramDrafter(min_match=1), Noted(wants=1)
    drafters: dict[str, ResidentDrafter] = {"suffix": ngram, "eagle": other}
    if first == "eagle":
        drafters = {"eagle": other, "suffix": ngram}
    combined = CombinedDrafter(drafters)
    texts, _, _ = some_texts()
    combined.attach(texts)
    for text, response in enumerate(([3, 4, 5], [6, 7])):
        combined.finish(text, "p", response)
    texts.tokens[0, :2] = torch.tensor([1, 2])
    texts.lengths[0], texts.groups[0] = 2, 0
    assert combined.begin(0, 0, "p", [1, 2], [5, 4, 3, 2]) == 3
    recalled = [5, 4] if first == "suffix" else [4, 3]
    assert [texts.tokens[text, : texts.lengths[text]].tolist() for text in recalled] == [[1, 2, 6, 7], [1, 2, 3, 4, 5]]
    assert texts.groups[recalled].tolist() == [0, 0]


def test_states_are_kept_by_source_and_a_run_with_fewer_sources_gives_what_it_has() -> None:
    combined = CombinedDrafter({"suffix": Noted(0, state={"finished": [1]}), "eagle": Noted(0, state={"weights": 2})})
    saved = combined.state_dict()
    assert saved == {"suffix": {"finished": [1]}, "eagle": {"weights": 2}}
    resumed = {"suffix": Noted(0), "eagle": Noted(0, state={"weights": 0})}
    CombinedDrafter(resumed).load_state_dict({"suffix": saved["suffix"]})
    assert resumed["suffix"].state == {"finished": [1]}
    assert resumed["eagle"].state == {"weights": 0}


@dataclass
class Tempered(Noted):
    """A drafter that draws with the target's noise."""

    def set_temperature(self, temperature: float) -> None:
        self.heard.append(("temperature", temperature))


def test_those_that_draw_with_the_targets_noise_are_told_how_it_samples() -> None:
    drafters = {"suffix": Noted(0), "eagle": Tempered(0)}
    CombinedDrafter(drafters).set_temperature(0.7)
    assert drafters["eagle"].heard == [("temperature", 0.7)]
    assert drafters["suffix"].heard == []

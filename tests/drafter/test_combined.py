"""Several drafters as one: who is asked, who takes which texts, and what a run remembers of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from drafter.combined import CombinedDrafter
from drafter.ngram import NgramDrafter
from drafter.selfdraft import SelfDrafter
from drafter.suffix import SuffixDrafter
from drafter.types import Begun, Drafts, ResidentDrafter, Rows, Strategy, Texts

SUFFIX, EAGLE = (Strategy(source, depth=2, top_k=1, num_verify=2) for source in ("suffix", "eagle"))


@dataclass
class Noted:
    """Takes as many free texts as it wants, and notes all it hears."""

    wants: int
    heard: list[tuple[Any, ...]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def attach(self, texts: Texts) -> None:
        self.heard.append(("attach",))

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        self.heard.append(("begin", [each.text for each in begun], list(free_texts)))
        return [list(free_texts[number * self.wants : (number + 1) * self.wants]) for number in range(len(begun))]

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        self.heard.append(("refresh", strategy, grown))

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
    begun = [Begun(text, 0, "p", [1, 2], 2) for text in (0, 1)]
    assert combined.begin(begun, [9, 8, 7, 6, 5, 4, 3]) == [[9, 8, 5], [7, 6, 4]]
    combined.refresh(EAGLE, grown=3)
    combined.propose(texts, rows, EAGLE, drafts)
    combined.refresh(SUFFIX, grown=4)
    combined.propose(texts, rows, SUFFIX, drafts)
    combined.finish(0, "p", [7])
    combined.release([0, 9, 8, 5])
    told = [("finish", 0), ("release", [0, 9, 8, 5])]
    suffix = [("begin", [0, 1], [9, 8, 7, 6, 5, 4, 3]), ("refresh", SUFFIX, 4), ("propose", SUFFIX)]
    assert drafters["suffix"].heard == [("attach",), *suffix, *told]
    eagle = [("begin", [0, 1], [5, 4, 3]), ("refresh", EAGLE, 3), ("propose", EAGLE)]
    assert drafters["eagle"].heard == [("attach",), *eagle, *told]


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
    assert len(combined.begin([Begun(0, 0, "p", [1, 2], 2)], [5, 4, 3, 2])[0]) == 3
    combined.refresh(SUFFIX, grown=0)
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


@pytest.mark.parametrize("lone", [NgramDrafter, SuffixDrafter])
def test_a_run_that_resumes_with_more_or_fewer_drafters_keeps_its_rollouts(
    lone: type[NgramDrafter | SuffixDrafter],
) -> None:
    rollouts = {"finished": [["a", [5, 6, 8]]]}
    drafter, among = lone(min_match=1), NgramDrafter(min_match=1)
    several = CombinedDrafter({"suffix": among, "sparse": SelfDrafter()})
    drafter.load_state_dict({"suffix": rollouts, "sparse": {}})
    assert json.loads(json.dumps(drafter.state_dict(), default=list)) == rollouts
    several.load_state_dict(drafter.state_dict())
    assert json.loads(json.dumps(several.state_dict(), default=list)) == {"suffix": rollouts, "sparse": {}}
    drafter.load_state_dict({"eagle": {}, "sparse": {}})
    assert drafter.state_dict() == {"finished": []}


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

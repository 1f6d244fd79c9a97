"""The drafter on the device: as good as the suffix drafter, and what it remembers, forgets and saves."""

import json
import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from drafter.ngram import NgramDrafter
from drafter.suffix import SuffixDrafter
from drafter.types import Begun, Draft, Drafts, DraftState, ResidentDrafter, Rows, Strategy, Texts
from rollout.speculate import verify

CHAIN = Strategy(source="suffix", depth=6, top_k=1, num_verify=6)
TREE = Strategy(source="suffix", depth=6, top_k=3, num_verify=12)
PROMPT = [1, 2, 3, 4]
MAX_LENGTH = 120

Propose = Callable[[list[list[int]]], list[Draft]]
Commit = Callable[[int, list[int]], None]


def empty_texts(num_texts: int) -> Texts:
    return Texts(
        tokens=torch.zeros(num_texts + 1, MAX_LENGTH, dtype=torch.int32),
        lengths=torch.ones(num_texts + 1, dtype=torch.int32),
        groups=torch.full((num_texts + 1,), -1, dtype=torch.int32),
    )


def rows_for(texts: list[int]) -> Rows:
    num_rows = len(texts)
    return Rows(
        text=torch.tensor(texts, dtype=torch.int32),
        keys=torch.zeros(num_rows, dtype=torch.int64),
        max_lengths=torch.full((num_rows,), MAX_LENGTH, dtype=torch.int32),
        active=torch.ones(num_rows, dtype=torch.int32),
        block_tables=torch.zeros(num_rows, 1, dtype=torch.int32),
    )


def write(texts: Texts, text: int, token_ids: list[int], *, group: int) -> None:
    texts.tokens[text, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int32)
    texts.lengths[text] = len(token_ids)
    texts.groups[text] = group


def begin(
    drafter: NgramDrafter,
    texts: Texts,
    text: int,
    group: int,
    prompt: list[int],
    free_texts: Sequence[int] = (),
    *,
    prompt_id: str = "a",
) -> list[int]:
    """Let one sequence begin; the texts taken for it."""
    return drafter.begin([Begun(text, group, prompt_id, prompt, int(texts.lengths[text]))], free_texts)[0]


def draft_for(
    drafter: NgramDrafter, texts: Texts, numbers: list[int], strategy: Strategy, *, grown: int = 16
) -> list[Draft]:
    drafter.refresh(strategy, grown=grown)
    num_rows, num_nodes = len(numbers), strategy.num_verify
    out = Drafts(
        token_ids=torch.full((num_rows, num_nodes), -9, dtype=torch.int32),
        parents=torch.full((num_rows, num_nodes), -9, dtype=torch.int32),
        num_nodes=torch.full((num_rows,), -9, dtype=torch.int32),
    )
    drafter.propose(texts, rows_for(numbers), strategy, out)
    return [
        Draft(token_ids=out.token_ids[row, :count].tolist(), parents=out.parents[row, :count].tolist())
        for row, count in enumerate(out.num_nodes.tolist())
    ]


def siblings(seed: int, count: int) -> list[list[int]]:
    """Responses that share phrases, in like order, with words of their own between them."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(10, 60) for _ in range(rng.randrange(4, 10))] for _ in range(10)]
    responses = []
    for _ in range(count):
        response: list[int] = []
        for phrase in phrases:
            chosen = phrase if rng.random() < 0.7 else rng.choice(phrases)
            response += [token if rng.random() < 0.93 else rng.randrange(10, 60) for token in chosen]
            response += [rng.randrange(10, 60) for _ in range(rng.randrange(2))]
        responses.append(response[: MAX_LENGTH - len(PROMPT)])
    return responses


def replay(responses: list[list[int]], propose: Propose, commit: Commit) -> float:
    """Let all sequences say their responses side by side; tokens committed a forward."""
    texts = [list(PROMPT) for _ in responses]
    whole = [PROMPT + response for response in responses]
    forwards = 0
    while any(len(text) < len(end) for text, end in zip(texts, whole, strict=True)):
        for row, draft in enumerate(propose(texts)):
            text, end = texts[row], whole[row]
            if len(text) == len(end):
                continue
            levels: list[int] = []
            targets = [end[len(text)]]
            for parent in draft.parents:
                levels.append(1 if parent < 0 else levels[parent] + 1)
                index = len(text) + levels[-1]
                targets.append(end[index] if index < len(end) else -1)
            path = verify(draft.token_ids, draft.parents, targets)
            new = end[len(text) : len(text) + 1 + len(path)]
            text += new
            commit(row, new)
            forwards += 1
    return sum(map(len, responses)) / forwards


def replay_suffix(responses: list[list[int]], earlier: list[list[int]], strategy: Strategy) -> float:
    drafter = SuffixDrafter(min_match=2, overhead_tokens=math.inf)
    drafter.load_state_dict({"finished": [["a", response] for response in earlier]})
    for sample in range(len(responses)):
        drafter.begin("a", sample, PROMPT)

    def propose(texts: list[list[int]]) -> list[Draft]:
        states = [DraftState("a", sample, text, MAX_LENGTH - len(text)) for sample, text in enumerate(texts)]
        return drafter.propose(states, strategy)

    return replay(responses, propose, lambda row, new: drafter.extend("a", row, new))


def replay_ngram(responses: list[list[int]], earlier: list[list[int]], strategy: Strategy) -> float:
    drafter = NgramDrafter(min_match=2)
    drafter.load_state_dict({"finished": [["a", response] for response in earlier]})
    count = len(responses)
    texts = empty_texts(count + len(earlier))
    drafter.attach(texts)
    free = list(range(count, count + len(earlier)))
    for text in range(count):
        write(texts, text, PROMPT, group=0)
        taken = begin(drafter, texts, text, 0, PROMPT, free)
        assert taken == (free if text == 0 else [])

    def commit(row: int, new: list[int]) -> None:
        length = int(texts.lengths[row])
        write(texts, row, [*texts.tokens[row, :length].tolist(), *new], group=0)

    return replay(responses, lambda _: draft_for(drafter, texts, list(range(count)), strategy), commit)


@pytest.mark.parametrize("strategy", [CHAIN, TREE])
@pytest.mark.parametrize("num_earlier", [0, 6])
def test_drafts_are_accepted_as_often_as_the_suffix_drafters(strategy: Strategy, num_earlier: int) -> None:
    suffix, ngram = [], []
    for seed in range(3):
        said = siblings(seed, 8 + num_earlier)
        suffix.append(replay_suffix(said[num_earlier:], said[:num_earlier], strategy))
        ngram.append(replay_ngram(said[num_earlier:], said[:num_earlier], strategy))
    assert sum(suffix) / 3 > 1.4  # the texts are worth drafting from
    assert sum(ngram) >= 0.95 * sum(suffix)


def test_equal_calls_give_equal_drafts() -> None:
    said = siblings(0, 8)
    assert replay_ngram(said[4:], said[:4], TREE) == replay_ngram(said[4:], said[:4], TREE)


def test_the_prompt_is_looked_up_by_all_that_share_it() -> None:
    drafter, texts = NgramDrafter(min_match=2), empty_texts(4)
    drafter.attach(texts)
    prompt = [5, 6, 7, 8, 5, 6]
    for text in (0, 1):
        write(texts, text, prompt, group=3)
        assert begin(drafter, texts, text, 3, prompt) == []
    assert [draft.token_ids for draft in draft_for(drafter, texts, [0, 1], CHAIN)] == [[7, 8, 5, 6, 7, 8], [7, 8, 5, 6]]


def test_the_prompt_survives_the_sequence_that_brought_it() -> None:
    drafter, texts = NgramDrafter(min_match=2), empty_texts(4)
    drafter.attach(texts)
    prompt = [5, 6, 7, 8, 5, 6]
    for text in (0, 1):
        write(texts, text, prompt, group=3)
        begin(drafter, texts, text, 3, prompt)
    texts.groups[0] = -1
    drafter.release([0])
    write(texts, 2, prompt, group=3)
    begin(drafter, texts, 2, 3, prompt)
    for draft in draft_for(drafter, texts, [1, 2], CHAIN):
        assert draft.token_ids[:2] == [7, 8]


def test_earlier_rollouts_are_recalled_once_newest_first_into_the_texts_that_are_free() -> None:
    drafter, texts = NgramDrafter(min_match=2), empty_texts(6)
    drafter.attach(texts)
    for last in (7, 8, 9):
        drafter.finish(0, "a", [5, 6, last])
    write(texts, 0, [1, 5, 6], group=0)
    assert begin(drafter, texts, 0, 0, [1], [4, 2]) == [4, 2]
    drafter.refresh(TREE, grown=0)
    assert texts.tokens[4, :4].tolist() == [1, 5, 6, 9] and texts.tokens[2, :4].tolist() == [1, 5, 6, 8]
    assert texts.lengths[[4, 2]].tolist() == [4, 4] and texts.groups[[4, 2]].tolist() == [0, 0]
    tree = draft_for(drafter, texts, [0], TREE)[0]
    assert sorted(tree.token_ids) == [8, 9]
    write(texts, 1, [1], group=0)
    assert begin(drafter, texts, 1, 0, [1], [5]) == []
    write(texts, 3, [1], group=1)
    assert begin(drafter, texts, 3, 1, [1], [5], prompt_id="b") == []


def test_a_recalled_rollout_is_cut_to_the_length_of_a_text() -> None:
    drafter, texts = NgramDrafter(min_match=2), empty_texts(2)
    drafter.attach(texts)
    drafter.finish(0, "a", list(range(10, 10 + MAX_LENGTH)))
    write(texts, 0, PROMPT, group=0)
    assert begin(drafter, texts, 0, 0, PROMPT, [1]) == [1]
    drafter.refresh(TREE, grown=0)
    assert int(texts.lengths[1]) == MAX_LENGTH


def test_a_text_that_is_free_again_is_not_quoted_and_may_be_written_anew() -> None:
    drafter, texts = NgramDrafter(min_match=2), empty_texts(3)
    drafter.attach(texts)
    write(texts, 0, [1, 5, 6, 7, 8], group=0)
    begin(drafter, texts, 0, 0, [1])
    write(texts, 1, [1, 5, 6], group=0)
    begin(drafter, texts, 1, 0, [1])
    assert draft_for(drafter, texts, [0, 1], CHAIN)[1].token_ids == [7, 8]
    texts.groups[0] = -1
    drafter.release([0])
    assert draft_for(drafter, texts, [1], CHAIN)[0].token_ids == []
    write(texts, 0, [1, 5, 6, 9], group=0)
    begin(drafter, texts, 0, 0, [1])
    assert draft_for(drafter, texts, [0, 1], CHAIN)[1].token_ids == [9]


def test_what_was_said_while_nothing_was_drafted_here_is_quoted_from_the_first_draft_on() -> None:
    said = random.Random(0).sample(range(10, 1000), 100)
    drafter, texts = NgramDrafter(min_match=2), empty_texts(3)
    drafter.attach(texts)
    for text in (0, 1):
        write(texts, text, PROMPT, group=0)
        begin(drafter, texts, text, 0, PROMPT)
    assert draft_for(drafter, texts, [0, 1], CHAIN)[1].token_ids == []
    write(texts, 0, PROMPT + said, group=0)
    write(texts, 1, PROMPT + said[:92], group=0)
    assert draft_for(drafter, texts, [1], CHAIN, grown=100)[0].token_ids == said[92:98]


def test_a_sequence_that_goes_on_is_quoted_by_its_siblings_at_once() -> None:
    said = random.Random(0).sample(range(10, 1000), 100)
    drafter, texts = NgramDrafter(min_match=2), empty_texts(3)
    drafter.attach(texts)
    write(texts, 1, PROMPT + said[90:92], group=0)
    write(texts, 0, PROMPT + said, group=0)
    for text in (1, 0):
        begin(drafter, texts, text, 0, PROMPT)
    assert draft_for(drafter, texts, [1], CHAIN, grown=0)[0].token_ids == said[92:98]


def test_sequences_that_come_and_go_between_two_drafts_leave_nothing_to_do() -> None:
    drafter, texts = NgramDrafter(min_match=2), empty_texts(3)
    drafter.attach(texts)
    drafter.finish(0, "a", [5, 6, 7])
    write(texts, 0, PROMPT, group=0)
    assert begin(drafter, texts, 0, 0, PROMPT, [2]) == [2]
    texts.groups[0] = -1
    drafter.release([0, 2])
    drafter.refresh(CHAIN, grown=200)
    assert int(texts.groups[2]) == -1 and not texts.tokens[2].any()


def test_as_many_launches_for_one_sequence_as_for_many(launches: Callable[[Callable[[], object]], int]) -> None:
    def count(num_groups: int, grown: int) -> int:
        drafter, texts = NgramDrafter(min_match=2), empty_texts(6 * num_groups)
        drafter.attach(texts)
        begun = []
        for group in range(num_groups):
            for _ in range(3):
                drafter.finish(0, f"p{group}", [5, 6, 7])
            for text in (6 * group, 6 * group + 1):
                write(texts, text, PROMPT, group=group)
                begun.append(Begun(text, group, f"p{group}", PROMPT, len(PROMPT)))
        free = [text for text in range(6 * num_groups) if text % 6 > 1]
        assert launches(partial(drafter.begin, begun, free)) == 0
        return launches(partial(drafter.refresh, CHAIN, grown=grown))

    for grown in (1, 1000):
        assert count(1, grown) == count(20, grown)


def test_a_saved_state_is_json_and_either_drafter_takes_it_up() -> None:
    first = NgramDrafter(min_match=2, max_rollouts=2)
    for last in (7, 8, 9):
        first.finish(0, "a", [5, 6, last])
    first.finish(0, "b", [])
    state = json.loads(json.dumps(first.state_dict(), default=list))
    assert state == {"finished": [["a", [5, 6, 8]], ["a", [5, 6, 9]]]}
    suffix = SuffixDrafter(min_match=2)
    suffix.load_state_dict(state)
    second = NgramDrafter(min_match=2)
    second.load_state_dict(suffix.state_dict())
    assert json.dumps(second.state_dict(), default=list) == json.dumps(state)


def test_the_history_keeps_to_its_bound() -> None:
    drafter = NgramDrafter(min_match=2, max_history=5)
    for prompt_id in "abc":
        drafter.finish(0, prompt_id, [5, 6])
    assert [prompt_id for prompt_id, _ in drafter.state_dict()["finished"]] == ["b", "c"]


def test_it_is_a_resident_drafter() -> None:
    drafter: ResidentDrafter = NgramDrafter(min_match=2)
    assert isinstance(drafter, ResidentDrafter)

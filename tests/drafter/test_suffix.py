"""The suffix drafter: what it finds, what it keeps, and that its drafts are always valid."""

import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.suffix import SuffixDrafter, TextIndex
from drafter.types import EMPTY, OFF, Draft, DraftState, Strategy

CHAIN = Strategy(source="suffix", depth=6, top_k=1, num_verify=6)
PROMPT = [1, 2, 3]
# few tokens, so that suffixes repeat
TEXT = st.lists(st.integers(0, 3), max_size=40)


def sure_drafter(**options: int) -> SuffixDrafter:
    """A drafter that drafts whatever it finds."""
    return SuffixDrafter(min_match=2, overhead_tokens=math.inf, **options)


def state(prompt_id: str, sample: int, response: list[int], *, max_tokens: int = 100) -> DraftState:
    return DraftState(prompt_id, sample, PROMPT + response, max_tokens)


def draft_for(drafter: SuffixDrafter, prompt_id: str, sample: int, response: list[int], **limits: int) -> Draft:
    return drafter.propose([state(prompt_id, sample, response, **limits)], CHAIN)[0]


def say(drafter: SuffixDrafter, prompt_id: str, sample: int, response: list[int]) -> None:
    drafter.begin(prompt_id, sample, PROMPT)
    drafter.extend(prompt_id, sample, response)


@settings(deadline=None)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=4),
    depth=st.integers(1, 5),
    top_k=st.integers(1, 4),
    num_verify=st.integers(0, 9),
    max_tokens=st.integers(1, 8),
)
def test_a_draft_is_a_tree_within_every_limit(
    texts: list[list[int]], depth: int, top_k: int, num_verify: int, max_tokens: int
) -> None:
    drafter = sure_drafter()
    for sample, text in enumerate(texts):
        say(drafter, "a", sample, text)
    strategy = Strategy(source="suffix", depth=depth, top_k=top_k, num_verify=num_verify)
    states = [state("a", sample, text, max_tokens=max_tokens) for sample, text in enumerate(texts)]
    for draft in drafter.propose(states, strategy):
        assert len(draft.token_ids) == len(draft.parents) <= num_verify
        levels: list[int] = []
        children: dict[int, list[int]] = {}
        for node, (token, parent) in enumerate(zip(draft.token_ids, draft.parents, strict=True)):
            assert -1 <= parent < node
            levels.append(1 if parent < 0 else levels[parent] + 1)
            children.setdefault(parent, []).append(token)
        assert max(levels, default=0) <= min(depth, max_tokens - 1)
        assert all(len(tokens) == len(set(tokens)) <= top_k for tokens in children.values())


@settings(deadline=None)
@given(text=TEXT, sibling=TEXT, min_match=st.integers(1, 3))
def test_the_first_match_is_as_long_as_the_longest_repeated_suffix(
    text: list[int], sibling: list[int], min_match: int
) -> None:
    max_match = 16
    index = TextIndex(min_match=min_match, max_match=max_match)
    for tokens in (text, sibling):
        index.extend(index.open([]), tokens)

    def agrees(tokens: list[int], after: int, length: int) -> bool:
        return length <= after and tokens[after - length : after] == text[len(text) - length :]

    longest = max(
        (
            length
            for tokens in (text, sibling)
            for after in range(len(tokens))  # a place without a successor proposes nothing
            for length in range(min_match, min(max_match, len(text)) + 1)
            if agrees(tokens, after, length)
        ),
        default=0,
    )
    found = index.matches(text)
    assert (found[0][2] if found else 0) == longest
    for tokens, after, length in found:
        assert agrees(tokens, after, length)


@given(period=st.lists(st.integers(0, 50), min_size=2, max_size=6, unique=True), phase=st.integers(0, 5))
def test_a_periodic_text_is_continued(period: list[int], phase: int) -> None:
    text = (period * 16)[: len(period) * 8 + phase]
    drafter = sure_drafter()
    say(drafter, "a", 0, text)
    expected = (period * 16)[len(text) : len(text) + CHAIN.depth]
    assert draft_for(drafter, "a", 0, text).token_ids == expected


def test_a_sibling_in_flight_and_a_finished_one_are_found() -> None:
    for finished in (False, True):
        drafter = sure_drafter()
        say(drafter, "a", 0, [10, 11, 12, 13, 14])
        say(drafter, "a", 1, [10, 11])
        if finished:
            drafter.finish("a", 0)
        assert draft_for(drafter, "a", 1, [10, 11]).token_ids == [12, 13, 14]


def test_the_first_tokens_of_a_response_are_drafted_from_a_sibling() -> None:
    drafter = sure_drafter()
    say(drafter, "a", 0, [10, 11])
    say(drafter, "a", 1, [])
    assert draft_for(drafter, "a", 1, []).token_ids == [10, 11]


def test_the_prompt_is_looked_up_and_another_prompt_is_not() -> None:
    drafter = sure_drafter()
    say(drafter, "a", 0, [1, 2])
    say(drafter, "b", 0, [10, 11, 12])
    assert draft_for(drafter, "a", 0, [1, 2]).token_ids[0] == 3
    say(drafter, "a", 1, [10, 11])
    assert draft_for(drafter, "a", 1, [10, 11]) == EMPTY


def test_the_last_token_needs_no_draft_and_off_drafts_nothing() -> None:
    drafter = sure_drafter()
    say(drafter, "a", 0, [10, 11, 12, 13, 14])
    say(drafter, "a", 1, [10, 11])
    assert draft_for(drafter, "a", 1, [10, 11], max_tokens=1) == EMPTY
    assert draft_for(drafter, "a", 1, [10, 11], max_tokens=2).token_ids == [12]
    assert drafter.propose([state("a", 1, [10, 11])], OFF) == [EMPTY]


def test_a_larger_batch_asks_for_surer_drafts() -> None:
    drafter = SuffixDrafter(min_match=2, overhead_tokens=32.0)
    say(drafter, "a", 0, [10, 11, 12])
    say(drafter, "a", 1, [9, 10, 11])
    one = state("a", 1, [9, 10, 11])  # one match of length 2
    assert drafter.propose([one], CHAIN)[0].token_ids == [12]
    assert drafter.propose([one] * 64, CHAIN) == [EMPTY] * 64


def test_a_restarted_sequence_is_drafted_from_what_was_lost() -> None:
    drafter = sure_drafter()
    say(drafter, "a", 0, [10, 11, 12, 13])
    say(drafter, "a", 0, [10])
    assert draft_for(drafter, "a", 0, [10]).token_ids == [11, 12, 13]
    drafter.finish("a", 0)
    say(drafter, "a", 0, [10])  # nothing is in flight twice: one finish was enough
    drafter.finish("a", 0)


def test_a_shortest_match_beyond_the_usual_longest_one_drafts_from_it_on() -> None:
    drafter = SuffixDrafter(min_match=20, overhead_tokens=math.inf)
    text = list(range(100, 130))
    say(drafter, "a", 0, text)
    for length, drafted in ((19, []), (20, text[20:24])):
        response = [7, *text[:length]]  # 7 parts it from its sibling: length tokens agree
        say(drafter, "a", length, response)
        assert draft_for(drafter, "a", length, response).token_ids[:4] == drafted


def test_earlier_epochs_survive_finish_and_a_saved_state() -> None:
    drafter = sure_drafter()
    say(drafter, "a", 0, [10, 11, 12, 13, 14])
    drafter.finish("a", 0)
    restored = sure_drafter()
    restored.load_state_dict(json.loads(json.dumps(drafter.state_dict(), default=list)))
    assert restored.state_dict() == drafter.state_dict()
    for later in (drafter, restored):
        say(later, "a", 0, [10, 11])
        assert draft_for(later, "a", 0, [10, 11]).token_ids == [12, 13, 14]


@settings(deadline=None)
@given(epochs=st.lists(st.lists(TEXT, min_size=2, max_size=3), min_size=2, max_size=4), cut=st.integers(0, 3))
def test_a_resumed_drafter_drafts_what_the_uninterrupted_one_does(epochs: list[list[list[int]]], cut: int) -> None:
    tree = Strategy(source="suffix", depth=4, top_k=3, num_verify=8)

    def run(drafter: SuffixDrafter, some_epochs: list[list[list[int]]]) -> list[list[Draft]]:
        drafts = []
        for texts in some_epochs:
            for sample, text in enumerate(texts):
                say(drafter, "a", sample, text)
            drafts.append(drafter.propose([state("a", s, text) for s, text in enumerate(texts)], tree))
            for sample in range(len(texts)):
                drafter.finish("a", sample)
        return drafts

    bounds = {"max_rollouts": 4, "max_history": 90}
    whole = run(straight := sure_drafter(**bounds), epochs)
    run(first := sure_drafter(**bounds), epochs[:cut])
    second = sure_drafter(**bounds)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), default=list)))
    assert run(second, epochs[cut:]) == whole[cut:]
    assert second.state_dict() == straight.state_dict()


@settings(deadline=None)
@given(texts=st.lists(TEXT, max_size=30), max_history=st.integers(0, 100), max_rollouts=st.integers(1, 5))
def test_history_keeps_its_bounds_and_drops_the_oldest(
    texts: list[list[int]], max_history: int, max_rollouts: int
) -> None:
    drafter = sure_drafter(max_history=max_history, max_rollouts=max_rollouts)
    for number, text in enumerate(texts):
        say(drafter, "ab"[number % 2], 0, text)
        drafter.finish("ab"[number % 2], 0)
    kept = drafter.state_dict()["finished"]
    assert sum(len(response) for _, response in kept) <= max_history
    for prompt in range(2):
        said = [text for text in texts[prompt::2] if text]
        mine = [response.tolist() for prompt_id, response in kept if prompt_id == "ab"[prompt]]
        assert len(mine) <= max_rollouts
        assert mine == said[len(said) - len(mine) :]


def test_a_prompt_that_never_leaves_flight_keeps_a_bounded_index() -> None:
    drafter = sure_drafter(max_rollouts=4)
    drafter.begin("a", 0, PROMPT)
    for number in range(100):
        say(drafter, "a", 1, [number] * 5)
        drafter.finish("a", 1)
        flight = drafter._flights["a"]
        assert len(flight.index.texts) <= len(flight.running) + 2 * 4 + 1
    drafter.extend("a", 0, [99, 99])
    assert draft_for(drafter, "a", 0, [99, 99]).token_ids == [99, 99, 99]


def test_a_state_shares_what_is_finished_and_stays_what_it_was() -> None:
    drafter = sure_drafter(max_rollouts=2)
    say(drafter, "a", 0, [10, 11])
    drafter.finish("a", 0)
    before = drafter.state_dict()
    for text in ([12], [13]):  # the second drops the rollout that the state holds
        say(drafter, "a", 0, text)
        drafter.finish("a", 0)
    assert json.loads(json.dumps(before, default=list)) == {"finished": [["a", [10, 11]]]}
    after = drafter.state_dict()["finished"]
    assert after[0][1] is drafter.state_dict()["finished"][0][1], "a step copies no token of the history"


def test_memory_is_what_the_docstrings_promise() -> None:
    rng = random.Random(0)
    num_tokens = 40_000
    texts = [[rng.randrange(49152) for _ in range(1000)] for _ in range(num_tokens // 1000)]  # nothing repeats: worst
    drafter = sure_drafter()
    for sample in range(len(texts)):
        drafter.begin("a", sample, PROMPT)
    tracemalloc.start()
    for sample, text in enumerate(texts):
        drafter.extend("a", sample, text)
    indexed = tracemalloc.get_traced_memory()[0]
    for sample in range(len(texts)):
        drafter.finish("a", sample)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert indexed / num_tokens < 600
    assert kept / sum(len(response) for _, response in drafter.state_dict()["finished"]) < 6


def test_drafts_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "import random; from drafter.suffix import *; from drafter.types import *\n"
        "rng = random.Random(1); drafter = SuffixDrafter(min_match=1, overhead_tokens=1e9)\n"
        "texts = [[rng.randrange(5) for _ in range(80)] for _ in range(6)]\n"
        "for s, t in enumerate(texts): drafter.begin('p', s, [1]); drafter.extend('p', s, t)\n"
        "states = [DraftState('p', s, [1] + t, 50) for s, t in enumerate(texts)]\n"
        "print(drafter.propose(states, Strategy('suffix', 5, 3, 12)))"
    )
    root = Path(__file__).parents[2]

    def output(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert output("1") == output("2")

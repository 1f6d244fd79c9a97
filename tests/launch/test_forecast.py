"""Long responses are foreseen, and no worker is given all of them."""

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from launch.forecast import PROMPTS, Lengths, spread
from rollout.types import Prompt


def prompt(name: str, tokens: int = 4) -> Prompt:
    return Prompt(id=name, token_ids=[0] * tokens, answer="")


def learned(*groups: tuple[Prompt, list[int]]) -> Lengths:
    lengths = Lengths()
    ends = {(each.id, sample): length for each, found in groups for sample, length in enumerate(found)}
    lengths.learn({each.id: each for each, _ in groups}, ends)
    return lengths


def test_nothing_is_known_at_first_and_prompts_go_round() -> None:
    prompts = [prompt(f"p{n}") for n in range(7)]
    expected = Lengths().expected(prompts)
    assert set(expected) == {1.0}
    found = spread(prompts, expected, [3, 5])
    assert [each.id for each in found[3]] == ["p0", "p2", "p4", "p6"]
    assert [each.id for each in found[5]] == ["p1", "p3", "p5"]


def test_a_prompt_of_an_earlier_epoch_is_expected_to_answer_as_long() -> None:
    short, long = prompt("short"), prompt("long")
    lengths = learned((short, [10, 20]), (long, [300, 500]))
    assert lengths.expected([long, short]) == [400.0, 15.0]
    lengths.learn({"long": long}, {("long", 0): 60})
    assert lengths.expected([long]) == [60.0]  # the policy has changed


def test_a_new_prompt_is_judged_by_its_length() -> None:
    groups = [(prompt(f"p{n}", n), [10 * n + 5]) for n in range(1, 20)]
    few, many = learned(*groups).expected([prompt("new", 3), prompt("other", 15)])
    assert (round(few), round(many)) == (35, 155)
    alike = learned((prompt("a"), [10]), (prompt("b"), [30])).expected([prompt("new", 50)])
    assert alike == [20.0]  # prompts of one length tell nothing of others


def test_the_longest_go_first_each_to_the_worker_with_least() -> None:
    lengths = [900, 100, 100, 100, 100, 100, 400, 800]
    prompts = [prompt(f"p{n}") for n in range(len(lengths))]
    found = spread(prompts, lengths, [0, 1])
    by_id = dict(zip((each.id for each in prompts), lengths, strict=True))
    assert sorted(sum(by_id[each.id] for each in share) for share in found.values()) == [1300, 1300]
    turns = [sum(lengths[0::2]), sum(lengths[1::2])]
    assert max(turns) > 1300  # what going round would have cost


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 8))
def test_no_worker_has_more_than_the_rule_promises(lengths: list[int], count: int) -> None:
    prompts = [prompt(f"p{n}") for n in range(len(lengths))]
    found = spread(prompts, lengths, range(count))
    assert sorted(each.id for share in found.values() for each in share) == sorted(each.id for each in prompts)
    loads = [sum(lengths[int(each.id[1:])] for each in share) for share in found.values()]
    assert max(loads) <= (4 / 3) * max(sum(lengths) / count, max(lengths)) + max(lengths)
    assert max(loads) - min(loads) <= max(lengths)


def test_what_is_expected_survives_a_checkpoint_and_no_order_of_arrival_matters() -> None:
    prompts = {f"p{n}": prompt(f"p{n}", n % 7 + 1) for n in range(50)}
    ends = {
        (name, sample): random.Random(f"{name}{sample}").randrange(1, 500) for name in prompts for sample in range(3)
    }
    one, other = Lengths(), Lengths()
    one.learn(prompts, ends)
    shuffled = list(ends.items())
    random.Random(1).shuffle(shuffled)
    other.learn(prompts, dict(shuffled))
    resumed = Lengths()
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    asked = [*prompts.values(), prompt("new", 9)]
    assert one.expected(asked) == other.expected(asked) == resumed.expected(asked)


def test_only_so_many_prompts_are_remembered() -> None:
    lengths = Lengths()
    for start in range(0, PROMPTS + 1000, 1000):
        prompts = {f"p{n}": prompt(f"p{n}") for n in range(start, start + 1000)}
        lengths.learn(prompts, {(name, 0): 7 for name in prompts})
    lengths.learn({"p1": prompt("p1")}, {("p1", 0): 99})
    assert len(lengths.state_dict()["last"]) == PROMPTS
    assert lengths.expected([prompt("p1")]) == [99.0]

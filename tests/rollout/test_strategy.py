"""The arms a config gives, the chooser it names, TLT's bandit and the fixed one."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import SpecConfig
from drafter.types import OFF, Strategy
from rollout.bandit import BegMabChooser
from rollout.goodput import GoodputChooser
from rollout.strategy import BelowChooser, Chooser, CycleReport, FixedChooser, arms, configured, make_chooser

WIDE, MIDDLE, NARROW = (Strategy("suffix", depth=width, top_k=1, num_verify=width) for width in (15, 7, 3))


def report(strategy: Strategy, *, batch: int, accepted: list[int], seconds: float) -> CycleReport:
    return CycleReport(
        strategy=strategy,
        batch=batch,
        bucket=batch,
        context=100.0,
        seconds=seconds,
        committed=batch + sum(accepted),
        proposed_by_depth=[batch] * len(accepted),
        accepted_by_depth=accepted,
        rows_with_draft=batch if accepted else 0,
    )


@pytest.mark.parametrize(
    ("spec", "widths", "depths"),
    [
        (SpecConfig(source="off"), [0], [0]),
        (SpecConfig(depth=6, num_verify=6), [0, 1, 3, 6], [0, 1, 3, 6]),
        (SpecConfig(depth=8, top_k=3, num_verify=15), [0, 3, 7, 15], [0, 3, 7, 8]),
        (SpecConfig(depth=8, top_k=1, num_verify=15), [0, 1, 3, 8], [0, 1, 3, 8]),
        (SpecConfig(depth=1, top_k=4, num_verify=4), [0, 1, 4], [0, 1, 1]),
        (SpecConfig(depth=4, num_verify=1), [0, 1], [0, 1]),
    ],
)
def test_arms_halve_the_configured_width_three_times_at_most(
    spec: SpecConfig, widths: list[int], depths: list[int]
) -> None:
    found = arms(spec)
    assert [arm.num_verify for arm in found] == widths
    assert [arm.depth for arm in found] == depths


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 200))
def test_arms_stay_within_the_config_and_are_few(depth: int, top_k: int, num_verify: int) -> None:
    spec = SpecConfig(depth=depth, top_k=top_k, num_verify=num_verify)
    found = arms(spec)
    assert found[0] == OFF
    assert found[-1:] == configured(spec)
    assert 2 <= len(found) == len(set(found)) <= 4
    for arm in found[1:]:
        assert 1 <= arm.depth <= min(depth, arm.num_verify)
        assert arm.num_verify <= num_verify
        assert arm.top_k == top_k


@pytest.mark.parametrize("num_verify", [1, 6, 15])
def test_sources_have_the_same_arms_which_forward_equally_many_tokens(num_verify: int) -> None:
    spec = SpecConfig(source="auto", depth=8, top_k=2, num_verify=num_verify)
    found = arms(spec)
    assert found[0] == OFF
    assert len(found) == len(set(found)) <= 7
    of_source = {
        source: [(arm.depth, arm.top_k, arm.num_verify) for arm in found if arm.source == source]
        for source in ("suffix", "eagle")
    }
    assert of_source["suffix"] == of_source["eagle"]
    for source in ("suffix", "eagle"):
        alone = replace(spec, source=source)
        assert [arm for arm in found if arm.source in ("off", source)] == list(arms(alone))
        assert configured(alone)[0] in configured(spec)


@pytest.mark.parametrize(
    ("choice", "device", "kind"),
    [
        ("auto", "cpu", FixedChooser),
        ("auto", "cuda", GoodputChooser),
        ("auto", "cuda:1", GoodputChooser),
        ("goodput", "cpu", GoodputChooser),
        ("beg_mab", "cpu", BegMabChooser),
        ("fixed", "cuda", FixedChooser),
    ],
)
def test_config_names_the_chooser(choice: str, device: str, kind: type) -> None:
    assert type(make_chooser(SpecConfig(choice=choice), device=device, seed=0)) is kind  # type: ignore[arg-type]


def test_no_source_leaves_nothing_to_choose() -> None:
    chooser = make_chooser(SpecConfig(source="off", choice="goodput"), device="cuda", seed=0)
    assert chooser.choose(batch=1, context=0) == OFF


def test_fixed_is_always_what_the_config_allows() -> None:
    chooser = make_chooser(SpecConfig(depth=4, num_verify=4), device="cpu", seed=0)
    chooser.observe(report(OFF, batch=1, accepted=[], seconds=1.0))
    chooser.policy_changed()
    chosen = {chooser.choose(batch=batch, context=0) for batch in (1, 8, 256)}
    assert chosen == {Strategy("suffix", depth=4, top_k=1, num_verify=4)}
    assert chooser.summary()["cycles"] == 3


def test_fixed_gives_each_source_its_share_and_needs_no_memory_for_it() -> None:
    spec = SpecConfig(source="auto", depth=4, num_verify=4)

    def chosen() -> list[Strategy]:
        chooser = make_chooser(spec, device="cpu", seed=0)
        return [chooser.choose(batch=batch, context=17.0 + batch / 4) for batch in range(1, 201)]

    first = chosen()
    assert set(first) == set(configured(spec))
    assert chosen()[50:] == first[50:]
    chooser = make_chooser(spec, device="cpu", seed=0)
    assert [chooser.choose(batch=batch, context=17.0 + batch / 4) for batch in range(51, 201)] == first[50:]
    arms_used = chooser.summary()["arms"]
    assert [arm["source"] for arm in arms_used] == ["suffix", "eagle"]
    assert sum(arm["share"] for arm in arms_used) == pytest.approx(1)


@pytest.mark.parametrize("choice", ["goodput", "beg_mab", "fixed"])
def test_below_a_limit_drafts_and_at_it_decodes_plainly(choice: str) -> None:
    spec = SpecConfig(choice=choice, below=32)  # type: ignore[arg-type]
    chooser = make_chooser(spec, device="cuda", seed=0)
    assert isinstance(chooser, BelowChooser)
    assert {chooser.choose(batch=batch, context=9.0) for batch in (32, 33, 500)} == {OFF}
    chooser.observe(report(OFF, batch=32, accepted=[], seconds=1.0))
    below = {chooser.choose(batch=1 + number % 31, context=9.0) for number in range(400)}
    assert below <= set(arms(spec))
    assert below - {OFF}
    assert chooser.max_num_verify == spec.num_verify
    assert chooser.summary()["cycles_above"] == 3
    json.dumps(chooser.summary(), allow_nan=False)


def test_tlts_policy_always_drafts_below_its_limit() -> None:
    chooser = make_chooser(SpecConfig(choice="beg_mab", below=32), device="cuda", seed=0)
    chosen = set()
    for number in range(500):
        arm = chooser.choose(batch=1 + number % 31, context=9.0)
        chooser.observe(report(arm, batch=1, accepted=[], seconds=9.0))
        chosen.add(arm)
    assert OFF not in chosen
    assert {arm.num_verify for arm in chosen} == {3, 6}, "the narrowest is for batches from 32"


def test_bandit_tries_a_changed_drafter_as_if_for_the_first_time() -> None:
    chooser = BegMabChooser((OFF, NARROW), seed=0, epsilon=0.0)
    chooser.observe(report(OFF, batch=1, accepted=[], seconds=1.0))
    chooser.observe(report(NARROW, batch=1, accepted=[0, 0, 0], seconds=2.0))
    chooser.drafter_changed("eagle")
    assert chooser.choose(batch=1, context=0) == OFF
    chooser.drafter_changed("suffix")
    assert chooser.choose(batch=1, context=0) == NARROW


CHOOSERS: dict[str, Callable[[], Chooser]] = {
    "goodput": lambda: GoodputChooser((WIDE, NARROW)),
    "beg_mab": lambda: BegMabChooser((OFF, WIDE, NARROW), seed=3, epsilon=0.5),
}


@pytest.mark.parametrize("kind", CHOOSERS)
@settings(deadline=None)  # on a shared machine time says nothing
@given(data=st.data())
def test_choices_are_among_the_arms_and_off_is_one(kind: str, data: st.DataObject) -> None:
    chooser = CHOOSERS[kind]()
    seen = []
    for _ in range(data.draw(st.integers(1, 30))):
        batch = data.draw(st.integers(1, 700))
        arm = chooser.choose(batch=batch, context=data.draw(st.floats(0, 1e6)))
        seen.append(arm)
        accepted = sorted(data.draw(st.lists(st.integers(0, batch), min_size=arm.depth, max_size=arm.depth)))[::-1]
        if data.draw(st.booleans()):
            chooser.observe(report(arm, batch=batch, accepted=accepted, seconds=data.draw(st.floats(1e-5, 10))))
        if data.draw(st.booleans()):
            chooser.policy_changed()
        if data.draw(st.booleans()):
            chooser.drafter_changed(data.draw(st.sampled_from(["suffix", "eagle"])))
    assert set(seen) <= {OFF, WIDE, NARROW}
    assert OFF in {Strategy(a["source"], a["depth"], 0, a["num_verify"]) for a in chooser.summary()["arms"]}
    json.dumps(chooser.summary(), allow_nan=False)


def test_bandit_exploits_the_largest_median_reward_of_its_window() -> None:
    chooser = BegMabChooser((OFF, NARROW), seed=0, epsilon=0.0, window=3)
    # rewards: (accepted / batch + 1) x batch / seconds. off: 4 / 2 = 2
    chooser.observe(report(OFF, batch=4, accepted=[], seconds=2.0))
    # narrow: (6 / 4 + 1) x 4 / 5 = 2, then (0 / 4 + 1) x 4 / 4 = 1, then (4 / 4 + 1) x 4 / 2 = 4: the median is 2
    for accepted, seconds in (([3, 2, 1], 5.0), ([0, 0, 0], 4.0), ([4, 0, 0], 2.0)):
        chooser.observe(report(NARROW, batch=4, accepted=accepted, seconds=seconds))
    rewards = {arm["num_verify"]: arm["reward"] for arm in chooser.summary()["arms"]}
    assert rewards == {0: 2.0, 3: 2.0}
    # (8 / 4 + 1) x 4 / 4 = 3 pushes the first 2 out of the window: 1, 4, 3 have the median 3
    chooser.observe(report(NARROW, batch=4, accepted=[4, 3, 1], seconds=4.0))
    assert chooser.choose(batch=4, context=0) == NARROW
    # 1 and 0.5 push 1 and 4 out: 3, 1, 0.5 have the median 1
    for seconds in (4.0, 8.0):
        chooser.observe(report(NARROW, batch=4, accepted=[0, 0, 0], seconds=seconds))
    assert chooser.choose(batch=4, context=0) == OFF


@pytest.mark.parametrize(("batch", "group"), [(1, WIDE), (7, WIDE), (8, MIDDLE), (31, MIDDLE), (32, NARROW)])
def test_bandit_tries_the_group_of_the_batch_size_and_off(batch: int, group: Strategy) -> None:
    chooser = BegMabChooser((NARROW, OFF, MIDDLE, WIDE), seed=0, epsilon=1.0)
    chosen = Counter(chooser.choose(batch=batch, context=0) for _ in range(1000))
    assert set(chosen) == {OFF, group}
    assert 400 < chosen[OFF] < 600


def test_bandit_explores_as_often_as_epsilon_says_and_repeats_with_its_seed() -> None:
    def run(seed: int) -> list[Strategy]:
        chooser = BegMabChooser((OFF, NARROW), seed=seed, epsilon=0.2)
        chooser.observe(report(OFF, batch=1, accepted=[], seconds=1.0))
        chooser.observe(report(NARROW, batch=1, accepted=[1, 0, 0], seconds=4.0))
        return [chooser.choose(batch=1, context=0) for _ in range(2000)]

    assert run(1) == run(1) != run(2)
    assert 140 < run(1).count(NARROW) < 260  # half of what is drawn at random


def test_bandit_compares_strategies_that_verify_equally_many_tokens() -> None:
    deep, broad = (Strategy("suffix", depth=depth, top_k=8 - depth, num_verify=7) for depth in (7, 3))
    chooser = BegMabChooser((OFF, deep, broad), seed=0, epsilon=0.0)
    chooser.observe(report(OFF, batch=1, accepted=[], seconds=1.0))
    chooser.observe(report(deep, batch=1, accepted=[1] * 2 + [0] * 5, seconds=1.0))
    assert chooser.choose(batch=1, context=0) == broad, "what was never tried goes first"
    chooser.observe(report(broad, batch=1, accepted=[1, 0, 0], seconds=1.0))
    assert chooser.choose(batch=1, context=0) == deep

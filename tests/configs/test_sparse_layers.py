"""What a configuration may say of single layers, what comes of it, and what is answered to the rest."""

import re

import pytest

from configs.errors import ConfigError
from configs.layers import runs
from configs.load import dump, parse
from configs.schema import Config, LayersConfig, SparseConfig

BASE = "data: {name: chain_sum}\nrollout: {block_size: 64}\n"


def parsed(layers: str, *overrides: str) -> Config:
    return parse(f"{BASE}sparse: {{mode: draft, layers: {layers}}}", overrides)


def found(sparse: SparseConfig, num_layers: int) -> list[tuple[list[int], str, int]]:
    return [([*layers], each.selector, each.budget_tokens) for layers, each in runs(sparse, num_layers)]


def test_each_range_says_what_differs_and_other_layers_are_as_the_section_has_them() -> None:
    config = parsed("{0-1: {selector: dense}, 3-4: {selector: streaming}, 6-: {budget_tokens: 512}}")
    assert found(config.sparse, 8) == [
        ([2], "quest", 1024),
        ([3, 4], "streaming", 1024),
        ([5], "quest", 1024),
        ([6, 7], "quest", 512),
    ]
    assert parse(dump(config)) == config


def test_ranges_may_come_in_any_order_and_one_layer_is_one() -> None:
    config = parsed("{4-: {selector: mean}, 0: {selector: dense}, 2-2: {budget_tokens: 256}}")
    assert found(config.sparse, 5) == [
        ([1], "quest", 1024),
        ([2], "quest", 256),
        ([3], "quest", 1024),
        ([4], "mean", 1024),
    ]


def test_neighbours_that_are_alike_are_one_run_whatever_names_them() -> None:
    config = parsed("{2: {selector: quest}, 3: {budget_tokens: 1024}}", "sparse.dense_layers=1")
    assert found(config.sparse, 6) == [([1, 2, 3, 4, 5], "quest", 1024)]
    assert found(SparseConfig(dense_layers=3), 3) == []


def test_an_override_adds_a_range() -> None:
    config = parsed("{0-1: {selector: dense}}", "sparse.layers.4-.selector=mean", "sparse.layers.4-.budget_tokens=512")
    assert config.sparse.layers == {"0-1": LayersConfig("dense"), "4-": LayersConfig("mean", 512)}


@pytest.mark.parametrize(
    ("layers", "overrides", "answer"),
    [
        (
            "{first: {selector: mean}}",
            [],
            r"sparse\.layers=.*: 'first' names no layers; write 4, or 2-9, or 10- for all",
        ),
        ("{9-2: {selector: mean}}", [], r"'9-2' names no layers"),
        ("{-1: {selector: mean}}", [], r"'-1' names no layers"),
        ("{0.5: {budget_tokens: 1}}", [], r"'0\.5' names no layers"),
        ("{0-3: {}, 3-5: {}}", [], r"sparse\.layers\.3-5=.*: layer 3 is in 0-3 too; take it out of one"),
        ("{4-: {}, 6: {}}", [], r"sparse\.layers\.6=.*: layer 6 is in 4- too; take it out of one"),
        (
            "{1-: {}}",
            ["sparse.dense_layers=2"],
            r"layer 1 is dense by sparse\.dense_layers=2; set that to 1, or begin at 2",
        ),
        ("{0-1: dense}", [], r"sparse\.layers\.0-1='dense': expected a mapping of selector, budget_tokens, not text"),
        (
            "{0-1: {selector: best}}",
            [],
            r"sparse\.layers\.0-1\.selector='best': expected one of default, dense, quest, ",
        ),
        ("{0-1: {budget: 9}}", [], r"unknown key sparse\.layers\.0-1\.budget; known are selector, budget_tokens"),
        ("{0-1: {budget_tokens: 1.5}}", [], r"sparse\.layers\.0-1\.budget_tokens=1\.5: expected an integer"),
        ("{0-1: {budget_tokens: -1}}", [], r"sparse\.layers\.0-1\.budget_tokens=-1: must be at least 1, or 0 for"),
        (
            "{0-1: {budget_tokens: 80}}",
            ["sparse.selector=streaming"],
            r"sparse\.layers\.0-1\.budget_tokens=80: .* take 96 tokens .* set 96 or more",
        ),
        (
            "{0-1: {selector: resa}}",
            ["sparse.selector=streaming", "sparse.budget_tokens=128"],
            r"sparse\.budget_tokens=128: sparse\.layers\.0-1\.selector=resa reads 16 blocks .* set 256 or more",
        ),
        (
            "{0-1: {selector: mean}}",
            ["sparse.selector=streaming", "sparse.budget_tokens=128"],
            r"sparse\.budget_tokens=128: .* take 192 tokens .* set 192 or more",
        ),
        (
            "{0: {selector: dense, budget_tokens: 512}}",
            [],
            r"sparse\.layers\.0\.budget_tokens=512: dense layers read everything; set 0, or another selector",
        ),
        ("{0: {selector: mean}}", ["rollout.block_size=16"], r"rollout\.block_size=16: .* whole blocks of 64 tokens"),
        ("{0: {selector: duo}}", [], r"sparse\.gate='': name Duo.*, which sparse\.layers\.0\.selector=duo reads"),
        (
            "{0: {selector: duo}, 1: {selector: gate}}",
            ["sparse.gate=G"],
            r"sparse\.gate='G': names gates, or DuoAttention's heads: select by one of them, not by both",
        ),
        (
            "{0: {selector: verified}}",
            ["sparse.threshold=0.1"],
            r"sparse\.threshold=0\.1: the scores of sparse\.selector=quest are no weights",
        ),
        (
            "{0: {selector: verified}}",
            ["sparse.mode=plain", "spec.source=off"],
            r"sparse\.layers\.0\.selector='verified': goes by what was verified.*set quest",
        ),
        ("{0: {selector: mean}}", ["sparse.learn=true"], r"sparse\.learn=True: .* has no gates"),
        ("{0: {}}", ["sparse.layers.0.selector=mean"], r"override 'sparse\.layers\.0\.selector=mean': .* 0 and '0'"),
    ],
)
def test_what_cannot_work_is_answered_with_the_remedy(layers: str, overrides: list[str], answer: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(layers, *overrides)
    (line,) = str(caught.value).splitlines()
    assert re.search(answer, line), line


UNUSED = ["sparse.selector=verified", "sparse.select_block=24", "sparse.budget_tokens=8", "rollout.block_size=24"]


@pytest.mark.parametrize(
    ("layers", "dense_layers"),
    [
        ("{0-: RANGE}", 0),
        ("{4-: RANGE, 0-3: {selector: dense}}", 0),
        ("{2-4: {selector: dense}, 5-: RANGE}", 2),
    ],
)
def test_what_ranges_leave_no_layer_is_not_judged(layers: str, dense_layers: int) -> None:
    layers = layers.replace("RANGE", "{selector: streaming, budget_tokens: 512}")
    config = parsed(layers, f"sparse.dense_layers={dense_layers}", *UNUSED)
    assert {each.selector for _, each in runs(config.sparse, 8)} == {"streaming"}


@pytest.mark.parametrize(
    "layers", ["{1-: RANGE}", "{0-2: RANGE, 4-: RANGE}", "{0-7: RANGE}", "{0-: {selector: dense}}"]
)
def test_what_a_layer_may_be_left_to_is_judged(layers: str) -> None:
    with pytest.raises(ConfigError, match=r"sparse\.select_block=24: verification weighs"):
        parsed(layers.replace("RANGE", "{selector: streaming, budget_tokens: 512}"), *UNUSED)


@pytest.mark.parametrize(
    ("layers", "overrides", "answer"),
    [
        ("{0-: {selector: mean}}", ["sparse.budget_tokens=8"], r"sparse\.budget_tokens=8: .* set 192 or more"),
        ("{0-: {budget_tokens: 512}}", ["sparse.threshold=0.1"], r"scores of sparse\.selector=quest are no weights"),
        (
            "{0-: {selector: mean}}",
            ["sparse.gate=G"],
            r"sparse\.gate='G': sparse\.layers\.0-\.selector=mean reads none; set '', or .*\.0-\.selector=gate",
        ),
        (
            "{0-: {selector: mean}}",
            ["sparse.learn=true", "sparse.selector=gate"],
            r"sparse\.learn=True: sparse\.layers\.0-\.selector=mean has no gates",
        ),
    ],
)
def test_what_ranges_take_of_the_section_is_judged(layers: str, overrides: list[str], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        parsed(layers, *overrides)


def test_gates_of_some_layers_may_learn() -> None:
    assert parsed("{2-: {selector: gate}}", "sparse.gate=G", "sparse.learn=true").sparse.learn


@pytest.mark.parametrize("name", ["2", "0-2", "2-"])
def test_layers_that_the_policy_does_not_have_are_named(name: str) -> None:
    config = parsed(f"{{{name}: {{selector: dense}}}}").sparse
    assert runs(config, 3)[1:] == []
    with pytest.raises(ConfigError, match=rf"sparse\.layers\.{name}: the policy's layers are 0 to 1; name those alone"):
        runs(config, 2)


def test_what_is_off_is_not_judged() -> None:
    parse(BASE, ["sparse.layers={0-3: {selector: gate}, 2: {budget_tokens: 1}}"])

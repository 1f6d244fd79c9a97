"""What a configuration of sparse attention may say, and what is answered to the rest."""

import re
import textwrap
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from configs.errors import ConfigError
from configs.load import parse
from configs.schema import SparseConfig

BASE = "data: {name: chain_sum}\n"


def complaint(*overrides: str) -> list[str]:
    """The lines of the error a configuration raises."""
    with pytest.raises(ConfigError) as caught:
        parse(BASE, overrides)
    return str(caught.value).splitlines()


def test_sparse_attention_is_off_unless_it_is_asked_for() -> None:
    assert parse(BASE).sparse.mode == "off"
    assert parse(BASE + "sparse: {mode: off}").sparse.mode == "off"


@pytest.mark.parametrize("selector", ["quest", "resa", "streaming", "mean", "verified"])
def test_drafting_needs_no_more_than_its_mode(selector: str) -> None:
    config = parse(BASE, ["sparse.mode=draft", f"sparse.selector={selector}", "rollout.block_size=64"])
    assert config.sparse.block_tokens == (64 if selector == "mean" else 16)


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["sparse.select_block=24"], r"sparse\.select_block=24: .* set rollout\.block_size=24"),
        (["sparse.selector=mean"], r"rollout\.block_size=16: .* blocks of 64 .* set rollout\.block_size=64"),
        (
            ["sparse.selector=streaming", "sparse.budget_tokens=64"],
            r"sparse\.budget_tokens=64: sparse\.sinks, sparse\.window .* take 96 tokens .* set 96 or more",
        ),
        (
            ["sparse.budget_tokens=255"],
            r"=255: sparse\.selector=quest reads 16 blocks in any case; set 256 or more, or a smaller sparse\.select",
        ),
        (["sparse.budget_tokens=64"], r"sparse\.budget_tokens=64: sparse\.selector=quest .* set 256 or more"),
        (
            [
                "sparse.budget_tokens=64",
                "sparse.window=0",
                "sparse.select_block=4",
                "sparse.depth=16",
                "sparse.sinks=12",
            ],
            r"sparse\.budget_tokens=64: sparse\.sinks, sparse\.depth and .* take 68 tokens .* set 68 or more",
        ),
        (["sparse.selector=gate", "rollout.block_size=64"], r"sparse\.gate='': name the folder of trained gates"),
        (
            ["sparse.gate=GATES"],
            r"sparse\.gate='GATES': sparse\.selector=quest reads none; set '', or .*=gate",
        ),
        (["sparse.learn=true"], r"sparse\.learn=True: sparse\.selector=quest has no gates; set false, or .*=gate"),
        (
            ["sparse.descriptors=fp8"],
            r"sparse\.descriptors='fp8': sparse\.selector=quest has no gates; set policy, or .*=gate",
        ),
        (["sparse.selector=duo"], r"sparse\.gate='': name DuoAttention's full_attention_heads\.tsv"),
        (
            ["sparse.selector=duo", "sparse.gate=HEADS", "sparse.budget_share=0.1"],
            r"sparse\.budget_share=0\.1: the window of sparse\.selector=duo is as long for every sequence; set 0",
        ),
        (["sparse.inner=eagle"], r"sparse\.inner='eagle': there is no head; set spec\.source=eagle"),
        (
            ["sparse.inner=suffix", "spec.source=off", "spec.min_match=0"],
            r"spec\.min_match=0: must be at least 1: sparse\.inner=suffix",
        ),
        (["rollout.backend=vllm"], r"sparse\.mode='draft': .* set off, or rollout\.backend=native"),
        (["sparse.threshold=0.1"], r"sparse\.threshold=0\.1: the scores of sparse\.selector=quest are no weights"),
        (
            ["sparse.selector=verified", "sparse.select_block=24", "rollout.block_size=24"],
            r"sparse\.select_block=24: verification weighs 1, 2, 4 to 128 tokens together; set 16",
        ),
        (
            ["sparse.selector=verified", "sparse.select_block=256", "rollout.block_size=256"],
            r"sparse\.select_block=256: verification weighs .* set 16",
        ),
        (
            [
                "sparse.selector=gate",
                "sparse.gate=G",
                "sparse.learn=true",
                "sparse.select_block=256",
                "rollout.block_size=256",
            ],
            r"sparse\.select_block=256: verification weighs .* take gates of such blocks, or set sparse\.learn=false",
        ),
        (["sparse.selector=verified", "sparse.threshold=1"], r"sparse\.threshold=1\.0: must be below 1"),
        (
            ["rollout.max_new_tokens=600000", "rollout.block_size=64"],
            r"sparse\.select_block=0: \d+ tokens are more than 15000 blocks of 16; set 64",
        ),
        (["sparse.depth=17"], r"sparse\.depth=17: must be at most 16"),
        (["spec.min_match=17"], r"spec\.min_match=17: must be at most 16"),
        (["sparse.depth=0"], r"sparse\.depth=0: must be at least 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_answered_with_the_remedy(overrides: list[str], answer: str) -> None:
    lines = complaint("sparse.mode=draft", *overrides)
    assert any(re.search(answer, line) for line in lines), lines


@pytest.mark.parametrize(
    "overrides",
    [
        ["sparse.budget_tokens=0"],
        ["sparse.threshold=-1"],
        ["compute.backend=ray", "compute.placement=separate", "compute.rollout_workers=2", "rollout.tensor_parallel=2"],
    ],
    ids=lambda value: value[-1],
)
def test_one_mistake_is_answered_once(overrides: list[str]) -> None:
    assert len(complaint("sparse.mode=draft", *overrides)) == 1


@pytest.mark.parametrize("mode", ["off", "plain", "rectified"])
def test_gates_learn_where_they_change_no_sample(mode: str) -> None:
    options = ["spec.source=off", "sparse.selector=gate", "sparse.gate=G", "rollout.block_size=64", "sparse.learn=true"]
    (line,) = complaint(f"sparse.mode={mode}", *options)
    assert re.search(rf"sparse\.learn=True: is of sparse\.mode=draft, not of {mode}; set false", line)


def test_all_that_needs_gates_is_answered_at_once() -> None:
    lines = complaint("sparse.mode=draft", "sparse.learn=true", "sparse.descriptors=fp8")
    answers = {line.partition(": ")[0]: line.partition("; ")[2] for line in lines}
    assert answers == {
        "sparse.learn=True": "set false, or sparse.selector=gate",
        "sparse.descriptors='fp8'": "set policy, or sparse.selector=gate",
    }


def test_what_is_off_is_not_judged() -> None:
    parse(BASE, ["sparse.selector=gate", "sparse.inner=eagle", "sparse.budget_tokens=8"])
    parse(BASE, ["sparse.selector=quest", "sparse.descriptors=fp8"])


def test_a_block_is_as_published_unless_it_is_named() -> None:
    assert SparseConfig(selector="gate").block_tokens == 64
    assert SparseConfig(selector="gate", select_block=32).block_tokens == 32


def test_what_is_drafted_is_read_until_it_is_verified() -> None:
    blocks = {
        mode: SparseConfig(mode=mode, window=0, depth=16, select_block=4).recent_blocks for mode in ("draft", "plain")
    }
    assert blocks == {"draft": 4, "plain": 0}
    assert SparseConfig(mode="draft", window=64, depth=16, select_block=4).recent_blocks == 16


def test_the_documented_examples_load() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sparse.md").read_text(encoding="utf-8")
    examples = [block for block in re.findall(r"(?m)(?:^    .*\n)+", page) if "sparse:" in block]
    assert {parse(BASE + textwrap.dedent(example)).sparse.mode for example in examples} >= {"draft"}


def test_every_option_and_selector_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sparse.md").read_text(encoding="utf-8")
    hints = get_type_hints(SparseConfig)
    names = {*hints, *get_args(hints["selector"]), *get_args(hints["mode"])}
    assert {name for name in names if not re.search(rf"\b{name}\b", page)} == set()

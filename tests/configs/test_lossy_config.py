"""Modes that change what is sampled: what they need, and what they refuse."""

import pytest

from configs.errors import ConfigError
from configs.load import parse

BASE = "data: {name: chain_sum}\nrollout: {block_size: 64}\nspec: {source: off}\n"


@pytest.mark.parametrize("mode", ["plain", "rectified"])
def test_a_lossy_mode_is_asked_for_by_name(mode: str) -> None:
    assert parse(BASE).sparse.mode == "off"
    assert parse(BASE, [f"sparse.mode={mode}"]).sparse.mode == mode


@pytest.mark.parametrize("mode", ["plain", "rectified"])
@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.importance_cap=0", "samples from another distribution; set 2"),
        ("spec.source=suffix", "set off"),
        ("sparse.inner=suffix", "set off"),
        ("rollout.backend=vllm", "rollout.backend=native"),
        ("spec.choice=goodput", "spec.choice='goodput': {mode} leaves nothing to choose; set auto"),
        ("spec.choice=beg_mab", "spec.choice='beg_mab': {mode} leaves nothing to choose; set auto"),
        ("spec.below=5", "spec.below=5: {mode} is for any number of sequences; set 0"),
    ],
)
def test_what_a_lossy_mode_cannot_have_is_refused_with_its_remedy(mode: str, override: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(BASE, [f"sparse.mode={mode}", override])
    assert refused.value.exit_code == 2
    assert remedy.format(mode=f"sparse.mode={mode}") in str(refused.value)


@pytest.mark.parametrize("mode", ["plain", "rectified"])
def test_a_lossy_mode_is_chosen_for_every_cycle(mode: str) -> None:
    assert parse(BASE, [f"sparse.mode={mode}", "spec.choice=fixed"]).spec.choice == "fixed"
    draft = parse(BASE, ["sparse.mode=draft", "spec.choice=goodput", "spec.below=5"])
    assert (draft.spec.choice, draft.spec.below) == ("goodput", 5)


def test_a_lossless_mode_may_switch_the_correction_off() -> None:
    for mode in ("off", "draft"):
        assert parse(BASE, [f"sparse.mode={mode}", "train.importance_cap=0"]).train.importance_cap == 0


def test_a_window_is_no_longer_than_what_is_forwarded_at_once() -> None:
    assert parse(BASE, ["sparse.mode=rectified", "sparse.every=64"]).sparse.every == 64
    for every in (0, 65):
        with pytest.raises(ConfigError, match="sparse.every"):
            parse(BASE, ["sparse.mode=rectified", f"sparse.every={every}"])
    assert parse(BASE, ["sparse.mode=plain", "sparse.every=65"])  # which it does not read
    with pytest.raises(ConfigError, match="sparse.window=31: .*set 32"):
        parse(BASE, ["sparse.mode=rectified", "sparse.window=31"])


@pytest.mark.parametrize(("mode", "reason"), [("plain", "verifies nothing"), ("rectified", "forgets a preempted")])
def test_what_goes_by_verification_only_drafts(mode: str, reason: str) -> None:
    assert parse(BASE, ["sparse.mode=draft", "sparse.selector=verified"])
    with pytest.raises(ConfigError, match=f"sparse.selector='verified'.*{reason}.*set quest"):
        parse(BASE, [f"sparse.mode={mode}", "sparse.selector=verified"])

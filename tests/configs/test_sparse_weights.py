"""sparse.weights: whose weights drafts read."""

import pytest

from configs.errors import ConfigError
from configs.load import parse

RECIPE = "data: {name: chain_sum}"


def test_drafts_may_read_eight_bits() -> None:
    options = ["sparse.mode=draft", "rollout.block_size=16"]
    assert parse(RECIPE, options).sparse.weights == "policy"
    for weights in ("int8", "fp8"):
        assert parse(RECIPE, [*options, f"sparse.weights={weights}"]).sparse.weights == weights


@pytest.mark.parametrize("mode", ["off", "plain", "rectified"])
def test_what_is_sampled_is_not_read_from_eight_bits(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"sparse\.weights='int8'.*set policy, or sparse\.mode=draft"):
        parse(RECIPE, [f"sparse.mode={mode}", "spec.source=off", "sparse.weights=int8"])

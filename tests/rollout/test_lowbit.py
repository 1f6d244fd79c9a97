"""Drafting with a copy of the policy in eight bits: whatever it says, samples are the policy's own."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.errors import PreflightError
from configs.schema import RolloutConfig, SparseConfig
from drafter.combined import CombinedDrafter
from drafter.ngram import NgramDrafter
from drafter.selfdraft import SelfDrafter
from drafter.types import OFF, ResidentDrafter, Strategy
from kernels.lowbit import Kind
from rollout.engine import NativeEngine
from rollout.fused import FusedDecoder
from rollout.lowbit import LowBitPolicy, require_readable
from rollout.model import ATTENTION, alone, load_policy
from rollout.pretrained import resolve
from rollout.projections import lay_side_by_side
from rollout.selectors import make_sparse
from rollout.strategy import FixedChooser
from rollout.types import Prompt, Rollout, Sampling

Key = tuple[str, int]
Collect = Callable[..., dict[Key, Rollout]]
AssertSame = Callable[[dict[Key, Rollout], dict[Key, Rollout]], None]

KINDS = get_args(Kind)
SPARSE = SparseConfig(mode="draft", select_block=4, budget_tokens=24, window=4, depth=5)
EVERYTHING = replace(SPARSE, budget_tokens=4096)
STRATEGY = Strategy("sparse", 5, 1, 5)
SAMPLING = Sampling(num_samples=2, max_new_tokens=20, stop_token_ids=(2,), seed=3, step=5, temperature=0.7)
OPTIONS = RolloutConfig(block_size=16, max_running=6)


@pytest.fixture
def own(tiny_model_dir: Path) -> PreTrainedModel:
    """A policy of the test's own, to train."""
    return load_policy(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def texts() -> list[Prompt]:
    """Shorter than the budget, and longer."""
    choices = random.Random(4)
    return [
        Prompt(id=f"p{count}", token_ids=[choices.randrange(3, 259) for _ in range(count)], answer="")
        for count in (6, 40, 75)
    ]


def drafting(
    model: PreTrainedModel, weights: Kind, config: SparseConfig = SPARSE, drafter: ResidentDrafter | None = None
) -> NativeEngine:
    return NativeEngine(
        model,
        drafter=drafter or SelfDrafter(),
        chooser=FixedChooser(STRATEGY),
        rollout=OPTIONS,
        sparse=make_sparse(replace(config, weights=weights), model),
    )


def plain(model: PreTrainedModel) -> NativeEngine:
    return NativeEngine(model, drafter=None, chooser=FixedChooser(OFF), rollout=OPTIONS)


def copy_of(engine: NativeEngine) -> LowBitPolicy:
    assert engine.sparse is not None and engine.sparse.lowbit is not None
    return engine.sparse.lowbit


def acceptance(rollouts: dict[Key, Rollout]) -> float:
    specs = [rollout.spec for rollout in rollouts.values()]
    return sum(spec.accepted for spec in specs) / sum(spec.proposed for spec in specs)


def tensors(copy: LowBitPolicy) -> list[torch.Tensor]:
    """All that a copy holds."""
    found = [copy._head.values.float(), copy._head.scales]
    for layer in copy._layers:
        for part in (layer.qkv, layer.output, layer.gate, layer.up, layer.down):
            found += [part.values.float(), part.scales]
        found += [layer.attention_norm, layer.mlp_norm]
    return found


def train(model: PreTrainedModel, seed: int) -> None:
    """Move every parameter, in place, by more than eight bits round."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter += 0.3 * parameter.std() * noise


@pytest.mark.parametrize("config", [SPARSE, EVERYTHING], ids=["few blocks", "all blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_changes_what_is_sampled(
    kind: Kind,
    config: SparseConfig,
    policy: PreTrainedModel,
    texts: list[Prompt],
    collect: Collect,
    assert_same: AssertSame,
) -> None:
    rollouts = collect(drafting(policy, kind, config), texts, SAMPLING)
    assert_same(rollouts, collect(plain(policy), texts, SAMPLING))
    # fp8 has three bits of mantissa
    assert acceptance(rollouts) > (0.0 if config is SPARSE else {"int8": 0.8, "fp8": 0.5}[kind])


def test_three_tiers_over_a_copy_change_nothing_either(
    policy: PreTrainedModel, texts: list[Prompt], collect: Collect, assert_same: AssertSame
) -> None:
    suffix = NgramDrafter(min_match=1)
    drafter = CombinedDrafter({"suffix": suffix, "sparse": SelfDrafter(suffix, source="suffix")})
    rollouts = collect(drafting(policy, "int8", drafter=drafter), texts, SAMPLING)
    assert_same(rollouts, collect(plain(policy), texts, SAMPLING))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_follows_the_policy_from_version_to_version(
    kind: Kind, own: PreTrainedModel, texts: list[Prompt], collect: Collect, assert_same: AssertSame
) -> None:
    engine = drafting(own, kind, EVERYTHING)
    collect(engine, texts, SAMPLING)
    copy = copy_of(engine)
    places = [part.data_ptr() for layer in copy._layers for part in (layer.qkv.values, layer.down.scales)]
    before = [each.clone() for each in tensors(copy)]
    train(own, seed=1)
    engine.update(1)
    rollouts = collect(engine, texts, SAMPLING)
    assert_same(rollouts, collect(plain(own), texts, SAMPLING))
    assert copy.version == 1
    assert places == [part.data_ptr() for layer in copy._layers for part in (layer.qkv.values, layer.down.scales)]
    assert not any(torch.equal(a, b) for a, b in zip(before, tensors(copy), strict=True) if a.dim() == 2)
    fresh = drafting(own, kind, EVERYTHING)
    fresh.update(1)
    assert acceptance(rollouts) == acceptance(collect(fresh, texts, SAMPLING)) > 0.5
    assert all(torch.equal(*pair) for pair in zip(tensors(copy), tensors(copy_of(fresh)), strict=True))


def test_a_copy_that_is_not_remade_costs_drafts_and_no_sample(
    own: PreTrainedModel,
    texts: list[Prompt],
    collect: Collect,
    assert_same: AssertSame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = drafting(own, "int8", EVERYTHING)
    current = acceptance(collect(engine, texts, SAMPLING))
    train(own, seed=1)
    engine.update(1)
    monkeypatch.setattr(LowBitPolicy, "refresh", lambda *_: None)
    rollouts = collect(engine, texts, SAMPLING)
    assert_same(rollouts, collect(plain(own), texts, SAMPLING))
    assert acceptance(rollouts) < current / 2


def test_a_copy_is_remade_between_two_cycles_of_one_call(own: PreTrainedModel, texts: list[Prompt]) -> None:
    engine = drafting(own, "int8")
    seen = []

    async def generate() -> None:
        async for rollout in engine.generate(texts, replace(SAMPLING, stop_token_ids=())):
            seen.append(rollout.version_spans)
            if engine.version == 0:
                assert copy_of(engine).version == 0
                train(own, seed=2)
                engine.update(1)

    asyncio.run(generate())
    assert copy_of(engine).version == 1
    head = copy_of(engine)._head.values.clone()
    copy_of(engine).refresh(2, [[5, 6, 7]])
    assert torch.equal(head, copy_of(engine)._head.values), "the head, which is not smoothed, was the new policy's"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_layer_computes_what_the_policys_does_up_to_eight_bits(family: str, together: bool) -> None:
    """Also where activations stand out, and projections lie together or apart, with biases or norms."""
    options = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.05}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **options, **heads)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[5] *= 30
            layer.post_attention_layernorm.weight.data[7] *= 30
    if together:
        lay_side_by_side(model)
    dense = FusedDecoder(model)
    dense.reach(40)
    assert {len(layer.qkv) for layer in dense._layers} == {1 if together else 3}
    errors = {}
    for kind in KINDS:
        copy = LowBitPolicy(model, kind)
        drafting = copy.drafting(dense)
        token_ids = torch.arange(40) * 7 % 97
        copy.refresh(0, [token_ids.tolist()])
        hidden, positions = dense.embed(token_ids), torch.arange(40)
        worst = 0.0
        for index in range(2):
            wanted, got = (
                decoder.layer(index, hidden, positions, *alone(model, num_tokens=40)[::-1])
                for decoder in (dense, drafting)
            )
            worst = max(worst, float((got - wanted).norm() / (wanted - hidden).norm()))
            hidden = wanted
        logits = dense.logits(hidden)
        worst = max(worst, float((drafting.logits(hidden) - logits).norm() / logits.norm()))
        errors[kind] = worst
    assert errors["int8"] < 0.04 and errors["fp8"] < 0.06, errors
    assert errors["int8"] > 0, "nothing was rounded"


def test_a_decoder_made_anew_has_its_copy_remade(own: PreTrainedModel) -> None:
    copy = LowBitPolicy(own, "int8")
    first = FusedDecoder(own)
    drafting = copy.drafting(first)
    copy.refresh(3, [[4, 5, 6]])
    assert copy.drafting(first) is drafting and copy.version == 3
    assert copy.drafting(FusedDecoder(own)) is not drafting and copy.version is None


def test_positions_are_made_ready_for_by_either_decoder(own: PreTrainedModel) -> None:
    first = FusedDecoder(own)
    drafting = LowBitPolicy(own, "int8").drafting(first)
    assert first.reach(90) and not drafting.reach(90)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    require_readable("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    require_readable("int8", torch.device("cuda"))
    with pytest.raises(PreflightError, match=r"8\.0 has no such type.*set sparse\.weights=int8"):
        require_readable("fp8", torch.device("cuda"))


def test_a_torch_without_fp8_is_refused(policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(PreflightError, match=r"no float8_e4m3fn; set sparse\.weights=int8"):
        LowBitPolicy(policy, "fp8")


def test_a_model_of_another_architecture_is_refused() -> None:
    options: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("gpt_neox", **options, num_attention_heads=6)
    with pytest.raises(PreflightError, match=r"no copy in eight bits.*set sparse\.weights=policy"):
        LowBitPolicy(AutoModelForCausalLM.from_config(config), "int8")


@pytest.mark.slow
def test_copies_of_a_real_model_say_almost_what_it_does() -> None:
    """By sum min(p, q) of the next token, over a page of which the copy has seen another part."""
    folder = resolve("smollm2-135m-instruct")
    model = load_policy(folder, device="cpu", dtype="float32")
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    token_ids = AutoTokenizer.from_pretrained(folder)(page)["input_ids"]
    dense, told, read = FusedDecoder(model), token_ids[:512], torch.tensor(token_ids[512:712])
    dense.reach(512)

    @torch.inference_mode()
    def probabilities(decoder: FusedDecoder) -> torch.Tensor:
        cache, seqs = alone(model, num_tokens=len(read))
        return decoder.logits(decoder.forward(read, torch.arange(len(read)), seqs, cache)).softmax(dim=1)

    wanted, shares = probabilities(dense), {}
    for kind in KINDS:
        copy = LowBitPolicy(model, kind)
        drafting = copy.drafting(dense)
        copy.refresh(0, [told])
        shares[kind] = float(torch.minimum(probabilities(drafting), wanted).sum(dim=1).mean())
    assert shares["int8"] > 0.94 and shares["fp8"] > 0.82, shares


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_drafts_within_captured_graphs_on_a_gpu(
    kind: Kind, tiny_model_dir: Path, texts: list[Prompt], collect: Collect
) -> None:
    model = load_policy(tiny_model_dir, device="cuda", dtype="bfloat16")
    engine = drafting(model, kind, EVERYTHING)
    assert acceptance(collect(engine, texts, SAMPLING)) > 0.6
    train(model, seed=1)
    engine.update(1)
    assert acceptance(collect(engine, texts, SAMPLING)) > 0.6

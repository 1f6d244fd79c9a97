"""The policy on our attention equals the same transformers model on its own, and what cannot is refused by name."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from configs.errors import PreflightError
from configs.schema import ComputeConfig
from kernels.attention import PackedSequences, PagedSequences, most_rows, paged_sequences
from rollout.model import (
    ATTENTION,
    MissingContextError,
    PagedCache,
    bytes_per_block,
    context_length,
    forward_packed,
    forward_paged,
    load_policy,
    require_groups,
    resolve_compute,
)

BLOCK = 4
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide: attention and logits far from uniform
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "smollm3": {},
}
LENGTHS = [5, 19, 1, 11]


def tiny_model(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family.split()[0], **{**TINY, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()


def prompts(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, TINY["vocab_size"], (length,), generator=generator) for length in lengths]


def packed(tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, PackedSequences]:
    lengths = [len(ids) for ids in tokens]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(tokens), positions, PackedSequences(cu_seqlens, max(lengths))


def dense(model: PreTrainedModel, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each sequence alone through the model's own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = [model(ids[None], use_cache=False).logits[0] for ids in tokens]
    model.set_attn_implementation(ATTENTION)
    return logits


class Pages:
    """A cache in which sequence b owns blocks b, b + B, b + 2B, ..., filled a forward at a time."""

    def __init__(self, model: PreTrainedModel, num_sequences: int, max_tokens: int) -> None:
        self.model = model
        per_sequence = -(-max_tokens // BLOCK)
        self.tables = (
            torch.arange(num_sequences * per_sequence, dtype=torch.int32).view(per_sequence, -1).T.contiguous()
        )
        self.cache = PagedCache(
            model.config, num_blocks=self.tables.numel(), block_size=BLOCK, device="cpu", dtype=torch.float32
        )

    def slots(self, sequence: int, index: torch.Tensor) -> torch.Tensor:
        return self.tables[sequence, index // BLOCK] * BLOCK + index % BLOCK

    def forward(
        self,
        tokens: list[torch.Tensor],
        contexts: list[int],
        *,
        tree_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Logits of each sequence's new tokens. tree_mask [Q, Q]: all are nodes of one tree, and see whom it says."""
        news = [len(ids) for ids in tokens]
        indices = [torch.arange(new) + context for new, context in zip(news, contexts, strict=True)]
        positions = indices
        trees: dict[str, torch.Tensor] = {}
        if tree_mask is not None:
            positions = [tree_mask.sum(dim=1) - 1 + context for context in contexts]
            trees["ancestors"] = (tree_mask << torch.arange(len(tree_mask))).sum(dim=1).repeat(len(tokens))
            trees["num_drafted"] = torch.tensor(news, dtype=torch.int32)
        slots = torch.cat([self.slots(sequence, index) for sequence, index in enumerate(indices)])
        seqs: PagedSequences = paged_sequences(
            cu_seqlens_q=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
            max_seqlen_q=max(news),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            max_context=max(contexts),
            block_tables=self.tables,
            slots=slots.long(),
            block_size=BLOCK,
            positions=torch.cat(positions),
            **trees,
        )
        select = torch.arange(sum(news))
        logits = forward_paged(self.model, torch.cat(tokens), torch.cat(positions), seqs, self.cache, select)
        return list(logits.split(news))


def assert_logits_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(torch.cat(list(ours)), torch.cat(list(theirs)), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forward_equals_each_sequence_alone(family: str) -> None:
    model = tiny_model(family)
    tokens = prompts(LENGTHS)
    with torch.no_grad():
        ours = forward_packed(model, *packed(tokens), None)
        some = forward_packed(model, *packed(tokens), torch.tensor([30, 0, 7]))
    assert_logits_close([ours], dense(model, tokens))
    torch.testing.assert_close(some, ours[[30, 0, 7]])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_and_decode_equal_a_dense_forward(family: str) -> None:
    model = tiny_model(family)
    tokens = prompts([14, 23, 12])
    wanted = dense(model, tokens)
    pages = Pages(model, 3, 23)
    done = [0, 0, 0]
    for news in ([3, 9, 1], [7, 2, 8], [1, 1, 1], [3, 11, 2]):
        ends = [start + new for start, new in zip(done, news, strict=True)]
        ours = pages.forward([ids[a:b] for ids, a, b in zip(tokens, done, ends, strict=True)], done)
        assert_logits_close(ours, [logits[a:b] for logits, a, b in zip(wanted, done, ends, strict=True)])
        done = ends


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_forward_equals_each_root_to_leaf_path(family: str) -> None:
    parents = [-1, 0, 0, 1, 1, 3]
    model = tiny_model(family)
    contexts = prompts([9, 13])
    nodes = prompts([50])[0].view(2, 25)[:, :6]
    pages = Pages(model, 2, 19)
    pages.forward(contexts, [0, 0])
    mask = torch.eye(6, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        mask[node] |= mask[parent]
    ours = pages.forward(list(nodes), [9, 13], tree_mask=mask)
    for sequence, node in ((0, 2), (0, 4), (0, 5), (1, 2), (1, 4), (1, 5)):
        path = mask[node]
        (alone,) = dense(model, [torch.cat([contexts[sequence], nodes[sequence, path]])])
        assert_logits_close([ours[sequence][path]], [alone[len(contexts[sequence]) :]])


def test_decode_after_moving_the_accepted_path_equals_a_dense_forward() -> None:
    model = tiny_model("llama")
    context, nodes, after = prompts([9, 6, 2])
    pages = Pages(model, 1, 17)
    pages.forward([context], [0])
    mask = torch.eye(6, dtype=torch.bool)
    for node, parent in enumerate([0, 0, 1, 2, 2], start=1):
        mask[node] |= mask[parent]
    pages.forward([nodes], [9], tree_mask=mask)
    path = mask[4].nonzero().flatten()
    assert path.tolist() == [0, 2, 4]
    pages.cache.move(pages.slots(0, 9 + path).long(), pages.slots(0, 9 + torch.arange(3)).long())
    (ours,) = pages.forward([after], [12])
    (alone,) = dense(model, [torch.cat([context, nodes[path], after])])
    assert_logits_close([ours], [alone[12:]])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2 with a window"])
def test_packed_gradients_equal_padded_gradients(family: str) -> None:
    model = tiny_model(family)
    tokens = prompts(LENGTHS)
    weights = torch.randn(sum(LENGTHS), TINY["vocab_size"], generator=torch.Generator().manual_seed(1))
    (forward_packed(model, *packed(tokens), None) * weights).sum().backward()
    ours = {name: param.grad for name, param in model.named_parameters()}

    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("eager")
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
    logits = model(padded, attention_mask=mask, use_cache=False).logits
    (logits[mask.bool()] * weights).sum().backward()
    for name, param in model.named_parameters():
        scale = param.grad.abs().max().item()
        torch.testing.assert_close(ours[name], param.grad, atol=1e-5 * scale + 1e-6, rtol=1e-3, msg=name)


def test_gradient_checkpointing_leaves_packed_gradients_alone() -> None:
    model = tiny_model("llama").train()
    tokens = prompts(LENGTHS)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        forward_packed(model, *packed(tokens), torch.arange(4)).square().sum().backward()
        gradients.append([param.grad.clone() for param in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_wrapped_policy_is_called_as_the_wrapper() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs: Any) -> Any:
            self.calls += 1
            return self.module(**inputs)

    model = tiny_model("llama")
    wrapper = Wrapper(model)
    inputs = packed(prompts(LENGTHS))
    assert torch.equal(forward_packed(wrapper, *inputs, None), forward_packed(model, *inputs, None))
    assert wrapper.calls == 1


def test_a_loaded_policy_equals_the_model_on_disk(tiny_model_dir: Path) -> None:
    policy = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    tokens = prompts(LENGTHS)
    with torch.no_grad():
        ours = forward_packed(policy, *packed(tokens), None)
        theirs = [plain(ids[None]).logits[0] for ids in tokens]
    assert_logits_close([ours], theirs)
    assert not policy.training
    assert context_length(policy.config) == 512


def test_a_loaded_policy_has_no_dropout(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = altered(tiny_model_dir, tmp_path, attention_dropout=0.5)
    policy = load_policy(folder, device="cpu", dtype="float32").train()
    inputs = packed(prompts(LENGTHS))
    assert torch.equal(forward_packed(policy, *inputs, None), forward_packed(policy.eval(), *inputs, None))


def test_a_block_takes_the_bytes_its_cache_allocates_for_it_and_for_the_dummy() -> None:
    for family in FAMILIES:
        config = tiny_model(family).config
        cache = PagedCache(config, num_blocks=3, block_size=BLOCK, device="cpu", dtype=torch.bfloat16)
        assert cache.storage.nbytes == 4 * bytes_per_block(config, BLOCK, torch.bfloat16)


def altered(source: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a model folder with other values in its config.json."""
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(PreflightError) as caught:
        load_policy(folder, device="cpu", dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_missing_and_damaged_weights_are_refused_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path / "nowhere")
    folder = altered(tiny_model_dir, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors is corrupt" in refusal(folder)
    weights.write_bytes(b"not weights" * 100)
    assert "model.safetensors is corrupt" in refusal(folder)
    weights.unlink()
    assert "no .safetensors weights" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-2.safetensors"}}))
    assert "model-2.safetensors is corrupt or missing" in refusal(folder)
    index.write_text("{")
    assert "model.safetensors.index.json is not a safetensors index" in refusal(folder)


def test_a_missing_or_misshapen_tensor_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = altered(tiny_model_dir, tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack model.norm.weight" in refusal(folder)
    save_file({**tensors, "model.norm.weight": norm[:3]}, weights, metadata={"format": "pt"})
    assert "model.norm.weight has shape [3] where config.json means [64]" in refusal(folder)


def test_what_is_not_a_causal_lm_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = altered(tiny_model_dir, tmp_path, model_type="no-such-type")
    assert "no-such-type" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 4}, "its attention takes s_aux"),
        ("llama4_text", {"num_local_experts": 4}, "its layers include chunked_attention"),
        ("mamba", {}, "'mamba' cannot run on paged attention"),
        ("bloom", {}, "'bloom' cannot run on paged attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its rotary embedding is dynamic",
        ),
    ],
)
def test_attention_beyond_ours_is_refused_before_the_run(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **TINY, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert reason in refusal(tmp_path)


def shared(heads: int, head_dim: int, kv_heads: int = 1) -> PretrainedConfig:
    """Of a policy whose query heads share so many key heads."""
    return LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=2 * heads
    )


@pytest.mark.parametrize(
    ("config", "dtype", "said"),
    [
        (
            shared(71, 64),
            "float32",
            "71 query heads of 64 share .* takes 32 at most in float32; set compute.dtype=bf",
        ),
        (shared(66, 256, 2), "float32", "33 query heads of 256 share .* takes 32 .*; set compute.dtype=bfloat16"),
        (shared(65, 256), "bfloat16", "65 query heads of 256 share .* takes 64 .* in bfloat16; set compute.device=cpu"),
        (shared(129, 128), "float32", "129 query heads of 128 share .* takes 32 .*; set compute.device=cpu"),
    ],
)
def test_more_query_heads_than_a_gpu_attends_with_are_refused_before_weights_are_read(
    config: PretrainedConfig,
    dtype: str,
    said: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = altered(tiny_model_dir, tmp_path)
    config.save_pretrained(folder)
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    with pytest.raises(PreflightError, match=said):
        load_policy(folder, device="cuda", dtype=dtype)
    require_groups(config, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_as_many_query_heads_as_a_gpu_attends_with_are_served(head_dim: int, dtype: str) -> None:
    most = most_rows(head_dim, getattr(torch, dtype))
    require_groups(shared(most, head_dim), device="cuda", dtype=dtype)


def test_weights_that_are_not_finite_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = altered(tiny_model_dir, tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "logits are not finite" in refusal(folder)


def test_a_call_without_context_says_how_to_call() -> None:
    with pytest.raises(MissingContextError, match="forward_packed"):
        tiny_model("llama")(prompts([4])[0][None])


def test_compute_is_resolved_from_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bf16, amx, dtype in ((False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=bf16: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        assert resolve_compute(ComputeConfig()) == ("cpu", dtype)
    assert resolve_compute(ComputeConfig(dtype="float32")) == ("cpu", "float32")
    with pytest.raises(PreflightError, match=r'compute\.device="cuda"'):
        resolve_compute(ComputeConfig(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_compute(ComputeConfig()) == ("cuda", "bfloat16")
    assert resolve_compute(ComputeConfig(device="cpu", dtype="float32")) == ("cpu", "float32")

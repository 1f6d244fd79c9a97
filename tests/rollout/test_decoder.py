"""Decoders compute what the transformers module does, over its own parameters, in fewer launches."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kernels.attention import paged_sequences
from rollout import decoder as decoders
from rollout.compiled import ModuleDecoder
from rollout.decoder import Decoder, make_decoder, prove
from rollout.fused import FusedDecoder
from rollout.model import ATTENTION, PagedCache, load_policy
from rollout.model import alone as first_look
from rollout.projections import grouped_parameters, lay_side_by_side, side_by_side

BLOCK = 4
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads of 16 are wider than the hidden state
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide: attention and logits far from uniform
    "tie_word_embeddings": False,
}
EVEN = {"head_dim": 8}
STANDARD: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True},
    "llama llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen2": EVEN,
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
}
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, "softcapping"),
    "gemma3_text": ({"sliding_window": 6, "query_pre_attn_scalar": 8}, "sliding window"),
    "mistral": ({"sliding_window": 6}, "sliding window"),
    "phi": (EVEN | {"num_key_value_heads": 6, "partial_rotary_factor": 0.5}, "PhiModel has no norm"),
    "gpt_neox": (EVEN | {"num_key_value_heads": 6}, "GPTNeoXModel has no embed_tokens"),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "Qwen3MoeSparseMoeBlock has no act_fn",
    ),
    "llama": ({"mlp_bias": True}, "its MLP has biases"),
    # standard by their modules, and yet they compute something else
    "granite": ({"residual_multiplier": 0.7}, "layer 0 computes something else"),
    "granite scaled": ({"logits_scaling": 2.0}, "its logits are computed otherwise"),
    "granite embedding": ({"embedding_multiplier": 2.0}, "its embeddings are not used as they are"),
    "smollm3": ({"no_rope_layers": [1, 0, 1], "layer_types": None}, "layer 1 computes something else"),
}


def tiny_model(family: str, options: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(family.split()[0], **{**TINY, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide what is done with them
                torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model


def standard_model(family: str) -> PreTrainedModel:
    model = tiny_model(family, STANDARD[family])
    lay_side_by_side(model)
    return model


def random_tokens(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, TINY["vocab_size"], (length,), generator=generator) for length in lengths]


def alone(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence through the module's own attention."""
    # attention that bends its scores has no sdpa
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    with torch.no_grad():
        logits = model(token_ids[None], use_cache=False).logits[0]
    model.set_attn_implementation(ATTENTION)
    return logits


class Pages:
    """A cache whose blocks are dealt out to sequences in turn, and a decoder that fills it a forward at a time."""

    def __init__(self, decoder: Decoder, model: PreTrainedModel, num_sequences: int, max_tokens: int) -> None:
        self.decoder = decoder
        width = -(-max_tokens // BLOCK)
        self.tables = torch.arange(num_sequences * width, dtype=torch.int32).view(width, -1).T.contiguous()
        self.cache = PagedCache(
            model.config, num_blocks=self.tables.numel(), block_size=BLOCK, device="cpu", dtype=model.dtype
        )
        decoder.reach(max_tokens)

    def forward(
        self, tokens: list[torch.Tensor], contexts: list[int], parents: list[int] | None = None
    ) -> list[torch.Tensor]:
        """Logits of each sequence's new tokens. parents: all are the nodes of one tree, node 0 its root."""
        news = [len(ids) for ids in tokens]
        index = [torch.arange(new) + context for new, context in zip(news, contexts, strict=True)]
        slots = [table[i // BLOCK] * BLOCK + i % BLOCK for table, i in zip(self.tables, index, strict=True)]
        positions, trees = torch.cat(index), {}
        if parents is not None:
            sees = paths(parents)
            positions = torch.cat([sees.sum(dim=1) - 1 + context for context in contexts])
            trees["ancestors"] = (sees.long() << torch.arange(len(sees))).sum(dim=1).repeat(len(tokens))
            trees["num_drafted"] = torch.tensor(news, dtype=torch.int32)
        seqs = paged_sequences(
            cu_seqlens_q=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
            max_seqlen_q=max(news),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            max_context=max(contexts),
            block_tables=self.tables,
            slots=torch.cat(slots).long(),
            block_size=BLOCK,
            positions=positions,
            **trees,
        )
        hidden = self.decoder.forward(torch.cat(tokens), positions, seqs, self.cache)
        return list(self.decoder.logits(hidden).split(news))


def paths(parents: list[int]) -> torch.Tensor:
    """[M, M] bool: each node sees itself and its ancestors; the root's parent is -1."""
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        sees[node] |= sees[parent]
    return sees


def assert_equals_the_module(decoder: Decoder, model: PreTrainedModel) -> None:
    """Two sequences prefilled in chunks, decoded, and followed by a tree: every logit is the module's."""
    tokens = random_tokens(15, 24)
    wanted = [alone(model, ids) for ids in tokens]
    pages = Pages(decoder, model, 2, 32)
    done = [0, 0]
    for news in ([3, 9], [10, 12], [1, 1], [1, 2]):
        ends = [start + new for start, new in zip(done, news, strict=True)]
        ours = pages.forward([ids[a:b] for ids, a, b in zip(tokens, done, ends, strict=True)], done)
        for sequence, logits in enumerate(ours):
            assert_close(logits, wanted[sequence][done[sequence] : ends[sequence]])
        done = ends
    parents = [-1, 0, 0, 1, 1, 3]
    nodes = random_tokens(12)[0].view(2, 6)
    ours = pages.forward(list(nodes), done, parents)
    for sequence, path in ((sequence, path) for sequence in range(2) for path in paths(parents)):
        text = torch.cat([tokens[sequence], nodes[sequence, path]])
        assert_close(ours[sequence][path], alone(model, text)[done[sequence] :])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


def some_logits(decoder: Decoder, model: PreTrainedModel) -> torch.Tensor:
    return Pages(decoder, model, 1, 12).forward(random_tokens(12), [0])[0]


@pytest.mark.parametrize("family", STANDARD)
def test_the_fused_decoder_equals_the_module(family: str) -> None:
    model = standard_model(family)
    decoder = make_decoder(model)
    assert isinstance(decoder, FusedDecoder)
    assert_equals_the_module(decoder, model)


@pytest.mark.parametrize("family", OTHER)
def test_other_architectures_decode_through_their_module_and_say_why(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    options, reason = OTHER[family]
    model = tiny_model(family, options)
    decoders._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger=decoders.__name__):
        decoder = make_decoder(model)
        make_decoder(model)
    assert isinstance(decoder, ModuleDecoder)
    assert len(caplog.messages) == 1
    assert reason in caplog.text
    assert_equals_the_module(decoder, model)


@pytest.mark.parametrize("family", STANDARD)
def test_the_proof_holds_in_bfloat16(family: str) -> None:
    model = standard_model(family).to(torch.bfloat16)
    lay_side_by_side(model)
    decoder = make_decoder(model)
    assert isinstance(decoder, FusedDecoder)
    assert some_logits(decoder, model).dtype == torch.bfloat16
    prove(ModuleDecoder(model, backend=None), model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_layers_equal_the_module_and_share_their_programs(family: str) -> None:
    model = tiny_model(family, OTHER[family][0])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder = ModuleDecoder(model, backend="aot_eager")
    assert_equals_the_module(decoder, model)
    # one token is a program of its own to the compiler, and layers with a window have theirs
    kinds = 2 if family == "gemma2" else 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * kinds
    assert not any("_opaque" in str(layer.forward) for layer in model.base_model.layers)
    assert_equals_the_module(ModuleDecoder(model, backend=None), model)


@pytest.mark.parametrize(
    "make",
    [
        FusedDecoder,
        *(lambda model, backend=backend: ModuleDecoder(model, backend=backend) for backend in (None, "eager")),
    ],
    ids=["fused", "module", "compiled"],
)
def test_what_enters_a_layer_is_what_the_module_hands_it(make: Any) -> None:
    torch._dynamo.reset()
    model = standard_model("qwen2")
    token_ids = random_tokens(12)[0]
    entered: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0][0])) for layer in model.base_model.layers
    ]
    alone(model, token_ids)
    for hook in hooks:
        hook.remove()
    decoder, positions = make(model), torch.arange(12)
    for layers in ((2, 0, 0), (), (1,)):
        cache, seqs = first_look(model, num_tokens=12)
        hidden, aux = decoder.forward_with_aux(token_ids, positions, seqs, cache, layers)
        cache, seqs = first_look(model, num_tokens=12)
        assert torch.equal(hidden, decoder.forward(token_ids, positions, seqs, cache))
        assert len(aux) == len(layers)
        for index, ours in zip(layers, aux, strict=True):
            assert_close(ours, entered[index])
    assert not any(layer._forward_pre_hooks for layer in model.base_model.layers)


@pytest.mark.parametrize("make", [FusedDecoder, lambda model: ModuleDecoder(model, backend=None)])
def test_updates_in_place_are_seen_and_moved_parameters_make_a_decoder_stale(make: Any) -> None:
    model = standard_model("qwen2")
    decoder = make(model)
    before = some_logits(decoder, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    after = some_logits(decoder, model)
    assert not torch.allclose(before, after, atol=1e-3)
    assert_close(after, alone(model, random_tokens(12)[0]))
    assert decoder.is_current()
    signature = decoder.signature()
    moved = model.base_model.layers[1].self_attn.k_proj.weight
    moved.data = moved.data.clone()
    assert decoder.signature() != signature
    assert not decoder.is_current()
    assert make(model).is_current()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_projections_that_lie_apart_give_the_same_logits(family: str) -> None:
    apart, together = tiny_model(family, STANDARD[family]), standard_model(family)
    with torch.no_grad():
        for parameter in apart.parameters():
            parameter.data = parameter.data.clone()
    decoders_ = [FusedDecoder(model) for model in (apart, together)]
    assert [{len(layer.qkv) for layer in decoder._layers} for decoder in decoders_] == [{3}, {1}]
    assert_equals_the_module(decoders_[0], apart)
    assert_close(some_logits(decoders_[0], apart), some_logits(decoders_[1], together))


def test_positions_are_reached_on_demand_and_new_tables_are_announced() -> None:
    model = standard_model("llama")
    decoder = FusedDecoder(model)
    assert decoder.reach(40)
    assert not decoder.reach(40)
    assert not decoder.reach(7)
    assert decoder.reach(41)


@pytest.mark.parametrize("family", ["llama tied", "qwen2", "gpt_neox"])
def test_laying_projections_side_by_side_changes_no_value_name_or_file(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, STANDARD[family] if family in STANDARD else OTHER[family][0])
    parameters = dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    lay_side_by_side(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    lay_side_by_side(model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()], "laid twice"
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "after")
    save_file({name: parameter.detach() for name, parameter in parameters.items()}, tmp_path / "plain.safetensors")
    written = (tmp_path / "after" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "before" / "model.safetensors").read_bytes()
    for name, tensor in load_file(tmp_path / "plain.safetensors").items():
        assert torch.equal(tensor, parameters[name])


def test_gradients_of_projections_that_lie_side_by_side_are_those_of_projections_apart() -> None:
    gradients = []
    for model in (tiny_model("qwen2", EVEN), standard_model("qwen2")):
        model.set_attn_implementation("sdpa")
        model(random_tokens(12)[0][None]).logits.square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        gradients.append([*(p.grad for p in model.parameters()), *(p.detach() for p in model.parameters())])
    assert all(torch.equal(apart, together) for apart, together in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["llama tied", "qwen2", "qwen3"])
def test_flattening_grouped_parameters_keeps_projections_side_by_side(family: str) -> None:
    model = tiny_model(family, STANDARD[family])
    parameters = grouped_parameters(model)
    assert set(parameters) == set(model.parameters())
    assert len(parameters) == len(list(model.parameters()))
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    assert {len(layer.qkv) for layer in FusedDecoder(model)._layers} == {1}


def test_side_by_side_sees_only_what_follows_in_one_storage() -> None:
    storage = torch.arange(24.0).view(6, 4)
    first, second, third = storage.split([3, 1, 2])
    together = side_by_side([first, second, third])
    assert together is not None
    assert torch.equal(together, storage)
    assert together.data_ptr() == storage.data_ptr()
    assert side_by_side([first, third]) is None
    assert side_by_side([second, first]) is None
    assert side_by_side([first, second.clone()]) is None
    assert side_by_side([storage[:, :2], storage[:, 2:]]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_on_a_gpu_decoders_prove_themselves_and_replay_from_a_graph(family: str) -> None:
    options = STANDARD[family] if family in STANDARD else OTHER[family][0]
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    model = tiny_model(family, options | wide | {"initializer_range": 0.05}).to("cuda", torch.bfloat16)
    lay_side_by_side(model)
    decoder = make_decoder(model)
    assert isinstance(decoder, ModuleDecoder if family == "gemma2" else FusedDecoder)
    (token_ids, others) = (ids.cuda() for ids in random_tokens(8, 9))
    positions = torch.arange(8, device="cuda")

    def run() -> torch.Tensor:
        seqs = paged_sequences(
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=8,
            context_lens=contexts,
            max_context=0,
            block_tables=tables,
            slots=positions,
            block_size=16,
        )
        return decoder.logits(decoder.forward(token_ids, positions, seqs, cache))

    cache, _ = first_look(model, num_tokens=8)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32, device="cuda")
    contexts = torch.zeros(1, dtype=torch.int32, device="cuda")
    tables = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    token_ids.copy_(others[:8])
    graph.replay()
    assert torch.equal(captured, run())


def test_a_loaded_policy_has_its_projections_side_by_side(tiny_model_dir: Path) -> None:
    policy = load_policy(tiny_model_dir, device="cpu", dtype="float32")
    decoder = make_decoder(policy)
    assert isinstance(decoder, FusedDecoder)
    assert {len(layer.qkv) for layer in decoder._layers} == {1}

"""What leaves as a folder is the head, under the names and numbers that each engine reads, or it is refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from configs.errors import PreflightError, StorageError
from drafter.eagle import EagleConfig, EagleHead
from drafter.export import check_drafter, read_drafter, write_drafter
from drafter.layouts import Layout, Origin

CONFIG = EagleConfig(
    hidden_size=16,
    intermediate_size=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=50,
    draft_vocab=20,
    window=12,
    rms_norm_eps=1e-5,
    rope_theta=5e4,
    max_position_embeddings=64,
    aux_layers=(2, 4, 5),
)
ORIGIN = Origin(
    policy="someone/policy",
    policy_architectures=["LlamaForCausalLM"],
    policy_sha256="abc",
    step=7,
    num_draft_tokens=4,
    accept_length=2.5,
)
LAYOUTS: tuple[Layout, ...] = ("eagle3", "speculators")


@pytest.fixture
def head() -> EagleHead:
    """Weights of all sizes, norms included, and a vocabulary with holes."""
    head = EagleHead(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    t2d = torch.zeros(50, dtype=torch.bool)
    t2d[torch.randperm(50, generator=generator)[:20]] = True
    targets = t2d.nonzero().flatten()
    head.d2t.copy_(targets - torch.arange(20))
    head.t2d.copy_(t2d)
    return head


def written(folder: Path, head: EagleHead, layout: Layout = "eagle3") -> Path:
    folder.mkdir()
    write_drafter(folder, head, layout=layout, dtype=torch.bfloat16, origin=ORIGIN)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_comes_back_from_either_layout(tmp_path: Path, head: EagleHead, layout: Layout) -> None:
    folder = written(tmp_path / "out", head, layout)
    again, rounded = read_drafter(folder), copy.deepcopy(head).to(torch.bfloat16).float()
    assert again.config == head.config
    assert all(torch.equal(tensor, rounded.state_dict()[name]) for name, tensor in again.state_dict().items())
    check_drafter(folder, head, dtype=torch.bfloat16, policy_sha256="abc")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rotary_base_stands_where_old_and_new_engines_look(tmp_path: Path, head: EagleHead, layout: Layout) -> None:
    described = json.loads((written(tmp_path / "out", head, layout) / "config.json").read_text())
    layer = described.get("transformer_layer_config", described)
    assert layer["rope_theta"] == 5e4
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e4}


def test_each_engine_finds_the_aux_layers_where_it_looks_and_as_it_counts(tmp_path: Path, head: EagleHead) -> None:
    described = json.loads((written(tmp_path / "out", head) / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLMEagle3"]
    assert described["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # vLLM: layers entered
    assert described["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # SGLang: layers left
    assert described["norm_before_residual"] is False
    theirs = json.loads((written(tmp_path / "other", head, "speculators") / "config.json").read_text())
    assert theirs["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert theirs["speculators_config"]["verifier"]["name_or_path"] == "someone/policy"
    assert theirs["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_are_bare_and_the_policys_embedding_stays_out(tmp_path: Path, head: EagleHead, layout: Layout) -> None:
    tensors = load_file(written(tmp_path / "out", head, layout) / "model.safetensors")
    layer = "midlayer." if layout == "eagle3" else "layers.0."
    first = layer.partition(".")[0]
    assert {name.partition(".")[0] for name in tensors} == {"fc", first, "norm", "lm_head", "d2t", "t2d"}
    assert tensors[f"{layer}self_attn.q_proj.weight"].shape == (24, 32)
    assert {tensors[name].dtype for name in tensors if name not in ("d2t", "t2d")} == {torch.bfloat16}
    assert tensors["d2t"].dtype == torch.int64
    assert torch.equal(tensors["d2t"] + torch.arange(20), head.t2d.nonzero().flatten())


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_folder_means_to_transformers_llama_layer_what_the_head_computes(
    tmp_path: Path, head: EagleHead, layout: Layout
) -> None:
    """The layer is built of config.json and tensor names alone, as an engine would, and knows nothing of ours."""
    folder = written(tmp_path / "out", head, layout)
    described = json.loads((folder / "config.json").read_text())
    config = AutoConfig.for_model(**described.get("transformer_layer_config", described))
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0)
    size = config.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(layer.self_attn, name)
        setattr(layer.self_attn, name, torch.nn.Linear(2 * size, linear.out_features, bias=config.attention_bias))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    prefix = "midlayer." if layout == "eagle3" else "layers.0."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    hidden_norm = own.pop("hidden_norm.weight")
    layer.load_state_dict(own)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (size,), weight, config.rms_norm_eps)

    generator = torch.Generator().manual_seed(0)
    embeds, aux = torch.randn(9, size, generator=generator), torch.randn(9, 3 * size, generator=generator)
    positions = torch.arange(9)
    states = aux @ tensors["fc.weight"].T
    inputs = torch.cat([layer.input_layernorm(embeds), normed(states, hidden_norm)], dim=1)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    rotation = LlamaRotaryEmbedding(config)(inputs[None], positions[None])
    attended, _ = layer.self_attn(inputs[None], position_embeddings=rotation, attention_mask=mask)
    middle = states + attended[0]
    outputs = middle + layer.mlp(layer.post_attention_layernorm(middle))
    logits = normed(outputs, tensors["norm.weight"]) @ tensors["lm_head.weight"].T

    ours = read_drafter(folder)
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    found, _ = ours.step(embeds, ours.fuse(aux), positions, ours.empty_past(), visible)
    torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits(found), logits, rtol=1e-4, atol=1e-4)


def test_a_head_of_all_tokens_is_stored_without_maps(tmp_path: Path) -> None:
    head = EagleHead(replace(CONFIG, draft_vocab=50))
    folder = written(tmp_path / "out", head)
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    assert torch.equal(read_drafter(folder).target_ids(), torch.arange(50))


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    head = EagleHead(replace(CONFIG, window=64))
    folder = written(tmp_path / "out", head)
    assert "layer_types" not in json.loads((folder / "config.json").read_text())
    assert read_drafter(folder).config.window == 64


def test_a_policy_too_short_for_three_aux_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="three different"):
        written(tmp_path / "out", EagleHead(replace(CONFIG, aux_layers=(0, 1, 1))))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda tensors: tensors.pop("midlayer.hidden_norm.weight"), r"hidden_norm.weight is missing"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}), "no engine reads"),
        (
            lambda tensors: tensors.update({"fc.weight": torch.ones(16, 32)}),
            r"fc.weight is \[16, 32\], expected",
        ),
        (lambda tensors: tensors["lm_head.weight"].fill_(torch.nan), "lm_head.weight holds values that are not finite"),
        (lambda tensors: tensors["d2t"].add_(1), "d2t and t2d name different tokens"),
        (lambda tensors: tensors["t2d"].logical_not_(), "d2t and t2d name different tokens"),
    ],
)
def test_what_an_engine_would_take_in_silence_is_refused(
    tmp_path: Path, head: EagleHead, spoil: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    folder = written(tmp_path / "out", head)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PreflightError, match=complaint):
        read_drafter(folder)


def test_a_folder_that_holds_no_drafter_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    for folder in (tmp_path, tiny_model_dir):
        with pytest.raises(PreflightError, match="holds no drafter that can be read"):
            read_drafter(folder)


def test_the_check_finds_other_weights_and_another_policy(tmp_path: Path, head: EagleHead) -> None:
    folder = written(tmp_path / "out", head)
    with pytest.raises(PreflightError, match="drafts for policy abc, not other"):
        check_drafter(folder, head, dtype=torch.bfloat16, policy_sha256="other")
    with torch.no_grad():
        head.fc.weight[0, 0] += 1
    with pytest.raises(StorageError, match="another fc.weight"):
        check_drafter(folder, head, dtype=torch.bfloat16, policy_sha256="abc")


def test_the_check_finds_another_config(tmp_path: Path, head: EagleHead) -> None:
    folder = written(tmp_path / "out", head)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"rope_theta": 1e4}))
    with pytest.raises(StorageError, match=r"another shape than was written: .*rope_theta=10000"):
        check_drafter(folder, head, dtype=torch.bfloat16, policy_sha256="abc")


def test_the_check_runs_what_it_reads(tmp_path: Path, head: EagleHead, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outputs = written(tmp_path / "out", head), iter(torch.rand(2, 3, 4))
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="proposes otherwise"):
        patched.setattr("drafter.export.probe", lambda head: next(outputs))
        check_drafter(folder, head, dtype=torch.bfloat16, policy_sha256="abc")
    with torch.no_grad():
        head.fc.weight.fill_(1e38)  # a number, whose products are none
    with pytest.raises(PreflightError, match="puts out no numbers"):
        check_drafter(written(tmp_path / "other", head), head, dtype=torch.bfloat16, policy_sha256="abc")

"""Gates as published load, ours are saved so, and what does not fit is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, Qwen3Config

from configs.errors import PreflightError
from drafter import gate_checkpoint
from drafter.gate import GateConfig, Gates
from drafter.gate_checkpoint import read_gate_config, read_gates, write_gates

LAYERS, HEADS, KV_HEADS, DIM, WIDTH = 36, 32, 8, 128, 128  # of Qwen3-8B and its published gates
LINEAR_Q, LINEAR_K = "attngate_linear_q.weight", "attngate_linear_k.weight"
POLICY = Qwen3Config(
    hidden_size=4096, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip

# config.json of such a folder, but for what only says how a Qwen3 is made: what distillation_decode.py saves of
# SeerAttnQwen3Config (microsoft/SeerAttention), as transformers 4 writes it
PUBLISHED = {
    "base_model": "Qwen/Qwen3-8B",
    "model_type": "qwen3",
    "head_dim": DIM,
    "hidden_size": 4096,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "seerattn_gate_block_size": 64,
    "seerattn_gate_hidden_size": WIDTH,
    "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_loss_slice_ratio": 0.5,
    "seerattn_q_head_pooling_type": "Qproj",
    "seerattn_use_qk_norm": True,
    "seerattn_use_rope": True,
    "torch_dtype": "bfloat16",
}


def published_tensors(layers: int, heads: int, kv_heads: int, dim: int, width: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names and of the shapes that attn_gate_training.py and distillation_decode.py give."""
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        for part, shape in {
            LINEAR_Q: (kv_heads, heads // kv_heads, dim, width),
            LINEAR_K: (kv_heads, 3 * dim, width),
            "attngate_qnorm.weight": (width,),
            "attngate_knorm.weight": (width,),
        }.items():
            name = f"model.layers.{layer}.self_attn.attn_gate.{part}"
            tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    return tensors


def tiny(config: PretrainedConfig | None = None, **changes: Any) -> Qwen3Config:
    """A policy of two small layers."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return Qwen3Config(**{**shape, "head_dim": 16, "rope_parameters": rope, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gates of tiny(), as we write them."""
    path = tmp_path / "gates"
    path.mkdir()
    gates = Gates(GateConfig.of(tiny()), seed=3)
    write_gates(path, gates, model_config=tiny(), base_model="some/policy", dtype=torch.bfloat16)
    return path


def test_the_published_gates_of_qwen3_8b_load_by_their_names_and_shapes(tmp_path: Path) -> None:
    tensors = published_tensors(LAYERS, HEADS, KV_HEADS, DIM, WIDTH)
    torch.save(tensors, tmp_path / "attn_gate_weights.pth")
    assert round((tmp_path / "attn_gate_weights.pth").stat().st_size / 1e6, 1) == 66.1  # as README.md gives it
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    gates = read_gates(tmp_path, POLICY)
    assert (gates.config.select_block, gates.config.gate_dim) == (64, WIDTH)
    prefix = "model.layers.35.self_attn.attn_gate."
    assert torch.equal(gates.query_weight[35], tensors[prefix + LINEAR_Q].float())
    assert torch.equal(gates.key_weight[35], tensors[prefix + LINEAR_K].float())
    assert torch.equal(gates.query_norm[35], tensors[prefix + "attngate_qnorm.weight"].float())
    assert torch.equal(gates.key_norm[0], tensors["model.layers.0.self_attn.attn_gate.attngate_knorm.weight"].float())


def test_ours_are_saved_under_the_published_names_for_published_loaders_too(folder: Path) -> None:
    ours = torch.load(folder / "attn_gate_weights.pth", weights_only=True)
    published = published_tensors(2, 4, 2, 16, 16)
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {
        name: (x.shape, x.dtype) for name, x in published.items()
    }
    beside = load_file(folder / "attn_gate_weights.safetensors")
    assert beside.keys() == ours.keys() and all(torch.equal(beside[name], ours[name]) for name in ours)
    described = json.loads((folder / "config.json").read_text())
    assert described["base_model"] == "some/policy"
    said = {name for name in PUBLISHED if name not in ("seerattn_loss_slice_ratio", "torch_dtype")}
    assert said <= described.keys()
    assert (described["rope_theta"], described["rope_scaling"]) == (1e4, None)


def test_a_config_that_does_not_say_the_kind_is_judged_by_the_tensors(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    for name in ("seerattn_use_qk_norm", "seerattn_use_rope"):
        del described[name]
    (folder / "config.json").write_text(json.dumps(described))
    assert read_gates(folder, tiny()).config == GateConfig.of(tiny())
    _rewrite(lambda tensors: tensors.pop(FIRST + "attngate_qnorm.weight"))(folder)
    with pytest.raises(PreflightError, match=r"attngate_qnorm.weight is missing"):
        read_gates(folder, tiny())


def test_what_was_saved_comes_back(folder: Path) -> None:
    before, after = Gates(GateConfig.of(tiny()), seed=3), read_gates(folder, tiny())
    assert after.config == before.config
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor.bfloat16().float())


def test_a_rescaled_rotary_embedding_is_saved_with_the_gates(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    policy = tiny(rope_parameters=yarn, max_position_embeddings=512)
    gates = Gates(GateConfig.of(policy))
    write_gates(tmp_path, gates, model_config=policy, base_model="some/policy", dtype=torch.float32)
    assert read_gates(tmp_path, policy).config == gates.config
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["rope_type"] == "yarn"
    with pytest.raises(PreflightError, match="rope="):
        read_gates(tmp_path, tiny())


def _rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the tensors of a folder, as published: in a pickle alone."""

    def damage(folder: Path) -> None:
        tensors = torch.load(folder / "attn_gate_weights.pth", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / "attn_gate_weights.pth")
        (folder / "attn_gate_weights.safetensors").unlink()

    return damage


def _pickled(held: object) -> Callable[[Path], object]:
    """Hold something else than tensors by name, in a pickle alone."""

    def damage(folder: Path) -> None:
        (folder / "attn_gate_weights.safetensors").unlink()
        torch.save(held, folder / "attn_gate_weights.pth")

    return damage


def _describe(**changes: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | changes))

    return damage


FIRST = "model.layers.0.self_attn.attn_gate."


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_rewrite(lambda tensors: tensors.pop(FIRST + LINEAR_K)), rf"{LINEAR_K} is missing"),
        (_rewrite(lambda tensors: tensors.update({FIRST + "mask": torch.ones(3)})), "mask is .3., expected none"),
        (_rewrite(lambda tensors: tensors.update({FIRST + LINEAR_Q: torch.ones(2, 2, 16, 8)})), r"expected \[2, 2, 16"),
        (_rewrite(lambda tensors: tensors[FIRST + LINEAR_Q].fill_(torch.nan)), "not finite"),
        (_pickled([torch.ones(3)]), r"attn_gate_weights\.pth holds list, expected tensors by name"),
        (_rewrite(lambda tensors: tensors.update(epoch=3)), r"attn_gate_weights\.pth: epoch is int, expected a tensor"),
        (_describe(seerattn_q_head_pooling_type="Qavgproj"), "seerattn_q_head_pooling_type='Qavgproj'"),
        (_describe(seerattn_use_qk_norm=False), "seerattn_use_qk_norm=False"),
        (_describe(seerattn_gate_block_size=None), "no gates that can be read .*; set sparse.gate to"),
        (_describe(num_hidden_layers=3, layer_types=None), "num_layers=3, not 2"),
        (_describe(num_hidden_layers=3), "no gates that can be read"),
        (_describe(num_key_value_heads=4), "num_kv_heads=4, not 2"),
        (lambda folder: (folder / "config.json").unlink(), "holds no gates: there is no .*; set sparse.gate to"),
        (lambda folder: (folder / "attn_gate_weights.safetensors").write_bytes(b"short"), "cannot be read .*; fetch"),
        (lambda folder: shutil.rmtree(folder), "holds no gates: there is no .*; set sparse.gate to"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(folder)
    with pytest.raises(PreflightError, match=named) as caught:
        read_gates(folder, tiny())
    assert "\n" not in str(caught.value)


def test_gates_without_weights_are_told_of_before_a_policy_is_loaded(folder: Path) -> None:
    (folder / "attn_gate_weights.safetensors").unlink()
    assert read_gate_config(folder, tiny()).select_block == read_gates(folder, tiny()).config.select_block
    (folder / "attn_gate_weights.pth").unlink()
    with pytest.raises(PreflightError, match="holds no gates: there is neither .*; fetch or train"):
        read_gate_config(folder, tiny())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda whole: whole[:-1],
            r"attn_gate_weights\.safetensors cannot be read \(.*\); fetch or train the gates again",
        ),
        (lambda whole: whole + b"more", r"attn_gate_weights\.safetensors cannot be read"),
        (lambda whole: whole[:100], r"attn_gate_weights\.safetensors cannot be read"),
        (lambda whole: b"", r"attn_gate_weights\.safetensors cannot be read"),
        (
            lambda whole: whole.replace(b"layers.1.self_attn", b"layers.2.self_attn"),
            r"layers\.1\.\S+ is missing, expected",
        ),
    ],
    ids=["cut", "longer", "cut in its header", "empty", "another policy's"],
)
def test_weights_that_are_not_whole_are_told_of_before_a_policy_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes], named: str
) -> None:
    weights = folder / "attn_gate_weights.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    monkeypatch.delattr(gate_checkpoint, "load_file")  # nor are their data read
    with pytest.raises(PreflightError, match=named) as caught:
        read_gate_config(folder, tiny())
    assert "\n" not in str(caught.value)


def test_a_pickle_that_is_more_than_tensors_is_never_run(folder: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "touched",)

    (folder / "attn_gate_weights.safetensors").unlink()
    torch.save({"weight": Harmful()}, folder / "attn_gate_weights.pth")
    with pytest.raises(PreflightError, match=r"attn_gate_weights.pth cannot be read .*; fetch or train"):
        read_gates(folder, tiny())
    assert not (tmp_path / "touched").exists()

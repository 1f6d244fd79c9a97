"""What did not arrive in vLLM's model is named, on a stand-in with its names and stacked projections."""

from pathlib import Path

import pytest
import torch
from torch import nn

from configs.errors import StorageError
from drafter import vllm_check
from drafter.vllm_check import check_in_vllm, unloaded


def theirs(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module with the parameters that vLLM makes of a drafter's tensors, and their values."""
    layer = {name.removeprefix("midlayer."): value for name, value in tensors.items() if name.startswith("midlayer.")}
    qkv = [layer[f"self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    values = {
        "model.embed_tokens.weight": torch.full((6, 2), torch.nan),
        "model.fc.weight": tensors["fc.weight"],
        "model.layers.0.hidden_norm.weight": layer["hidden_norm.weight"],
        "model.layers.0.self_attn.qkv_proj.weight": torch.cat(qkv),
        "lm_head.weight": torch.cat([tensors["lm_head.weight"], torch.zeros(3, 2)]),  # padded
        "draft_id_to_target_id": tensors["d2t"],
    }
    root = nn.Module()
    for name, value in values.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
    return root


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "fc.weight": (2, 6),
        "midlayer.hidden_norm.weight": (2,),
        "midlayer.self_attn.q_proj.weight": (4, 4),
        "midlayer.self_attn.k_proj.weight": (2, 4),
        "midlayer.self_attn.v_proj.weight": (2, 4),
        "lm_head.weight": (5, 2),
    }
    floats = {name: torch.randn(shape) for name, shape in shapes.items()}
    return floats | {"d2t": torch.tensor([0, 0, 1, 1, 1]), "t2d": torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)}


def test_all_that_arrived_is_no_problem(tensors: dict[str, torch.Tensor]) -> None:
    assert list(unloaded(theirs(tensors), tensors)) == []


def test_what_was_left_as_it_was_is_named(tensors: dict[str, torch.Tensor]) -> None:
    model = theirs(tensors)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.qkv_proj.weight")[5:7] = torch.nan
        model.get_parameter("draft_id_to_target_id").fill_(-1)
    assert set(unloaded(model, tensors)) == {
        "model.layers.0.self_attn.qkv_proj.weight is not what the folder holds",
        "draft_id_to_target_id is not what the folder holds",
    }


def test_what_only_one_side_has_is_named(tensors: dict[str, torch.Tensor]) -> None:
    model = theirs(tensors)
    renamed = tensors | {"midlayer.norm.weight": tensors["midlayer.hidden_norm.weight"]}
    del renamed["midlayer.hidden_norm.weight"]
    missing, surplus = unloaded(model, renamed)
    assert "hidden_norm.weight is in vLLM's model alone" in missing
    assert surplus == "layers.0.norm.weight has no place in vLLM's model"


def test_where_vllm_is_not_installed_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_check, "find_spec", lambda name: None)
    assert check_in_vllm(tmp_path, tmp_path) is None


def test_what_vllm_says_last_is_the_reason(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho loading\necho 'norm.weight is not what the folder holds'\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(
        StorageError, match=r"does not load the drafter: norm.weight is not what the folder holds; to see all"
    ):
        check_in_vllm(tmp_path, tmp_path, python=python)
    raised = [
        "Traceback:",
        "  File x",
        "pydantic.ValidationError: 1 error",
        "  No is not supported",
        "    see https://x",
    ]
    python.write_text("#!/bin/sh\n" + "".join(f"echo '{line}' >&2\n" for line in raised) + "exit 1\n")
    with pytest.raises(StorageError, match="the drafter: pydantic.ValidationError: 1 error No is not supported see "):
        check_in_vllm(tmp_path, tmp_path, python=python)
    python.write_text("#!/bin/sh\necho noise\necho 0.32.0\n")
    assert check_in_vllm(tmp_path, tmp_path, python=python) == "0.32.0"

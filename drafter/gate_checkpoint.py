"""Gates live in a folder beside the policy, in the layout that SeerAttention-R's are published in.

FOLDER/ config.json                    the policy's, with base_model and what says which kind of gate it is
        attn_gate_weights.pth          tensors by name: what SeerAttention's and SGLang's loaders read
        attn_gate_weights.safetensors  the same tensors: what is read here first, as a pickle is only where it must be

Of every layer i, under model.layers.{i}.self_attn.attn_gate: attngate_linear_q.weight [Hkv, G, D, Dg],
attngate_linear_k.weight [Hkv, 3 D, Dg], attngate_qnorm.weight and attngate_knorm.weight [Dg].
Source: microsoft/SeerAttention distillation_decode.py (names and files; what it saves), run_distillation_decode.sh and
attn_gate_training.py (the kind that was published, shapes). SeerAttention-Decode-Qwen3-8B-AttnGates has 66.1 MB
(README.md): 36 layers of 8 x (4 x 128 x 128 + 3 x 128 x 128) + 2 x 128 numbers of two bytes.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configs.errors import PreflightError
from drafter.gate import GateConfig, Gates

CONFIG, PICKLE, WEIGHTS = "config.json", "attn_gate_weights.pth", "attn_gate_weights.safetensors"
KIND = {
    "seerattn_q_head_pooling_type": "Qproj",
    "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_use_qk_norm": True,
    "seerattn_use_rope": True,
}
SELECT_BLOCK, GATE_DIM = "seerattn_gate_block_size", "seerattn_gate_hidden_size"
PARTS = {
    "query_weight": "attngate_linear_q.weight",
    "key_weight": "attngate_linear_k.weight",
    "query_norm": "attngate_qnorm.weight",
    "key_norm": "attngate_knorm.weight",
}


def write_gates(folder: Path, gates: Gates, *, model_config: Any, base_model: str, dtype: torch.dtype) -> None:
    """Write gates in this dtype, for the policy with this transformers config, into an existing folder.

    base_model: what others call the policy. Raises OSError.
    """
    config = gates.config
    text = model_config.get_text_config()
    parameters = dict(text.rope_parameters)
    described = text.to_dict() | KIND
    described |= {"base_model": base_model, SELECT_BLOCK: config.select_block, GATE_DIM: config.gate_dim}
    # transformers 4, which the published loaders need, reads these; 5 reads rope_parameters
    described["rope_theta"] = parameters.pop("rope_theta")
    described["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in _by_name(gates).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    torch.save(tensors, folder / PICKLE)


def read_gates(folder: Path, model_config: Any) -> Gates:
    """The gates in a folder, in float32, for the policy with this transformers config.

    Raises PreflightError, naming what is wrong: no such folder, gates of another kind or of another policy's shape,
    a tensor that is missing, superfluous, of another shape or not finite.
    """
    gates = Gates(_read_config(folder, model_config))
    wanted, tensors = _by_name(gates), _tensors(folder)
    _require_shapes(folder, _shapes_of(wanted), _shapes_of(tensors))
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PreflightError(f"{folder}: {name} holds values that are not finite; fetch or train the gates again")
        wanted[name].copy_(tensor)  # a view of the state
    return gates


def read_gate_config(folder: Path, model_config: Any) -> GateConfig:
    """The shape of the gates in a folder, held against the policy's and against the tensors that there are.

    Of safetensors the header alone is read. Raises PreflightError, as read_gates does but for values.
    """
    config = _read_config(folder, model_config)
    with torch.device("meta"):
        wanted = _by_name(Gates(config))
    _require_shapes(folder, _shapes_of(wanted), _shapes(folder))
    return config


def _read_config(folder: Path, model_config: Any) -> GateConfig:
    """What config.json says of the gates, held against the policy's. Raises PreflightError."""
    from transformers import AutoConfig  # seconds to import

    path = folder / CONFIG
    if not path.is_file():
        raise PreflightError(
            f"{folder} holds no gates: there is no {path}; set sparse.gate to the folder of `paceline gate train`"
        )
    if not any((folder / name).is_file() for name in (WEIGHTS, PICKLE)):
        raise PreflightError(
            f"{folder} holds no gates: there is neither {WEIGHTS} nor {PICKLE}; fetch or train the gates again"
        )
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        block, width = int(described[SELECT_BLOCK]), int(described[GATE_DIM])
        theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config.json from elsewhere makes transformers raise errors of many libraries
        reason = str(error).strip().partition("\n")[0]
        raise PreflightError(
            f"{folder} holds no gates that can be read ({type(error).__name__}: {reason}); set sparse.gate to the"
            " folder of `paceline gate train`, or to published gates"
        ) from error
    for name, value in KIND.items():
        if (said := described.get(name, value)) != value:  # what it does not say, the tensors' names and shapes do
            raise PreflightError(f"{path} says {name}={said!r}; only gates with {value!r} can be used")
    found = GateConfig.of(theirs, select_block=block, gate_dim=width)
    wanted = GateConfig.of(model_config, select_block=block, gate_dim=width)
    for field in GateConfig.__slots__:
        if getattr(found, field) != getattr(wanted, field):
            trained, given = (_shown(getattr(each, field)) for each in (found, wanted))
            raise PreflightError(f"{folder} holds gates for a policy of {field}={trained}, not {given}; take its own")
    return found


def _require_shapes(folder: Path, wanted: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> None:
    """Raise PreflightError unless the tensors found in a folder, by name, are of the shapes wanted, and no others."""
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise PreflightError(
                f"{folder}: {name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'none of that name')};"
                " take the gates of this policy"
            )


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The tensors' shapes by name, from the file that _tensors reads. Raises PreflightError."""
    path = folder / WEIGHTS
    if not path.is_file():
        return _shapes_of(_tensors(folder))
    with _readable(path), safe_open(path, framework="pt") as file:  # raises where the header's sizes are not the file's
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    """The tensors by name, from whichever file there is. Raises PreflightError."""
    path = folder / WEIGHTS
    if path.is_file():
        with _readable(path):
            return load_file(path)
    path = folder / PICKLE
    with _readable(path):
        held: object = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, dict):
        kind = type(held).__name__
        raise PreflightError(f"{path} holds {kind}, expected tensors by name; take gates as published")
    for name, tensor in held.items():
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise PreflightError(f"{path}: {name} is {kind}, expected a tensor; take gates as published")
    return held


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """While inside, what is wrong with this file is raised as PreflightError."""
    try:
        yield
    # a pickle that is damaged, or holds more than tensors, surfaces as whatever torch raises
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PreflightError(f"{path} cannot be read ({reason}); fetch or train the gates again") from error


def _by_name(gates: Gates) -> dict[str, torch.Tensor]:
    """The gates' tensors as a checkpoint names them: views of their state."""
    return {
        _name(layer, part): stacked[layer]
        for part, stacked in gates.state_dict().items()
        for layer in range(gates.config.num_layers)
    }


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.attn_gate.{PARTS[part]}"


def _shown(value: object) -> object:
    """A number as it is; of a rotary embedding, what tells it from another."""
    frequencies = getattr(value, "frequencies", None)
    return value if frequencies is None else f"({len(frequencies)} frequencies down to {frequencies[-1]:.3g})"

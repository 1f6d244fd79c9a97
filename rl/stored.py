"""A trainer's state on disk: whole tensors by parameter name, whatever number of ranks and ZeRO stage wrote them.

params.safetensors: the policy, in its dtype. optimizer.safetensors: "exp_avg.NAME", "exp_avg_sq.NAME" and, where the
policy is bfloat16, "master.NAME", float32. reference.safetensors where there is one. state.json.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from configs.errors import StorageError
from rl.checkpoint import write_tensors
from rl.zero import MOMENTS, Shares

PARAMS, OPTIMIZER, REFERENCE, STATE = (
    "params.safetensors",
    "optimizer.safetensors",
    "reference.safetensors",
    "state.json",
)
GATHERED_BYTES = 1 << 30  # of parameters put together at a time


def write(
    folder: Path, shares: Shares, *, dtype: torch.dtype, reference: dict[str, torch.Tensor] | None, steps: int
) -> None:
    """Put the state together on all ranks; rank 0 writes it. Raises OSError."""
    writes = dist.get_rank() == 0
    params: dict[str, torch.Tensor] = {}
    optimizer: dict[str, torch.Tensor] = {}
    for name, param in shares.whole(at_a_time=GATHERED_BYTES):
        if writes:
            params[name] = param.cpu()
    for name in shares.shapes:
        whole = {f"{key}.{name}": shares.moment(name, key) for key in MOMENTS}
        if dtype == torch.bfloat16:
            whole[f"master.{name}"] = shares.master(name)
        if writes:
            optimizer |= {key: tensor.cpu() for key, tensor in whole.items()}
    if not writes:
        return
    write_tensors(folder / PARAMS, params)
    write_tensors(folder / OPTIMIZER, optimizer)
    if reference is not None:
        write_tensors(folder / REFERENCE, reference)
    state = {"steps": steps, "adam_steps": shares.adam_steps, "dtype": _name(dtype)}
    (folder / STATE).write_text(json.dumps(state) + "\n")


def check_fits(folder: Path, shares: Shares, *, dtype: torch.dtype) -> None:
    """Refuse the state of another model or dtype. Raises StorageError."""
    found = _state(folder)["dtype"]
    if found != _name(dtype):
        raise StorageError(
            f"{folder} holds {found} parameters, this run trains in {_name(dtype)}; set compute.dtype={found}"
        )
    with safe_open(folder / PARAMS, "pt") as params:
        saved = {name: params.get_slice(name).get_shape() for name in params.keys()}  # noqa: SIM118  # it is no mapping
    for name in saved.keys() | shares.shapes.keys():
        wanted = list(shares.shapes[name]) if name in shares.shapes else None
        if saved.get(name) != wanted:
            raise StorageError(
                f"{folder} has {name} as {saved.get(name)}, the model as {wanted}; resume with the same model"
            )


def read(folder: Path, shares: Shares, *, dtype: torch.dtype, device: torch.device) -> int:
    """Take up what write wrote, on all ranks; the trainer's steps."""
    state = _state(folder)
    with safe_open(folder / PARAMS, "pt") as params, safe_open(folder / OPTIMIZER, "pt") as optimizer:
        for name in shares.shapes:
            param = params.get_tensor(name)
            master = param if dtype == torch.float32 else optimizer.get_tensor(f"master.{name}")
            moments = {key: optimizer.get_tensor(f"{key}.{name}").to(device) for key in MOMENTS}
            shares.write(name, param.to(device), master.to(device), moments)
    shares.adam_steps = state["adam_steps"]
    return int(state["steps"])


def read_reference(folder: Path, *, device: torch.device) -> dict[str, torch.Tensor]:
    """The reference policy. Raises StorageError where there is none."""
    if not (folder / REFERENCE).exists():
        raise StorageError(f"{folder} holds no reference policy: its run had train.kl_coef=0; keep it at 0")
    loaded = load_file(folder / REFERENCE, device=str(device))
    return {name: tensor.clone() for name, tensor in loaded.items()}  # in memory of its own, which can be lent


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

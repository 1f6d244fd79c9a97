"""Whether vLLM's own classes take every weight of an exported drafter: `python -m drafter.vllm_check FOLDER POLICY`.

vLLM neither misses a tensor nor refuses one it has no place for where their names are close. So its model is filled
with NaN first; what is still NaN when the folder is loaded, or is not what the folder holds, is named. In a process of
its own: vLLM sets up groups and defaults that nothing takes down again.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from configs.errors import StorageError
from drafter.layouts import OUR_LAYER, THEIR_LAYER

TIMEOUT_S = 600.0
MAX_SAID = 400  # characters of an error
# stacked in vLLM's model, in this order
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def check_in_vllm(folder: Path, policy: Path, *, python: Path | None = None) -> str | None:
    """The version of the vLLM that loaded the folder, None where none is installed. Raises StorageError.

    policy: a transformers folder of the policy's architecture; its weights are not read. python: of an environment that
    has vLLM, this one's by default.
    """
    if python is None and find_spec("vllm") is None:
        return None
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path}
    command = [
        str(python or sys.executable),
        "-m",
        "drafter.vllm_check",
        str(folder.absolute()),
        str(policy.absolute()),
    ]
    try:
        done = subprocess.run(
            command, env=os.environ | quiet, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise StorageError(f"vLLM did not load the drafter within {TIMEOUT_S:.0f} s; {_remedy(policy)}") from error
    said = done.stdout.strip().splitlines() or [_last_error(done.stderr) or "nothing said"]
    if done.returncode != 0:
        raise StorageError(f"vLLM does not load the drafter: {said[-1]}; {_remedy(policy)}")
    return said[-1]


def _last_error(stderr: str) -> str:
    """The error that ended a process, in a line: pydantic's go on for several, of which the last says nothing."""
    lines = stderr.strip().splitlines()
    first = max((n for n, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), default=-1)
    return " ".join(line.strip() for line in lines[first:])[:MAX_SAID]


def _remedy(policy: Path) -> str:
    """How to see all that vLLM says: what it refused is not kept."""
    again = f"python -m drafter.vllm_check OUT {policy.absolute()}"
    return f"to see all it says, export to OUT where vLLM is not installed, then run `{again}` with it"


def unloaded(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """What of the folder did not arrive in vLLM's model, and what of that model the folder left alone, in words."""
    wanted = {name.replace(OUR_LAYER, THEIR_LAYER): tensor for name, tensor in tensors.items() if name != "t2d"}
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            continue  # the policy's, put in its place when the policy is there
        bare = name.removeprefix("model.")
        if "draft_id_to_target_id" in bare:
            found = wanted.pop("d2t", torch.zeros_like(parameter))  # older versions have the map in any case
        else:
            stack = next((stack for stack in STACKED if f".{stack}." in bare), None)
            parts = [bare.replace(stack, part) for part in STACKED[stack]] if stack else [bare]
            if missing := [part for part in parts if part not in wanted]:
                yield f"{name} is in vLLM's model alone: the folder has no {missing[0]}"
                continue
            found = torch.cat([wanted.pop(part) for part in parts])
        if not torch.equal(parameter[: len(found)].cpu(), found.to(parameter.dtype)):  # lm_head may be padded
            yield f"{name} is not what the folder holds"
    for name in wanted:
        yield f"{name} has no place in vLLM's model"


def load_in_vllm(folder: Path, policy: Path) -> torch.nn.Module:
    """vLLM's model of the drafter in a folder, filled with NaN, then loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    speculative = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 1}
    args: Any = EngineArgs(
        model=str(policy), speculative_config=speculative, skip_tokenizer_init=True, enforce_eager=True
    )
    config = args.create_engine_config()
    draft_config = config.speculative_config.draft_model_config
    torch.set_default_dtype(draft_config.dtype)
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(config, model_config=draft_config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan if parameter.is_floating_point() else -1)
        model.load_weights(iter(load_file(folder / "model.safetensors").items()))
    return model


def main() -> None:
    """Load the folder given; the last line printed is vLLM's version, or what is wrong."""
    folder, policy = map(Path, sys.argv[1:])
    import vllm

    problems = list(unloaded(load_in_vllm(folder, policy), load_file(folder / "model.safetensors")))
    print("; ".join(problems) if problems else vllm.__version__, flush=True)
    os._exit(1 if problems else 0)  # vLLM's groups warn at length when a process ends with them


if __name__ == "__main__":
    main()

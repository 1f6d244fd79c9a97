"""A trained policy leaves a run as a plain transformers folder."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.errors import PreflightError, StorageError
from configs.load import load
from configs.schema import Config
from drafter.sealed import newest, step_folders
from rl.checkpoint import step_of
from rl.rundir import require_run
from rl.stored import PARAMS
from rollout.pretrained import SHIPPED, load_tokenizer, resolve

log = logging.getLogger(__name__)

CARD = """\
---
base_model: {base}
library_name: transformers
tags: [paceline, grpo]
---
# {run}, step {step}

`{base}` trained by reinforcement learning (GRPO) with Paceline on {task}, {prompts} prompts of {group} rollouts a step.
{rewards}
The weights derive from `{base}` and stay under its licence: {licence}.
"""


def export_policy(run_path: Path, out: Path) -> None:
    """Write the policy of a run's newest intact checkpoint to a folder that transformers loads and generates from.

    Config, weights in the run's dtype, tokenizer, chat template, generation config and a model card. OUT appears whole
    or not at all, and nothing in the run changes, so that a live run can be exported. Raises PreflightError when OUT is
    taken or the base model is gone, StorageError when no checkpoint is intact or the disk refuses.
    """
    require_run(run_path)
    config = load(run_path / "config" / "resolved.yaml")
    base = resolve(config.model)
    with staged(out) as staging:
        checkpoint = newest_intact(run_path)
        params = read_params(checkpoint)
        trained(base, params).save_pretrained(staging)
        load_tokenizer(base).save_pretrained(staging)
        (staging / "README.md").write_text(model_card(run_path, config, step_of(checkpoint)), encoding="utf-8")
        check_export(staging, params)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes OUT when the block ends well and is gone when it does not.

    Raises PreflightError when OUT is taken, and StorageError for what the disk refuses, there or inside.
    """
    require_free(out)
    staging = out.with_name(f".staging-{out.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
            share_weights(staging)
            staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot export to {out}: {error}; check the disk and try again") from error


def share_weights(folder: Path) -> None:
    """Let whoever may read a folder's config.json read its weights, which safetensors writes for their owner alone."""
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def require_free(out: Path) -> None:
    """Raise PreflightError where OUT is taken, StorageError where no folder can be made there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PreflightError(f"{out} already exists and is not empty; name another folder")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StorageError(f"{out} cannot be made: {above} is no folder that can be written; name another")


def read_params(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The policy's parameters in a checkpoint folder, by name, all of one dtype."""
    return load_file(checkpoint / "trainer" / PARAMS)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a model folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights_sha256(params: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of a policy's parameters: equal weights give equal digests, whatever files they lie in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(params.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def newest_intact(run_path: Path) -> Path:
    """The newest checkpoint folder of a run whose files match their hashes. Changes nothing; raises StorageError."""
    root = run_path / "checkpoints"
    path = newest(root)
    if path is None:
        broken = len(step_folders(root))
        raise StorageError(f"{run_path} has no intact checkpoint ({broken} broken); let the run reach its first one")
    return path


def say_if_older(checkpoint: Path) -> None:
    """Log that a checkpoint is taken because those after it are broken, where it is not the last there is."""
    *_, last = step_folders(checkpoint.parent)
    if last != checkpoint:
        log.warning("%s does not match its hashes; %s is taken", last, checkpoint.name)


def trained(base: Path, params: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The base model with trained parameters in place of its own. Raises StorageError when they do not fit it."""
    (dtype,) = {tensor.dtype for tensor in params.values()}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, trust_remote_code=False, local_files_only=True
    )
    fill_params(model, params, base)
    return model


@torch.no_grad()
def fill_params(model: PreTrainedModel, params: Mapping[str, torch.Tensor], base: Path) -> None:
    """Copy trained parameters over a model's own, in place. Raises StorageError when they do not fit it."""
    own = dict(model.named_parameters())
    for name, tensor in params.items():
        if name not in own or own[name].shape != tensor.shape:
            raise StorageError(f"the checkpoint's {name} {list(tensor.shape)} has no place in {base}; was it replaced?")
        own[name].copy_(tensor)


def check_export(folder: Path, params: dict[str, torch.Tensor]) -> None:
    """Load the folder as a user would and compare every parameter, bit for bit. Raises StorageError."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    own = dict(model.named_parameters())
    for name, tensor in params.items():
        if own[name].dtype != tensor.dtype or not torch.equal(own[name], tensor):
            raise StorageError(f"{folder} came back with another {name} than was written; check the disk")


def model_card(run_path: Path, config: Config, step: int) -> str:
    """What the folder holds, where it comes from, and how well it did."""
    shipped = SHIPPED.get(config.model.lower())
    lines = []
    if (reward := recorded(run_path, "steps", step, "reward_mean")) is not None:
        lines.append(f"Mean reward of the rollouts of step {step}: {reward:.3f}.")
    if (reward := recorded(run_path, "eval", step, "reward_mean")) is not None:
        lines.append(f"Mean greedy reward on held-out problems: {reward:.3f}.")
    return CARD.format(
        base=shipped.hub_id if shipped else config.model,
        run=config.run.name,
        step=step,
        task=f"`{config.data.name}` ({config.data.source})",
        prompts=config.rollout.prompts_per_step,
        group=config.rollout.group_size,
        rewards="".join(f"{line}\n" for line in lines),
        licence=f"{shipped.licence}, https://huggingface.co/{shipped.hub_id}" if shipped else "see the base model",
    )


def recorded(run_path: Path, name: str, step: int, key: str) -> float | None:
    """A number that metrics/NAME.jsonl holds for a step, the last if several; None without one."""
    return dict(_records(run_path, name, key)).get(step)


def last_recorded(run_path: Path, name: str, step: int, key: str) -> float | None:
    """The number that metrics/NAME.jsonl holds for the last step up to this one that has it; None without one."""
    values = dict(_records(run_path, name, key))
    return values.get(max((at for at in values if at <= step), default=step))


def _records(run_path: Path, name: str, key: str) -> Iterator[tuple[int, float]]:
    """Step and value of every line of metrics/NAME.jsonl that holds the key."""
    with suppress(FileNotFoundError):
        for line in (run_path / "metrics" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # a live run may be in the middle of its last line
                record = json.loads(line)
                if record.get(key) is not None:
                    yield record["step"], record[key]

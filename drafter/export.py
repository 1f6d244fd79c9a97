"""A trained drafter leaves as one flat folder: vLLM and SGLang serve from it, and a later run starts from it.

FOLDER/ config.json         what the engines read
        model.safetensors   the head's weights; not the policy's embedding, which every engine shares
        drafter.json        which policy it drafts for, and how well

Engines skip a tensor whose name they do not know and leave one they miss as it was, without a word: hence the checks.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configs.errors import PreflightError, StorageError
from drafter.eagle import EagleConfig, EagleHead
from drafter.layouts import (
    OUR_LAYER,
    THEIR_LAYER,
    Layout,
    Origin,
    eagle3_config,
    exported_shapes,
    head_config,
    layout_of,
    speculators_config,
)

CONFIG, WEIGHTS, ORIGIN = "config.json", "model.safetensors", "drafter.json"
PROBE_TOKENS, PROBE_STEPS = 8, 3


def write_drafter(folder: Path, head: EagleHead, *, layout: Layout, dtype: torch.dtype, origin: Origin) -> None:
    """Write config, weights in this dtype and origin into an existing folder. Raises PreflightError, OSError.

    PreflightError: a policy so short that two of the layers read are the same one; engines count it once.
    """
    config = head.config
    if len(set(config.aux_layers)) < len(config.aux_layers):
        raise PreflightError(
            f"the drafter reads layers {config.aux_layers} of its policy; engines need three different"
        )
    described = eagle3_config(config, dtype) if layout == "eagle3" else speculators_config(config, dtype, origin)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_file(exported_tensors(head, layout=layout, dtype=dtype), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / ORIGIN).write_text(json.dumps({"layout": layout} | asdict(origin), indent=2) + "\n", encoding="utf-8")


def read_shape(folder: Path) -> EagleConfig:
    """The shape of the head in a folder of either layout, whose tensors' names and shapes alone are read and checked.

    Raises PreflightError, naming what is wrong with it.
    """
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = head_config(described)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PreflightError(
            f"{folder} holds no drafter that can be read ({type(error).__name__}: {error}); "
            "`paceline export RUN --drafter OUT` writes one"
        ) from error
    expected = exported_shapes(config, layout=layout_of(described))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted = f"expected {expected[name]}" if name in expected else "which no engine reads"
            raise PreflightError(f"{folder}: {name} is {found.get(name, 'missing')}, {wanted}; export it again")
    return config


def read_layout(folder: Path) -> Layout:
    """The layout of a folder that read_shape can read."""
    return layout_of(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def read_drafter(folder: Path) -> EagleHead:
    """The head in a folder of either layout, in float32. Raises PreflightError, naming what is wrong with it."""
    config = read_shape(folder)
    tensors = load_file(folder / WEIGHTS)
    check_tensors(folder, config, tensors)
    head = EagleHead(config)
    state = {name.replace(THEIR_LAYER, OUR_LAYER): tensor for name, tensor in tensors.items()}
    head.load_state_dict(head.state_dict() | state)  # a head with all tokens is stored without maps
    return head


def exported_tensors(head: EagleHead, *, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The head's tensors under the layout's names, weights in this dtype, on the CPU."""
    tensors = {}
    for name, tensor in named_as(head.state_dict(), head.config, layout=layout).items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def named_as(state: Mapping[str, torch.Tensor], config: EagleConfig, *, layout: Layout) -> dict[str, torch.Tensor]:
    """EagleHead.state_dict under the layout's names; without its maps, d2t and t2d, where every token can be proposed:
    vLLM then has no place for them."""
    has_maps = config.draft_vocab < config.vocab_size
    kept = {name: tensor for name, tensor in state.items() if has_maps or name not in ("d2t", "t2d")}
    if layout == "eagle3":
        return kept
    return {name.replace(OUR_LAYER, THEIR_LAYER): tensor for name, tensor in kept.items()}


def check_tensors(folder: Path, config: EagleConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise PreflightError unless a head's tensors hold what they should: finite weights, and maps that agree."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PreflightError(f"{folder}: {name} holds values that are not finite; export an earlier checkpoint")
    if "d2t" in tensors:
        targets = torch.arange(config.draft_vocab) + tensors["d2t"]
        if not torch.equal(targets, tensors["t2d"].nonzero().flatten()):
            raise PreflightError(f"{folder}: d2t and t2d name different tokens; export it again")


def check_drafter(folder: Path, head: EagleHead, *, dtype: torch.dtype, policy_sha256: str) -> None:
    """Read the folder back and hold it against the head it came from, and against the policy it is to draft for.

    Config, every tensor bit for bit in this dtype, and what a few steps put out. Raises StorageError, PreflightError.
    """
    recorded = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["policy_sha256"]
    if recorded != policy_sha256:
        raise PreflightError(f"{folder} drafts for policy {recorded[:12]}, not {policy_sha256[:12]}; export it again")
    again, written = read_drafter(folder), copy.deepcopy(head).cpu().to(dtype).float()
    if again.config != written.config:
        raise StorageError(f"{folder} came back with another shape than was written: {again.config}")
    for name, tensor in written.state_dict().items():
        if not torch.equal(again.state_dict()[name], tensor):
            raise StorageError(f"{folder} came back with another {name} than was written; check the disk")
    found = probe(again)
    if not found.isfinite().all():
        raise PreflightError(f"{folder}: the drafter puts out no numbers; export an earlier checkpoint")
    if not torch.equal(found, probe(written)):
        raise StorageError(f"{folder} came back with a drafter that proposes otherwise; this is a bug, report it")


@torch.no_grad()
def probe(head: EagleHead) -> torch.Tensor:
    """Logits of a few positions and of a chain below the last, from inputs that are always the same. [N, V']."""
    config, generator = head.config, torch.Generator().manual_seed(0)

    def inputs(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator)

    visible = torch.ones(PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool).tril()
    states = head.fuse(inputs(PROBE_TOKENS, 3 * config.hidden_size))
    positions = torch.arange(PROBE_TOKENS)
    outputs, past = head.step(inputs(PROBE_TOKENS, config.hidden_size), states, positions, head.empty_past(), visible)
    logits = [head.logits(outputs)]
    for step in range(PROBE_STEPS):
        seen = torch.ones(1, PROBE_TOKENS + step + 1, dtype=torch.bool)
        position = torch.tensor([PROBE_TOKENS + step])
        outputs, past = head.step(inputs(1, config.hidden_size), outputs[-1:], position, past, seen)
        logits.append(head.logits(outputs))
    return torch.cat(logits)

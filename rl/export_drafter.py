"""A trained drafter leaves a run, or an offline training, as a folder to serve from: checked, with a card."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from configs.errors import PreflightError, StorageError
from configs.load import load
from drafter import checkpoint
from drafter.eagle import EagleConfig, EagleHead, misfit
from drafter.export import check_drafter, write_drafter
from drafter.layouts import Layout, Origin
from drafter.learner import SERVED, as_config
from drafter.vllm_check import check_in_vllm
from rl.checkpoint import step_of
from rl.export import (
    last_recorded,
    newest_intact,
    read_params,
    require_free,
    saved_weights,
    say_if_older,
    staged,
    weights_sha256,
)
from rl.loop import DRAFTER
from rl.rundir import require_run
from rollout.model import load_config
from rollout.pretrained import hub_name, resolve

ACCEPT_LENGTH = "drafter_served_accept_length"  # of the steps' metrics

CARD = """\
---
base_model: {base}
library_name: {library}
tags: [paceline, eagle3, speculative-decoding]
---
# Drafter of {policy}

An EAGLE-3 head with {parameters:.1f} M parameters, trained with Paceline beside its policy (step {step}). It proposes
{draft_vocab:,} of {vocab:,} tokens, attends to the last {window} and reads the residual streams that enter the
policy's layers {layers}.
{measured}

Its policy's weights have this SHA-256 (Paceline's weights_sha256); with others, drafts are rejected more often:

    {sha256}
{trained}
## Serve

{serve}
{loaded}
The drafter holds nothing of the policy but its copy of output weights, and stays under the policy's licence.
"""

VLLM = """\
vLLM:

    vllm serve {policy} --disable-hybrid-kv-cache-manager \\
      --speculative-config '{{"method": "eagle3", "model": "{out}", "num_speculative_tokens": {tokens}}}'

Without the flag, vLLM splits the cache of all layers into groups of one, for the sake of the drafter's window.
"""

BEGUN = """
The commands below name the model that its policy was before training. `paceline export {run} --policy OUT` writes the
policy itself: serve that one.
"""

NO_SGLANG = """
SGLang does not read this layout: for it, export with `--format eagle3`.
"""

SGLANG = """
SGLang:

    python -m sglang.launch_server --model-path {policy} --speculative-algorithm EAGLE3 \\
      --speculative-draft-model-path {out} --speculative-num-steps {tokens} --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens {nodes}

SGLang knows no window of a drafter: past {window} tokens it attends to more than it was trained with.
"""


def check_exports(run_path: Path, *, policy: Path | None, drafter: Path | None) -> None:
    """Find out, before either is written, what would stop the second export of a run once the first is there.

    Raises PreflightError where an output is taken, one would lie in the other's way or the run serves no drafter;
    StorageError where no checkpoint is intact.
    """
    for out in (policy, drafter):
        if out is not None:
            require_free(out)
    saved = newest_intact(run_path)
    say_if_older(saved)
    if drafter is None:
        return
    if policy is not None and policy.resolve().is_relative_to(drafter.resolve()):
        raise PreflightError(f"--policy {policy} lies in --drafter {drafter}, written after it; name a folder for each")
    require_drafter_place(drafter, served_head(saved).config)


def require_drafter_place(out: Path, shape: EagleConfig) -> None:
    """Raise PreflightError where OUT is taken, or engines could not read a drafter of this shape from it."""
    require_free(out)
    if len(set(shape.aux_layers)) < len(shape.aux_layers):
        raise PreflightError(
            f"{out}: a drafter would read layers {shape.aux_layers} of this policy, and engines need three different; "
            "take a policy of more layers"
        )


def export_drafter(run_path: Path, out: Path, *, layout: Layout, policy: Path | None = None) -> str | None:
    """Write the drafter that a run serves, as of its newest intact checkpoint; vLLM's version where it was tried there.

    policy: where the policy was exported to, which the card and the layout then name, and which must hold the weights
    of this checkpoint; else they name the model the run began with. OUT appears only when every check has passed.
    Raises PreflightError where the run has no drafter, the policy is another or OUT is taken; StorageError.
    """
    require_run(run_path)
    config = load(run_path / "config" / "resolved.yaml")
    base = resolve(config.model)
    saved = newest_intact(run_path)
    head = served_head(saved)
    params = read_params(saved)
    (dtype,) = {tensor.dtype for tensor in params.values()}
    origin = Origin(
        policy=str(policy.absolute()) if policy else hub_name(config.model),
        policy_architectures=architectures(base),
        policy_sha256=weights_sha256(params),
        step=step_of(saved),
        num_draft_tokens=config.drafter.unroll,
        accept_length=last_recorded(run_path, "steps", step_of(saved), ACCEPT_LENGTH),
    )
    run = run_path if policy is None else None
    if policy is not None and weights_sha256(saved_weights(policy)) != origin.policy_sha256:
        raise PreflightError(f"{policy} does not hold the policy of {saved}; export both at once, with the run at rest")
    with staged(out) as staging:
        return save_drafter(staging, head, layout=layout, dtype=dtype, origin=origin, base=base, out=out, run=run)


def export_trained(
    out: Path,
    head: EagleHead,
    *,
    policy: PreTrainedModel,
    model: str,
    run: Path | None,
    step: int,
    num_draft_tokens: int,
    accept_length: float,
    layout: Layout,
) -> str | None:
    """As export_drafter, of a head and the policy it was trained beside.

    model: what a recipe calls that policy, or what it was before the run that trained it, if one did.
    """
    base = resolve(model)
    origin = Origin(
        policy=hub_name(model),
        policy_architectures=architectures(base),
        policy_sha256=weights_sha256(dict(policy.named_parameters())),
        step=step,
        num_draft_tokens=num_draft_tokens,
        accept_length=accept_length,
    )
    with staged(out) as staging:
        return save_drafter(
            staging, head, layout=layout, dtype=policy.dtype, origin=origin, base=base, out=out, run=run
        )


def save_drafter(
    folder: Path,
    head: EagleHead,
    *,
    layout: Layout,
    dtype: torch.dtype,
    origin: Origin,
    base: Path,
    out: Path,
    run: Path | None,
) -> str | None:
    """Write a drafter and its card into a folder and check it, in vLLM too where that is installed.

    base: a transformers folder of the policy's architecture. out: what the folder will be called. run: whose policy it
    drafts for, where origin names what that was before. Returns the version of vLLM that loaded it. Raises
    PreflightError, StorageError.
    """
    require_fit(head.config, base)
    write_drafter(folder, head, layout=layout, dtype=dtype, origin=origin)
    check_drafter(folder, head, dtype=dtype, policy_sha256=origin.policy_sha256)
    version = check_in_vllm(folder, base)
    (folder / "README.md").write_text(card(head, layout, origin, out=out, run=run, vllm=version), encoding="utf-8")
    return version


def require_fit(shape: EagleConfig, base: Path) -> None:
    """Raise StorageError where a drafter is of another geometry than its policy's model folder."""
    fitting = EagleConfig.of(load_config(base), draft_vocab=shape.draft_vocab, window=shape.window)
    if (name := misfit(shape, fitting)) is not None:
        raise StorageError(
            f"the drafter's {name}={getattr(shape, name)} does not fit {base}, which has {getattr(fitting, name)}; "
            "was it replaced?"
        )


def served_head(saved: Path) -> EagleHead:
    """The head that a run served when this checkpoint was written. Raises PreflightError where it served none."""
    folder = saved / DRAFTER
    if not folder.is_dir():
        raise PreflightError(
            f"{saved} has no drafter: train with spec.source=eagle or auto, or `paceline drafter train`"
        )
    record, files = checkpoint.read(folder)
    if SERVED not in files and record["off"]:
        raise PreflightError(
            f"{folder}: no drafter is served any more ({record['off']}); "
            f"`paceline drafter train {saved.parents[1]} OUT` makes one"
        )
    if SERVED not in files:
        raise PreflightError(f"{folder}: no drafter was good enough to be served by then; train longer")
    head = EagleHead(as_config(record["head"]))
    head.load_state_dict(files[SERVED])
    return head


def architectures(base: Path) -> list[str]:
    """The class names that a model folder's config.json gives."""
    return list(load_config(base).architectures or [])


def card(head: EagleHead, layout: Layout, origin: Origin, *, out: Path, run: Path | None, vllm: str | None) -> str:
    """What the folder holds, how well it does, and how to serve it; out, run as save_drafter has them."""
    config = head.config
    tokens = origin.num_draft_tokens
    measured = "Nobody has measured its accept length; `paceline drafter eval` does."
    if origin.accept_length is not None:
        measured = f"Accept length {origin.accept_length:.2f} with chains of {tokens} tokens, on texts held out."
    serve = VLLM + (SGLANG if layout == "eagle3" else NO_SGLANG)
    # absolute: servers take a folder that they do not find for the name of one on the hub
    folder = out.absolute()
    return CARD.format(
        base=origin.policy,
        library="transformers" if layout == "eagle3" else "speculators",
        policy=origin.policy,
        parameters=sum(parameter.numel() for parameter in head.parameters()) / 1e6,
        step=origin.step,
        draft_vocab=config.draft_vocab,
        vocab=config.vocab_size,
        window=config.window,
        layers=", ".join(map(str, config.aux_layers)),
        measured=measured,
        sha256=origin.policy_sha256,
        trained=BEGUN.format(run=run) if run else "",
        serve=serve.format(policy=origin.policy, out=folder, tokens=tokens, nodes=tokens + 1, window=config.window),
        loaded=f"vLLM {vllm} has loaded it, over NaN." if vllm else "It has not been tried in vLLM.",
    )

"""Tensor parallelism for rollouts: every rank keeps a share of each projection, cut as the module's own plan says."""

import re
from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import PreflightError
from rollout.collectives import Ranks, held_by, ranks_of
from rollout.decoder import agree_up_to_rounding, some_logits
from rollout.fused import FusedDecoder
from rollout.pieces import Piece, whole_pieces
from rollout.projections import lay_side_by_side
from rollout.standard import NotStandardError
from rollout.transfer import trainable

# What transformers' plans say of the projections that FusedDecoder knows: cut by outputs, by inputs, or by outputs
# that are then gathered. All else (norms; the embedding, which is looked up) stays whole.
PLAN = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "o_proj": "rowwise",
    "gate_proj": "colwise",
    "up_proj": "colwise",
    "down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}


def shard_policy(model: PreTrainedModel, ranks: Ranks) -> dict[str, Piece]:
    """Keep only this rank's share of a policy, in place. Every rank holds the whole one before, with equal weights.

    Returns what that is of each parameter that is trained, in their order; of tied ones once.

    Attention is cut by whole heads, the MLP by features, the head by tokens of the vocabulary. make_decoder and the
    engine serve the share as they serve a whole policy. So does the module itself, whose outputs are summed and
    gathered by hooks, without gradients. config describes the share, so that a cache made from it has its heads.
    Raises PreflightError where the plan, the architecture or a shape does not allow it, or ranks hold other weights;
    the model is whole then. Raises it too where the shares together compute something else.
    """
    assert ranks_of(model) is None, "a share is not cut again"
    shares = _planned(model, ranks.world)
    whole = some_logits(model)
    if not ranks.all(_equals_first(model, ranks)):
        raise PreflightError("the ranks hold different weights; load the same model, or draw it with the same seed")
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    wholes = whole_pieces(trainable(model))
    with torch.no_grad():
        for linear, style in shares:
            if style == "rowwise":
                _keep_inputs(linear, ranks)
            else:
                _keep_outputs(linear, ranks, is_view=tied and linear is model.lm_head, gather=linear is model.lm_head)
    describe_share(model.config, ranks.world)
    lay_side_by_side(model)
    held_by(model, ranks)
    if not agree_up_to_rounding(some_logits(model), whole, model):
        raise PreflightError(f"{type(model).__name__} computes something else when {ranks.world} ranks share it")
    return {name: _piece(model, name, whole, ranks) for name, whole in wholes.items()}


def _piece(model: PreTrainedModel, name: str, whole: Piece, ranks: Ranks) -> Piece:
    """What a rank has of a parameter, found by its shape."""
    path, _, kind = name.rpartition(".")
    kept = getattr(model.get_submodule(path), kind)
    if kept is None or kept.shape == whole.shape:
        return replace(whole, parameter=kept)
    (dim,) = [dim for dim, size in enumerate(kept.shape) if size != whole.shape[dim]]
    return replace(whole, dim=dim, start=ranks.rank * kept.shape[dim], parameter=kept)


def _planned(model: PreTrainedModel, world: int) -> list[tuple[nn.Linear, str]]:
    """Every projection and how it is cut. Raises PreflightError."""
    name = type(model).__name__
    try:
        FusedDecoder(model)
    except NotStandardError as error:
        raise PreflightError(f"{name} cannot be shared by {world} GPUs, because {error}; run it on one") from error
    config = model.config.get_text_config()
    for what in ("num_attention_heads", "num_key_value_heads"):
        if (count := getattr(config, what)) % world:
            raise PreflightError(f"{name} cannot be shared by {world} GPUs: {what}={count} does not divide by {world}")
    shares = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        style, known = model.tp_plan.get(re.sub(r"\.\d+\.", ".*.", path)), PLAN[path.rpartition(".")[2]]
        if style != known:
            planned = "says nothing of it" if style is None else f"says {style!r}"
            raise PreflightError(
                f"{name} cannot be shared by {world} GPUs: {path} is cut {known!r}, and its plan {planned}"
            )
        size = module.in_features if style == "rowwise" else module.out_features
        if size % world:
            side = "inputs" if style == "rowwise" else "outputs"
            raise PreflightError(
                f"{name} cannot be shared by {world} GPUs: the {size} {side} of {path} do not divide by {world}"
            )
        shares.append((module, known))
    return shares


def _equals_first(model: PreTrainedModel, ranks: Ranks) -> bool:
    """Whether this rank's parameters have the sums that rank 0's have."""
    sums = torch.stack([parameter.detach().sum(dtype=torch.float64) for parameter in model.parameters()]).tolist()
    return bool(ranks.share(sums) == sums)


def _keep_outputs(linear: nn.Linear, ranks: Ranks, *, is_view: bool, gather: bool) -> None:
    """Keep this rank's rows. is_view: in a parameter of its own, over rows of one that stays whole for lookups."""
    share = linear.out_features // ranks.world
    if is_view:
        rows = linear.weight.detach().narrow(0, ranks.rank * share, share)
        linear.weight = nn.Parameter(rows, requires_grad=linear.weight.requires_grad)
    else:
        _narrow(linear.weight, 0, ranks, share)
    if linear.bias is not None:
        _narrow(linear.bias, 0, ranks, share)
    linear.out_features = share
    if gather:
        linear.register_forward_hook(lambda _, args, out: _gathered(out, ranks))


def _keep_inputs(linear: nn.Linear, ranks: Ranks) -> None:
    """Keep this rank's columns; the bias is added once, by rank 0."""
    share = linear.in_features // ranks.world
    _narrow(linear.weight, 1, ranks, share)
    if ranks.rank > 0:
        linear.register_parameter("bias", None)
    linear.in_features = share
    linear.register_forward_hook(lambda _, args, out: _summed(out, ranks))


def _narrow(parameter: torch.Tensor, dim: int, ranks: Ranks, share: int) -> None:
    # a copy: a view would keep the whole alive
    rows = parameter.data.narrow(dim, ranks.rank * share, share)
    parameter.data = rows.clone(memory_format=torch.contiguous_format)


def _summed(partial: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    assert not partial.requires_grad, "a shared policy is for rollouts: its sums carry no gradients"
    return ranks.sum(partial)


def _gathered(piece: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    assert not piece.requires_grad, "a shared policy is for rollouts: its logits carry no gradients"
    return ranks.gather_columns(piece.flatten(0, -2)).view(*piece.shape[:-1], -1)


def describe_share(config: PretrainedConfig, world: int) -> None:
    """Make it say what a rank has of each layer; what is derived from it, as a head's width, is written down."""
    config = config.get_text_config()
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.num_attention_heads //= world
    config.num_key_value_heads //= world
    config.intermediate_size //= world
    config.tie_word_embeddings = False

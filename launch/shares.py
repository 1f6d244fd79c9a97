"""What one of several ranks has of a policy that they share for rollouts, from its configuration alone."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from configs.errors import PreflightError
from rollout.parallel import describe_share

DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True)
class Share:
    """config: of its layers. parameters: that it holds. cut: elements of the largest one that arrives whole for it."""

    config: PretrainedConfig
    parameters: int
    cut: int


def share_of(config: PretrainedConfig, world: int) -> Share:
    """One rank's share of a policy that so many hold together. Nothing is allocated. Raises PreflightError."""
    if world == 1:
        return Share(config, count_parameters(config), 0)
    text = config.get_text_config()
    for name in DIVIDED:
        count = getattr(text, name, None) or text.num_attention_heads
        if count % world:
            raise PreflightError(f"rollout.tensor_parallel={world} does not divide the model's {name}={count}; set 1")
    share = deepcopy(config)
    describe_share(share, world)
    head = text.vocab_size * text.hidden_size
    counted = [module.weight.numel() for module in empty_model(config).modules() if isinstance(module, nn.Linear)]
    if text.tie_word_embeddings:  # it is looked up whole, and read in part
        counted.remove(head)
        return Share(share, count_parameters(share) - head, max(counted))
    return Share(share, count_parameters(share) - head + head // world, max(counted))


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model, tied ones once. Nothing is allocated."""
    return sum(parameter.numel() for parameter in empty_model(config).parameters())


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this shape whose parameters have no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model

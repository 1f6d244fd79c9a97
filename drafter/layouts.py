"""The two layouts of an exported drafter: what engines read in config.json, and the tensors they look for.

"eagle3" is the layout of EAGLE-3's authors, SpecForge and SGLang; "speculators" that of the library of this name.
vLLM loads both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from drafter.eagle import EagleConfig

Layout = Literal["eagle3", "speculators"]

SPECULATORS_VERSION = "0.7.0"  # of the library whose layout it is
OUR_LAYER, THEIR_LAYER = "midlayer.", "layers.0."  # the decoder layer in the first layout, and in the second


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose drafter it is. policy_sha256: rl.export.weights_sha256 of the policy it was trained beside.

    accept_length: tokens a forward of the policy commits with it, None where nobody has measured.
    """

    policy: str
    policy_architectures: list[str]
    policy_sha256: str
    step: int
    num_draft_tokens: int
    accept_length: float | None = None


def layer_config(config: EagleConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The head's decoder layer as the one layer of a Llama."""
    name = str(dtype).removeprefix("torch.")
    layer: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # transformers 5 reads the second, SGLang with an older one the first
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": name,
        "torch_dtype": name,
        "sliding_window": config.window,
    }
    if config.window < config.max_position_embeddings:
        layer["layer_types"] = ["sliding_attention"]
    return layer


def eagle3_config(config: EagleConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the first layout.

    vLLM reads the layer ids at the top, each the layer whose input is taken; SGLang those in eagle_config, each the
    layer whose output is taken, one less.
    """
    return layer_config(config, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config.draft_vocab,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.aux_layers],
        },
    }


def speculators_config(config: EagleConfig, dtype: torch.dtype, origin: Origin) -> dict[str, Any]:
    """config.json of the second layout, which also names the policy and how many tokens to draft."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": origin.num_draft_tokens}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": origin.policy, "architectures": origin.policy_architectures},
        },
        "transformer_layer_config": layer_config(config, dtype),
        "draft_vocab_size": config.draft_vocab,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "dtype": str(dtype).removeprefix("torch."),
    }


def head_config(described: Mapping[str, Any]) -> EagleConfig:
    """The head that a config.json of either layout describes. Raises KeyError, ValueError."""
    layer = described.get("transformer_layer_config", described)
    if described.get("norm_before_residual", False) or layer["num_hidden_layers"] != 1:
        raise ValueError("an EAGLE-3 head of another kind: normed residuals, or more than one layer")
    first, middle, last = described["eagle_aux_hidden_state_layer_ids"]
    return EagleConfig(
        hidden_size=layer["hidden_size"],
        intermediate_size=layer["intermediate_size"],
        num_heads=layer["num_attention_heads"],
        num_kv_heads=layer["num_key_value_heads"],
        head_dim=layer["head_dim"],
        vocab_size=layer["vocab_size"],
        draft_vocab=described["draft_vocab_size"],
        window=layer.get("sliding_window") or layer["max_position_embeddings"],
        rms_norm_eps=layer["rms_norm_eps"],
        rope_theta=layer["rope_theta"],
        max_position_embeddings=layer["max_position_embeddings"],
        aux_layers=(first, middle, last),
    )


def exported_shapes(config: EagleConfig, *, layout: Layout) -> dict[str, list[int]]:
    """Name and shape of every tensor in a layout, as the engines have them: written out, not asked of the head."""
    size, inner, draft_vocab = config.hidden_size, config.intermediate_size, config.draft_vocab
    query, pair = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm.weight": [size],
        "hidden_norm.weight": [size],
        "post_attention_layernorm.weight": [size],
        "self_attn.q_proj.weight": [query, 2 * size],
        "self_attn.k_proj.weight": [pair, 2 * size],
        "self_attn.v_proj.weight": [pair, 2 * size],
        "self_attn.o_proj.weight": [size, query],
        "mlp.gate_proj.weight": [inner, size],
        "mlp.up_proj.weight": [inner, size],
        "mlp.down_proj.weight": [size, inner],
    }
    prefix = THEIR_LAYER if layout == "speculators" else OUR_LAYER
    shapes = {"fc.weight": [size, 3 * size], "norm.weight": [size], "lm_head.weight": [draft_vocab, size]}
    maps = {"d2t": [draft_vocab], "t2d": [config.vocab_size]} if draft_vocab < config.vocab_size else {}
    return shapes | {prefix + name: shape for name, shape in layer.items()} | maps


def layout_of(described: Mapping[str, Any]) -> Layout:
    """The layout of a config.json."""
    return "speculators" if "speculators_config" in described else "eagle3"

"""A published head as serving reads it."""

from dataclasses import dataclass

import torch

from drafter.eagle import EagleConfig
from kernels.linear import Norm


@dataclass(frozen=True, slots=True)
class ServedHead:
    """The head's weights as serving reads them: q, k, v in one tensor, gate and up in another.

    fc [H, 3H]; qkv [(Hq + 2 Hkv) D, 2H]; output [H, Hq D]; gate_up [2 I, H]; down [H, I]; lm_head [V', H]; vocabulary
    [V'] int32: the target's tokens; published [1] int32: 0 while these say nothing.
    """

    fc: torch.Tensor
    embed_norm: Norm
    state_norm: Norm
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: Norm
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: Norm
    lm_head: torch.Tensor
    vocabulary: torch.Tensor
    published: torch.Tensor

    def by_name(self, config: EagleConfig) -> dict[str, torch.Tensor]:
        """Where each of EagleHead's parameters is served from."""
        query, pair = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = zip(("q_proj", "k_proj", "v_proj"), self.qkv.split([query, pair, pair]), strict=True)
        return {
            "fc.weight": self.fc,
            "midlayer.input_layernorm.weight": self.embed_norm.weight,
            "midlayer.hidden_norm.weight": self.state_norm.weight,
            **{f"midlayer.self_attn.{name}.weight": part for name, part in parts},
            "midlayer.self_attn.o_proj.weight": self.output,
            "midlayer.post_attention_layernorm.weight": self.mlp_norm.weight,
            "midlayer.mlp.gate_proj.weight": self.gate_up[: config.intermediate_size],
            "midlayer.mlp.up_proj.weight": self.gate_up[config.intermediate_size :],
            "midlayer.mlp.down_proj.weight": self.down,
            "norm.weight": self.norm.weight,
            "lm_head.weight": self.lm_head,
        }

    def load(self, state: dict[str, torch.Tensor], config: EagleConfig) -> None:
        """Copy these weights in place, EagleHead's by name.

        Raises ValueError for missing, unknown or misshapen tensors, with nothing changed.
        """
        served = self.by_name(config)
        wanted = {name: tuple(tensor.shape) for name, tensor in served.items()}
        wanted |= {"d2t": (config.draft_vocab,), "t2d": (config.vocab_size,)}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if given != wanted:
            name = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))[0]
            raise ValueError(f"the drafter's {name} has shape {given.get(name)}, and {wanted.get(name)} is served")
        device = self.vocabulary.device
        with torch.no_grad():
            for name, tensor in served.items():
                tensor.copy_(state[name])
            offsets = state["d2t"].to(device)
            self.vocabulary.copy_(offsets + torch.arange(len(offsets), device=device))
            self.published.fill_(1)

    @classmethod
    def empty(cls, config: EagleConfig, dtype: torch.dtype, device: torch.device) -> "ServedHead":
        """Room for weights: zeros, so that all is finite before the first are published."""
        size, query = config.hidden_size, config.num_heads * config.head_dim

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def norm() -> Norm:
            return Norm(zeros(size), config.rms_norm_eps)

        return cls(
            fc=zeros(size, 3 * size),
            embed_norm=norm(),
            state_norm=norm(),
            qkv=zeros(query + 2 * config.num_kv_heads * config.head_dim, 2 * size),
            output=zeros(size, query),
            mlp_norm=norm(),
            gate_up=zeros(2 * config.intermediate_size, size),
            down=zeros(size, config.intermediate_size),
            norm=norm(),
            lm_head=zeros(config.draft_vocab, size),
            vocabulary=torch.arange(config.draft_vocab, dtype=torch.int32, device=device),
            published=torch.zeros(1, dtype=torch.int32, device=device),
        )

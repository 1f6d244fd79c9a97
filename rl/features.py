"""What a learned drafter reads, computed from finished texts: one packed forward of the policy instead of a rollout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from drafter.features import FeatureBatch
from kernels.attention import PackedSequences
from rollout.model import AttentionContext, layers_of


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its response, as tokens. num_prompt: how many of them are the prompt's, at least 1."""

    token_ids: list[int]
    num_prompt: int

    def __post_init__(self) -> None:
        assert 0 < self.num_prompt < len(self.token_ids), "a text has a prompt and a response"


def batches(texts: Sequence[Text], max_tokens: int) -> Iterator[list[Text]]:
    """The texts in order, in groups of together at most max_tokens tokens; a longer text stands alone."""
    group: list[Text] = []
    num_tokens = 0
    for text in texts:
        if group and num_tokens + len(text.token_ids) > max_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(text)
        num_tokens += len(text.token_ids)
    if group:
        yield group


@torch.no_grad()
def text_features(
    policy: PreTrainedModel,
    texts: Sequence[Text],
    *,
    aux_layers: Sequence[int],
    temperature: float,
    with_prompt: bool,
    version: int = 0,
) -> FeatureBatch:
    """Features of every position of these texts that has a successor, one window a text, on the policy's device.

    with_prompt=False starts each window at the prompt's last token, where a rollout's own features start. Nothing was
    drafted, so no token stands rejected.
    """
    device = policy.device
    lengths = torch.tensor([len(text.token_ids) for text in texts])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    token_ids = torch.tensor([token for text in texts for token in text.token_ids], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    cu_seqlens = starts.to(device, torch.int32)
    aux, hidden = forward_with_aux(
        policy, token_ids, positions.to(device), PackedSequences(cu_seqlens, int(lengths.max())), aux_layers
    )
    first = [0 if with_prompt else text.num_prompt - 1 for text in texts]
    kept = [
        torch.arange(start + skip, start + length - 1)
        for start, skip, length in zip(starts.tolist(), first, lengths.tolist(), strict=False)
    ]
    index = torch.cat(kept).to(device)
    windows = torch.tensor([0, *(len(rows) for rows in kept)]).cumsum(0)
    return FeatureBatch(
        token_ids=token_ids[index],
        next_ids=token_ids[index + 1],
        positions=positions.to(device)[index],
        aux=aux[index],
        hidden=hidden[index],
        cu_seqlens=windows.to(device, torch.int32),
        versions=torch.full((len(texts),), version, dtype=torch.int64, device=device),
        alt_ids=torch.full_like(index, -1),
        alt_hidden=torch.zeros_like(hidden[index]),
        temperature=temperature,
    )


def forward_with_aux(
    policy: PreTrainedModel,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    seqs: PackedSequences,
    aux_layers: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual streams entering aux_layers, side by side, and the final hidden states, of packed sequences.

    Shapes: token_ids, positions [T] int64. Returns: aux [T, len(aux_layers) * H]; hidden [T, H], after the final norm.
    """
    _, layers = layers_of(policy)
    entering: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            entering[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [keep(layer) for layer in aux_layers]
    try:
        context = AttentionContext(seqs)
        inputs = {"input_ids": token_ids[None], "position_ids": positions[None]}
        output = policy.base_model(**inputs, use_cache=False, paceline=context)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([entering[layer] for layer in aux_layers], dim=1), output.last_hidden_state[0]

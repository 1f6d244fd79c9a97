"""The selectors by name: those that go by a block's keys or its place, and how all of them are configured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError, PreflightError
from configs.layers import runs
from configs.schema import SparseConfig
from drafter.gate import Gates
from drafter.gate_checkpoint import read_gate_config, read_gates
from drafter.selfdraft import INNER_DEPTH
from kernels.attention import PagedSequences
from kernels.describe import PLANES, Kind, describe, empty_descriptors, most_touched
from kernels.select import (
    BlockLists,
    Choice,
    bound_scores,
    choose_blocks,
    mean_scores,
    newest_blocks,
    num_selection_blocks,
)
from rollout.gate_sampler import GateSampler
from rollout.gate_selector import GateSelector
from rollout.lowbit import LowBitPolicy, require_fp8
from rollout.model import kv_shape
from rollout.sparse import Part, Selector, SparseAttention
from rollout.standard import NotStandardError, require_standard_config
from rollout.verified import VerifiedSelector

EVERYTHING = 1 << 20  # blocks: no sequence has as many


class DescribedSelector:
    """Picks by descriptors of the cached keys: Quest's and ReSA's bound ("minmax"), or MoBA's mean key ("mean").

    Of the bound we have one form, under both names: a list for a group of query heads, by their mean query, which holds
    the newest block and 16 in all at least, as ReSA has it. Quest as published keeps a list for each query head, of 3
    blocks at least, and leaves its first two layers dense (sparse.dense_layers).
    descriptors: as kernels.describe.empty_descriptors makes them, of the attached cache.
    Sources: arXiv 2406.10774, 2506.04108, 2502.13189.
    """

    def __init__(self, kind: Kind, choice: Choice, *, select_block: int) -> None:
        self.kind = kind
        self.choice = choice
        self.select_block = select_block
        self.share_of_cache = PLANES[kind] / (2 * select_block)
        self.descriptors = torch.empty(0)

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        """Room for descriptors of this cache."""
        self.descriptors = empty_descriptors(self.kind, storage, select_block=self.select_block)

    def release(self) -> None:
        """Keep no descriptors."""
        self.descriptors = torch.empty(0)

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Describe the blocks that these keys touch."""
        describe(
            self.kind,
            storage,
            self.descriptors,
            block_tables=block_tables,
            begins=begins,
            ends=ends,
            max_tokens=most,
        )

    def scores(self, layer: int, query: torch.Tensor, seqs: PagedSequences) -> torch.Tensor:
        """Of each block, [B, Hkv, NB] float32."""
        score = bound_scores if self.kind == "minmax" else mean_scores
        return score(query, self.descriptors[layer], seqs)

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        """The blocks of the highest scores."""
        return choose_blocks(self.scores(layer, query, seqs), seqs, self.choice, select_block=self.select_block)


class NewestSelector:
    """Picks sinks and the newest blocks, whatever is asked for: StreamingLLM (arXiv 2309.17453)."""

    share_of_cache = 0.0

    def __init__(self, choice: Choice, *, select_block: int) -> None:
        self.select_block = select_block
        self._choice = choice
        self._num_kv_heads = 0
        self._equal = torch.zeros(1)

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        """Nothing is kept of what is cached."""
        self._equal = self._equal.to(storage.device)
        self._num_kv_heads = storage.shape[4]

    def release(self) -> None:
        """Nothing was kept."""

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Places are known."""

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        """The newest blocks."""
        return newest_blocks(
            self._equal, seqs, self._choice, num_kv_heads=self._num_kv_heads, select_block=self.select_block
        )


class HeadsSelector:
    """Reads everything for retrieval heads, and sinks and the newest blocks for the others: DuoAttention.

    retrieval [layers, Hkv] bool. choice: of the others. Source: arXiv 2410.10819.
    """

    share_of_cache = 0.0

    def __init__(self, retrieval: torch.Tensor, choice: Choice, *, select_block: int) -> None:
        self.select_block = select_block
        newest = max(0, choice.budget_blocks - choice.sinks - 1)
        self._choice = replace(choice, max_blocks=EVERYTHING, budget_blocks=EVERYTHING, recent=newest, threshold=0.5)
        # a retrieval head's blocks pass the threshold, the others' only where they are always read
        self._scores = retrieval.float()[:, None, :, None]

    def attach(self, storage: torch.Tensor, *, num_texts: int, num_rows: int, table_width: int) -> None:
        """Nothing is kept."""
        self._scores = self._scores.to(storage.device)

    def release(self) -> None:
        """Nothing was kept."""

    def describe(
        self, storage: torch.Tensor, *, block_tables: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int
    ) -> None:
        """Places are known."""

    def select(
        self, layer: int, query: torch.Tensor, positions: torch.Tensor, seqs: PagedSequences, kept: torch.Tensor
    ) -> BlockLists:
        """All blocks, or the newest, by head."""
        num_blocks = num_selection_blocks(seqs, self.select_block)
        scores = self._scores[layer].expand(len(kept), -1, num_blocks)
        return choose_blocks(scores, seqs, self._choice, select_block=self.select_block)


def require_sparse(config: SparseConfig, model_config: PretrainedConfig) -> None:
    """Hold what is configured against the policy's transformers config, before its weights are read.

    Raises ConfigError, and PreflightError where what sparse.gate names is missing or another policy's, and for a
    policy whose config says that it needs its own module to decode.
    """
    try:
        require_standard_config(model_config)
    except NotStandardError as error:
        raise PreflightError(
            f"{model_config.model_type!r} decodes through its own module, which attends to everything, because {error};"
            " set sparse.mode=off"
        ) from error
    path, found = Path(config.gate).expanduser(), runs(config, kv_shape(model_config)[0])
    if config.learn and all(alike.selector != "gate" for _, alike in found):
        raise ConfigError("sparse.learn=True: no layer of the policy goes by gates; set false, or fewer dense layers")
    for _, alike in found:
        if alike.selector == "duo":
            retrieval_heads(path, model_config, above=0.5)
        if alike.selector == "gate":
            trained = read_gate_config(path, model_config).select_block
            if trained != alike.block_tokens:
                raise ConfigError(
                    f"sparse.gate={config.gate} scores blocks of {trained} tokens, not of {alike.block_tokens};"
                    f" set sparse.select_block={trained}"
                )


def make_sparse(config: SparseConfig, policy: PreTrainedModel) -> SparseAttention:
    """A policy's sparse attention as its config has it. Raises ConfigError, PreflightError."""
    require_sparse(config, policy.config)
    alike = runs(config, kv_shape(policy.config)[0])
    gates = None
    if any(each.selector == "gate" for _, each in alike):
        gates = read_gates(Path(config.gate).expanduser(), policy.config).to(policy.device, policy.dtype)
        gates.requires_grad_(False)
    return SparseAttention(
        [Part(layers, _selector(each, policy, layers, gates)) for layers, each in alike],
        lowbit=None if config.weights == "policy" else LowBitPolicy(policy, config.weights),
        sampler=_sampler(alike) if config.learn else None,
    )


def _sampler(alike: Sequence[tuple[range, SparseConfig]]) -> GateSampler:
    """Of the layers that read what gates pick, by the least budget."""
    gated = [(layers, each) for layers, each in alike if each.selector == "gate"]
    return GateSampler(
        [layer for layers, _ in gated for layer in layers],
        select_block=gated[0][1].block_tokens,
        budget_blocks=min(choice_of(each).budget_blocks for _, each in gated),
    )


def choice_of(config: SparseConfig) -> Choice:
    """How many blocks are read, and which in any case."""
    block = config.block_tokens
    budget = max(config.min_blocks, config.budget_tokens // block)
    recent = config.recent_blocks
    # a forward of a few drafted tokens touches more than its budget may be
    room = max(budget, config.sinks + recent + most_touched(1 + INNER_DEPTH, block))
    return Choice(
        max_blocks=EVERYTHING if config.budget_share else room,
        budget_blocks=budget,
        share=config.budget_share,
        threshold=config.threshold or None,
        sinks=config.sinks,
        recent=recent,
    )


def share_of_cache(config: SparseConfig, num_layers: int, *, itemsize: int) -> float:
    """What the selectors that are configured keep of each block, relative to its keys and values; 0 where all are read.

    Of gates as wide as the policy's heads. itemsize: of the policy's dtype.
    """
    gate = 1 if config.descriptors == "policy" else 1 / itemsize
    planes = {"quest": PLANES["minmax"], "resa": PLANES["minmax"], "mean": PLANES["mean"], "gate": gate}
    if config.mode == "off":
        return 0.0
    alike = runs(config, num_layers)
    kept = sum(len(layers) * planes.get(each.selector, 0) / (2 * each.block_tokens) for layers, each in alike)
    return kept / num_layers


def _selector(config: SparseConfig, policy: PreTrainedModel, layers: range, gates: Gates | None) -> Selector:
    """Of these layers. gates: of all."""
    choice, block = choice_of(config), config.block_tokens
    match config.selector:
        case "quest" | "resa":
            return DescribedSelector("minmax", choice, select_block=block)
        case "mean":
            return DescribedSelector("mean", choice, select_block=block)
        case "streaming":
            return NewestSelector(choice, select_block=block)
        case "verified":
            return VerifiedSelector(choice, select_block=block)
        case "duo":
            heads = retrieval_heads(Path(config.gate).expanduser(), policy.config, above=config.threshold or 0.5)
            return HeadsSelector(heads[layers.start : layers.stop], choice, select_block=block)
        case "gate":
            assert gates is not None
            if config.descriptors == "policy":
                return GateSelector(gates, choice, layers=layers)
            require_fp8(policy.device, key="sparse.descriptors", instead="policy")
            return GateSelector(gates, choice, layers=layers, dtype=torch.float8_e4m3fn)


def retrieval_heads(path: Path, model_config: PretrainedConfig, *, above: float) -> torch.Tensor:
    """The key heads that must see everything, [layers, Hkv] bool, by a file as DuoAttention publishes it.

    Lines of layers, values of heads between tabs. Raises PreflightError for another file.
    """
    shape = kv_shape(model_config)[:2]
    try:
        values = [
            [float(value) for value in line.split("\t")] for line in path.read_text().splitlines() if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"sparse.gate={path} is no full_attention_heads.tsv ({error}); name the one of this policy"
        ) from error
    if [len(values), *{len(line) for line in values}] != [*shape]:
        raise PreflightError(
            f"sparse.gate={path} is not of {shape[0]} layers of {shape[1]} key heads; name the one of this policy"
        )
    scores = torch.tensor(values)
    if not scores.isfinite().all():
        raise PreflightError(f"sparse.gate={path} holds values that are not finite; name the one of this policy")
    return scores > above

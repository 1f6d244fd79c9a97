"""Drafting with a trained EAGLE head on the device, from what verification left behind."""

from collections.abc import Sequence
from typing import Any

import torch

from drafter.eagle import EagleConfig
from drafter.kv_rings import BLOCK_SIZE, empty_rings
from drafter.rings import MIN_POSITIONS, FeatureRings
from drafter.served_head import ServedHead
from drafter.types import Begun, Drafts, Rows, Strategy, Texts
from kernels.attention import paged_attention, paged_sequences
from kernels.cache import rope_and_write
from kernels.cycle import MAX_NODES
from kernels.eagle import LOG2_E, Candidates, CatchUp, KvRings, catch_up, grow, join_inputs, num_candidates, rank
from kernels.linear import gated_linear, linear

# Positions caught up with by a call: what other cycles commit in between, up to here, costs the head no context. A
# product of 128 tokens costs about what reading its weights does, so few rows can afford more.
CATCH_UP_TOKENS, MIN_CATCH_UP = 128, 8


class EagleDrafter:
    """drafter.types.ResidentDrafter: chains and trees from an EAGLE-3 head, whose weights are published to it.

    Reads the target's hidden states from rings, which the engine is to attach first; keeps keys and values of its own,
    a window's worth for each running text, so that it can begin anywhere in a text without a prefill. Until weights
    are published, and after they are withdrawn, it proposes nothing.

    embedding [V, H]: the policy's own, read where it is. temperature: the one the run samples at.
    """

    def __init__(
        self,
        config: EagleConfig,
        *,
        embedding: torch.Tensor,
        rings: FeatureRings,
        temperature: float,
        device: torch.device,
    ) -> None:
        self.config = config
        self.version: int | None = None  # of the weights served, None where there are none
        self._embedding = embedding.detach()
        self._features = rings
        self._device = device
        with torch.inference_mode(False):
            self._head = ServedHead.empty(config, embedding.dtype, device)
            self._transform = torch.empty(2, dtype=torch.float32, device=device)
        self.set_temperature(temperature)
        self._texts: Texts | None = None
        self._kv: KvRings | None = None
        self._cos = self._sin = torch.empty(0)
        self._multiples = self._repeats = torch.empty(0)  # [n, i]: n * i, and n; n queries or nodes a row

    def set_temperature(self, temperature: float) -> None:
        """Draft for sampling at this temperature from now on, 0 for greedy; captured graphs stay valid."""
        self._transform[:1].fill_(LOG2_E / (temperature or 1.0))
        self._transform[1:].fill_(float(temperature > 0))

    def publish(self, state: dict[str, torch.Tensor], version: int) -> None:
        """Serve a copy of these weights, EagleHead's by name, from the next draft on; captured graphs stay valid.

        To be called between cycles, on their stream. Raises ValueError for missing, unknown or misshapen tensors,
        with the weights before still served.
        """
        self._head.load(state, self.config)
        self.version = version

    def withdraw(self) -> None:
        """Propose nothing until the next weights are published."""
        self._head.published.fill_(0)
        self.version = None

    def attach(self, texts: Texts) -> None:
        """Draft from these texts from now on; all of them are free. The rings are attached to them already."""
        num_slots = self._features.num_slots
        assert len(self._features.rings.slot_of) == len(texts.lengths), "attach the reader first"
        self._texts = texts
        # written in inference mode and outside of it
        with torch.inference_mode(False):
            if self._kv is None or len(self._kv.origins) != num_slots + 1:
                self._kv = empty_rings(self.config, num_slots, self._embedding.dtype, self._device)
                counts = torch.arange(MAX_NODES + 1, dtype=torch.int32, device=self._device)
                self._multiples = counts[:, None] * torch.arange(num_slots + 2, dtype=torch.int32, device=self._device)
                self._repeats = counts[:, None].repeat(1, num_slots + 2)
            # nodes may be drafted past the last token that a text has room for
            num_positions = texts.tokens.shape[1] + MAX_NODES
            if len(self._cos) != num_positions:
                self._cos, self._sin = _rotary(self.config, num_positions, self._embedding)
        self._kv.begun.zero_()

    def begin(self, begun: Sequence[Begun], free_texts: Sequence[int]) -> list[list[int]]:
        """Sequences start to write texts; what the head knows of them comes with the first verification."""
        for each in begun:
            self._features.name(each.text, each.prompt_id)
        return [[] for _ in begun]

    def refresh(self, strategy: Strategy, *, grown: int) -> None:
        """Nothing: the head reads what verification leaves, in its own graph."""

    def propose(self, texts: Texts, rows: Rows, strategy: Strategy, out: Drafts) -> None:
        """Write a draft for each of the first B rows. Captured in a CUDA graph: no host synchronisation."""
        assert texts is self._texts and self._kv is not None, "attach the texts first"
        num_rows, num_nodes = out.token_ids.shape
        top_k = strategy.top_k
        # levels that cannot add a node are not stepped: a chain's past its last, a tree's past num_verify
        levels = min(strategy.depth, num_nodes)
        assert (levels - 1) * top_k <= MAX_NODES, (
            f"{strategy} steps more nodes than the {MAX_NODES} a mask has bits for"
        )
        ahead = catch_up(
            texts,
            rows,
            self._features.rings,
            self._kv,
            self._head.published,
            num_rows=num_rows,
            num_positions=positions_caught_up(num_rows, levels),
            levels=levels,
            top_k=top_k,
        )
        candidates = self._candidates(num_rows, levels, top_k)
        outputs = self._step_known(ahead)
        beams = None
        for level in range(levels):
            if beams is not None:
                outputs = self._step_nodes(ahead, level, beams.token_ids, beams.rows, beams.ancestors, outputs, top_k)
            beams = grow(
                linear(outputs, self._head.lm_head, norm=self._head.norm),
                rows.keys,
                ahead.sample_positions[level],
                self._head.vocabulary,
                self._transform,
                beams,
                candidates,
                level=level,
                top_k=top_k,
            )
        rank(candidates, ahead.drafting, out)

    def finish(self, text: int, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The sequence that wrote this text is complete; nothing is remembered of it here."""

    def release(self, texts: Sequence[int]) -> None:
        """These texts are free again: the rings know."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are the learner's to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""

    def _step_known(self, ahead: CatchUp) -> torch.Tensor:
        """Cache the known positions, and step the newest of each row. Returns [B, H]."""
        num_rows = len(ahead.drafting)
        states = linear(ahead.aux, self._head.fc)
        query, states = self._project(ahead.token_ids, states, None, ahead.positions, ahead.slots)
        # a view of every row's last
        query, states = (x.unflatten(0, (num_rows, -1))[:, -1] for x in (query, states))
        return self._attend(ahead, 0, query, states, ahead.slots[:num_rows], top_k=1)

    def _step_nodes(
        self,
        ahead: CatchUp,
        level: int,
        token_ids: torch.Tensor,
        parents: torch.Tensor,
        ancestors: torch.Tensor,
        outputs: torch.Tensor,
        top_k: int,
    ) -> torch.Tensor:
        """Step a level's nodes from their parents' outputs. Returns [B * k, H]."""
        slots = ahead.node_slots[level - 1]
        # a chain's parents are the rows before, in order
        rows = parents if top_k > 1 else None
        query, states = self._project(token_ids, outputs, rows, ahead.node_positions[level - 1], slots)
        return self._attend(ahead, level, query, states, slots, top_k=top_k, ancestors=ancestors)

    def _project(
        self,
        token_ids: torch.Tensor,
        states: torch.Tensor,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, Hq, D] and states [T, H] of tokens whose keys and values are cached on the way."""
        assert self._kv is not None
        head, config = self._head, self.config
        inputs, states = join_inputs(
            token_ids, self._embedding, states, rows, embed_norm=head.embed_norm, state_norm=head.state_norm
        )
        key_cache, value_cache = self._kv.storage.unbind()
        query = rope_and_write(
            linear(inputs, head.qkv),
            positions,
            self._cos,
            self._sin,
            slots,
            key_cache,
            value_cache,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            q_norm=None,
            k_norm=None,
            eps=config.rms_norm_eps,
        )
        return query, states

    def _attend(
        self,
        ahead: CatchUp,
        level: int,
        query: torch.Tensor,
        states: torch.Tensor,
        slots: torch.Tensor,
        *,
        top_k: int,
        ancestors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rest of a step: attention to the ring and the nodes before, and the MLP. Returns outputs [T, H]."""
        assert self._kv is not None
        head, config = self._head, self.config
        num_rows, contexts = len(ahead.drafting), ahead.contexts[level]
        is_tree = top_k > 1
        # a captured step must be right for any context; an eager one on a CPU is dearer the wider it looks
        widest = self._kv.blocks_each * BLOCK_SIZE - top_k
        seqs = paged_sequences(
            cu_seqlens_q=self._multiples[top_k, : num_rows + 1],
            max_seqlen_q=top_k,
            context_lens=contexts,
            max_context=int(contexts.max()) if self._device.type == "cpu" else widest,
            block_tables=ahead.block_tables,
            slots=slots,
            block_size=BLOCK_SIZE,
            ancestors=ancestors if is_tree else None,
            num_drafted=self._repeats[level * top_k, :num_rows] if is_tree else None,
            positions=ahead.node_indices[level - 1] if is_tree else None,
        )
        key_cache, value_cache = self._kv.storage.unbind()
        attended = paged_attention(
            query,
            key_cache,
            value_cache,
            seqs,
            scale=config.head_dim**-0.5,
            sliding_window=config.window,
            softcap=None,
        )
        states = linear(attended.flatten(1), head.output, residual=states)
        gate, up = head.gate_up.chunk(2)
        return linear(gated_linear(states, gate, up, norm=head.mlp_norm), head.down, residual=states)

    def _candidates(self, num_rows: int, levels: int, top_k: int) -> Candidates:
        count = num_candidates(levels, top_k)
        return Candidates(
            keys=torch.empty(num_rows, count, dtype=torch.int64, device=self._device),
            token_ids=torch.empty(num_rows, count, dtype=torch.int32, device=self._device),
            parents=torch.empty(num_rows, count, dtype=torch.int32, device=self._device),
        )


def positions_caught_up(num_rows: int, levels: int) -> int:
    """How many known positions a call steps in each row: more than a draft of so many levels can have committed."""
    return max(levels + 1, MIN_CATCH_UP, min(MIN_POSITIONS, CATCH_UP_TOKENS // num_rows))


def _rotary(config: EagleConfig, num_positions: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, [P, D] each, in the policy's dtype."""
    exponents = torch.arange(0, config.head_dim, 2, device=like.device, dtype=torch.float32) / config.head_dim
    positions = torch.arange(num_positions, device=like.device, dtype=torch.float32)
    angles = (positions[:, None] * config.rope_theta**-exponents).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

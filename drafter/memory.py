"""How much memory a learned drafter, or gates, take on their policy's device, found out without allocating any."""

from dataclasses import dataclass
from math import prod

from configs.schema import DrafterConfig
from drafter.eagle import EagleConfig
from drafter.gate import GateConfig
from drafter.kv_rings import cache_bytes
from drafter.layouts import exported_shapes
from drafter.publish import NUM_HEADS
from drafter.rings import ring_bytes

FLOAT32_BYTES = 4
# What the graphs of a training step keep for each number of a position that a level's forward leaves, and for each of
# its logits: measured on one H100 with SmolLM2's head and vocabularies of 1024 and 8192 (tests/drafter/test_memory.py).
KEPT_BYTES, LOGIT_BYTES = 6.4, 10.4
MAPS = ("d2t", "t2d")  # int64 and bool, of no gradient


@dataclass(frozen=True, slots=True)
class GateBytes:
    """One worker's gates.

    weights: of those served, in the policy's dtype, and of the trained copy, in float32, if they learn. training:
    gradients and the optimiser's moments, made by the first lesson. samples: what they learn from.
    """

    weights: int = 0
    training: int = 0
    samples: int = 0


@dataclass(frozen=True, slots=True)
class DrafterBytes:
    """One worker's.

    weights: of the trained copy, in float32, and of the heads served, served before, judged and drafted with, in the
    policy's dtype. training: gradients, the optimiser's moments and the weights that failures go back to. rings:
    hidden states of the texts that run. cache: the head's keys and values of them. buffer: windows to learn from.
    graphs: what a training step computes with, kept from the first on. checkpoint: copies of what one holds, while it
    is being fetched from a GPU.
    """

    weights: int
    training: int
    rings: int
    cache: int
    buffer: int
    graphs: int
    checkpoint: int

    @property
    def total(self) -> int:
        parts = (self.weights, self.training, self.rings, self.cache, self.buffer, self.graphs, self.checkpoint)
        return sum(parts)


NO_DRAFTER = DrafterBytes(0, 0, 0, 0, 0, 0, 0)


def learned_gate_bytes(shape: GateConfig, *, itemsize: int, samples: int) -> GateBytes:
    """Of gates of this shape that learn. itemsize: of the policy's dtype."""
    return GateBytes(
        weights=shape.num_parameters * (itemsize + FLOAT32_BYTES),
        training=shape.num_parameters * FLOAT32_BYTES * 3,
        samples=samples,
    )


def drafter_bytes(
    shape: EagleConfig, config: DrafterConfig, *, num_rows: int, max_nodes: int, itemsize: int, on_gpu: bool
) -> DrafterBytes:
    """A drafter's of this shape.

    num_rows: texts that run at a time, at most; itemsize: of the policy's dtype.
    """
    shapes = exported_shapes(shape, layout="eagle3")
    parameters = sum(prod(sizes) for name, sizes in shapes.items() if name not in MAPS)
    maps = 8 * shape.draft_vocab + shape.vocab_size
    return DrafterBytes(
        weights=parameters * (FLOAT32_BYTES + (NUM_HEADS + 1) * itemsize) + (NUM_HEADS + 1) * maps,
        # what all agreed on and two moments, which a checkpoint may bring and the next one keeps; gradients
        training=parameters * FLOAT32_BYTES * (4 if config.train else 3),
        rings=ring_bytes(
            hidden_size=shape.hidden_size,
            window=config.feature_window,
            max_nodes=max_nodes,
            num_slots=num_rows,
            itemsize=itemsize,
        ),
        cache=cache_bytes(shape, num_slots=num_rows, itemsize=itemsize),
        buffer=config.buffer_mb << 20 if config.train else 0,
        graphs=_graph_bytes(shape, config) if config.train and on_gpu else 0,
        # weights and two moments, and the heads served and served before
        checkpoint=parameters * (3 * FLOAT32_BYTES + 2 * itemsize) if config.train and on_gpu else 0,
    )


def _graph_bytes(shape: EagleConfig, config: DrafterConfig) -> int:
    """Of a training step's graphs, whose batches have config.batch_tokens positions and config.unroll levels."""
    left = 7 * shape.hidden_size + 3 * shape.intermediate_size
    left += (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    numbers = KEPT_BYTES * left + LOGIT_BYTES * shape.draft_vocab
    return round(config.batch_tokens * config.unroll * numbers)

"""How much memory a learned drafter takes on its policy's device, found out without allocating any."""

from dataclasses import dataclass
from math import prod

from configs.schema import DrafterConfig
from drafter.eagle import EagleConfig
from drafter.kv_rings import cache_bytes
from drafter.layouts import exported_shapes
from drafter.publish import NUM_HEADS
from drafter.rings import ring_bytes

FLOAT32_BYTES = 4
MAPS = ("d2t", "t2d")  # int64 and bool, of no gradient


@dataclass(frozen=True, slots=True)
class DrafterBytes:
    """One worker's.

    weights: of the trained copy, in float32, and of the heads served, served before, judged and drafted with, in the
    policy's dtype. training: gradients, the optimiser's moments and the weights that failures go back to. rings:
    hidden states of the texts that run. cache: the head's keys and values of them. buffer: windows to learn from.
    """

    weights: int
    training: int
    rings: int
    cache: int
    buffer: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.rings + self.cache + self.buffer


def drafter_bytes(
    shape: EagleConfig, config: DrafterConfig, *, num_rows: int, max_nodes: int, itemsize: int
) -> DrafterBytes:
    """A drafter's of this shape. num_rows: texts that run at a time, at most; itemsize: of the policy's dtype."""
    shapes = exported_shapes(shape, layout="eagle3")
    parameters = sum(prod(sizes) for name, sizes in shapes.items() if name not in MAPS)
    maps = 8 * shape.draft_vocab + shape.vocab_size
    return DrafterBytes(
        weights=parameters * (FLOAT32_BYTES + (NUM_HEADS + 1) * itemsize) + (NUM_HEADS + 1) * maps,
        training=parameters * FLOAT32_BYTES * (4 if config.train else 1),
        rings=ring_bytes(
            hidden_size=shape.hidden_size,
            window=config.feature_window,
            max_nodes=max_nodes,
            num_slots=num_rows,
            itemsize=itemsize,
        ),
        cache=cache_bytes(shape, num_slots=num_rows, itemsize=itemsize),
        buffer=config.buffer_mb << 20 if config.train else 0,
    )

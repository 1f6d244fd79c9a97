"""The drafter's memory: what the plan counts is what is allocated, and what is missing is said by name."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from configs.errors import ResourceError
from configs.schema import DrafterConfig
from drafter.allocation import allocating
from drafter.buffer import FeatureBuffer
from drafter.eagle import EagleConfig, EagleHead
from drafter.eagle_serving import EagleDrafter
from drafter.features import FeatureBatch
from drafter.learner import Learner
from drafter.memory import DrafterBytes, drafter_bytes
from drafter.rings import FeatureRings
from drafter.types import Texts

SHAPE = EagleConfig(
    hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=400, draft_vocab=300,
    window=48, rms_norm_eps=1e-5, rope_theta=10_000.0, max_position_embeddings=256, aux_layers=(0, 1, 2),
)  # fmt: skip
CONFIG = DrafterConfig(unroll=2, batch_tokens=64, feature_window=16, buffer_mb=2)
ROWS, NODES = 5, 6
CPU = torch.device("cpu")


class Parts:
    """A drafter's parts, as a run has them, in bfloat16."""

    def __init__(self) -> None:
        self.embedding, self.lm_head = torch.randn(2, SHAPE.vocab_size, SHAPE.hidden_size, dtype=torch.bfloat16)
        self.buffer = FeatureBuffer(max_bytes=CONFIG.buffer_mb << 20, temperature=1.0)
        self.rings = FeatureRings(
            aux_layers=SHAPE.aux_layers,
            hidden_size=SHAPE.hidden_size,
            window=CONFIG.feature_window,
            max_nodes=NODES,
            dtype=torch.bfloat16,
            device=CPU,
            sink=self.buffer,
        )
        self.drafter = EagleDrafter(SHAPE, embedding=self.embedding, rings=self.rings, temperature=1.0, device=CPU)
        self.learner = Learner(
            EagleHead(SHAPE),
            drafter=self.drafter,
            buffer=self.buffer,
            embedding=self.embedding,
            lm_head=self.lm_head,
            config=CONFIG,
            dtype=torch.bfloat16,
        )

        self.texts = Texts(*(torch.zeros(shape, dtype=torch.int32) for shape in ((9, 128), (9,), (9,))))


def planned() -> DrafterBytes:
    return drafter_bytes(SHAPE, CONFIG, num_rows=ROWS, max_nodes=NODES, itemsize=2, on_gpu=False)


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_what_is_planned_is_what_the_parts_take() -> None:
    parts, plan = Parts(), planned()
    parts.rings.attach(parts.texts, num_rows=ROWS)
    parts.drafter.attach(parts.texts)
    kept = parts.rings.rings
    assert plan.rings == size((kept.states, kept.alt_ids))
    assert parts.drafter._kv is not None and plan.cache == parts.drafter._kv.storage.nbytes
    learner, served = parts.learner, parts.drafter._head
    trainer, publisher = learner._trainer, learner._publisher
    heads = [trainer.head, publisher._candidate, publisher._served, publisher._last_good]
    weights = sum(size(head.state_dict().values()) for head in heads)
    weights += size(served.by_name(SHAPE).values()) + served.vocabulary.nbytes
    assert plan.weights == pytest.approx(weights, rel=0.02)
    learner.begin(torch.ones(SHAPE.vocab_size, dtype=torch.int64))
    count = 48
    hidden = torch.randn(count, SHAPE.hidden_size)
    trainer.step(
        FeatureBatch(
            token_ids=torch.ones(count, dtype=torch.int64),
            next_ids=torch.ones(count, dtype=torch.int64),
            positions=torch.arange(count),
            aux=hidden.repeat(1, 3),
            hidden=hidden,
            cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
            versions=torch.zeros(1, dtype=torch.int64),
            alt_ids=torch.full((count,), -1),
            alt_hidden=hidden,
            temperature=1.0,
        )
    )
    gradients = [parameter.grad for parameter in trainer.head.parameters() if parameter.grad is not None]
    moments = [state[name] for state in trainer.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.training == size([*gradients, *moments, *learner._base.values()])
    assert plan.buffer == CONFIG.buffer_mb << 20
    assert plan.total == plan.weights + plan.training + plan.rings + plan.cache + plan.buffer


@pytest.mark.parametrize(("draft_vocab", "measured_mib"), [(1024, 1122), (8192, 2282)])
def test_a_gpus_training_graphs_are_counted_as_they_were_measured(draft_vocab: int, measured_mib: int) -> None:
    """SmolLM2's head on an H100, 4096 positions and 4 levels: what graphed steps kept beyond eager ones."""
    shape = replace(
        SHAPE, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64,
        vocab_size=49152, draft_vocab=draft_vocab,
    )  # fmt: skip
    config = DrafterConfig(unroll=4, batch_tokens=4096)
    sizes = {"num_rows": ROWS, "max_nodes": NODES, "itemsize": 2}
    with_graphs, without = (drafter_bytes(shape, config, **sizes, on_gpu=on_gpu) for on_gpu in (True, False))
    assert with_graphs.total - without.total == with_graphs.graphs + with_graphs.checkpoint
    assert with_graphs.graphs == pytest.approx(measured_mib << 20, rel=0.05)


def test_a_drafter_that_does_not_learn_needs_neither_gradients_nor_features() -> None:
    frozen = drafter_bytes(
        SHAPE, replace(CONFIG, train=False), num_rows=ROWS, max_nodes=NODES, itemsize=2, on_gpu=False
    )
    assert frozen.buffer == 0 and frozen.training * 4 == planned().training * 3


def refuse(*_: object, **__: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_memory_that_is_not_there_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="rings of hidden states") as error:
        patch.setattr(torch, "zeros", refuse)
        parts.rings.attach(parts.texts, num_rows=ROWS)
    assert str(error.value).endswith("GB); lower drafter.feature_window or rollout.max_running")
    parts.rings.attach(parts.texts, num_rows=ROWS)
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="the drafter's KV cache") as error:
        patch.setattr(torch, "zeros", refuse)
        parts.drafter.attach(parts.texts)
    assert str(error.value).endswith("GB); lower drafter.window or rollout.max_running")


def test_an_allocation_that_fails_says_for_what_how_much_and_what_to_lower() -> None:
    said = r"no memory for a thing \(3\.00 GB\); lower it"
    with pytest.raises(ResourceError, match=said), allocating("a thing", 3 * 10**9, "lower it"):
        torch.empty(1 << 50)  # more than any machine has
    with pytest.raises(ResourceError, match=said), allocating("a thing", 3 * 10**9, "lower it"):
        refuse()
    with pytest.raises(RuntimeError, match="another"), allocating("a thing", 1, "lower it"):
        raise RuntimeError("another mistake")

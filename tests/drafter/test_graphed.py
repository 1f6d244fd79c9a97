"""Steps of a fixed shape: what a graph would replay does what an eager step does, and when it is made anew."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import DrafterConfig
from drafter import graphed, local_attention
from drafter import trainer as trainer_module
from drafter.eagle import EagleConfig, EagleHead
from drafter.features import FeatureBatch
from drafter.graphed import FixedBatch
from drafter.trainer import DrafterTrainer

VOCAB, SIZE, TOKENS, LONGEST = 48, 16, 40, 9
SHAPE = EagleConfig(
    hidden_size=SIZE, intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB, draft_vocab=40,
    window=6, rms_norm_eps=1e-5, rope_theta=10_000.0, max_position_embeddings=256, aux_layers=(0, 1, 2),
)  # fmt: skip
CONFIG = DrafterConfig(unroll=3, lr=3e-3, batch_tokens=TOKENS, feature_window=LONGEST)
CPU = torch.device("cpu")


@dataclass
class Graph:
    """Stands for a CUDA graph."""

    replay: Callable[[], None]


class Captures:
    """Stands for CUDA's: a capture runs nothing but what warms up, a replay runs what was captured."""

    def __init__(self) -> None:
        self.replays: list[int] = []  # of each capture
        self.fails_at = -1

    def __call__(self, launch: Callable[[], None], device: torch.device, *, warm_ups: int = 0) -> graphed.Replayable:
        for _ in range(warm_ups):
            launch()
        index = len(self.replays)
        if index == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.replays.append(0)

        def replay() -> None:
            self.replays[index] += 1
            launch()

        return Graph(replay)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(graphed, "captured", found)
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_attention, "BLOCK", 4)


def batch_of(lengths: Sequence[int], *, seed: int = 0, rejections: bool = True) -> FeatureBatch:
    draw, total = torch.Generator().manual_seed(seed), sum(lengths)

    def tokens() -> torch.Tensor:
        return torch.randint(VOCAB, (total,), generator=draw)

    def states(width: int) -> torch.Tensor:
        return torch.randn(total, width, generator=draw)

    alt_ids = torch.where((tokens() % 3 == 0) & torch.tensor(rejections), tokens(), -1)
    return FeatureBatch(
        token_ids=tokens(),
        next_ids=tokens(),
        positions=torch.cat([torch.arange(length) + 7 * index for index, length in enumerate(lengths)]),
        aux=states(3 * SIZE),
        hidden=states(SIZE),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        versions=torch.zeros(len(lengths), dtype=torch.int64),
        alt_ids=alt_ids,
        alt_hidden=states(SIZE),
        temperature=1.0,
    )


def trainer(*, graphs: bool, loss: Any = "lk") -> DrafterTrainer:
    embedding, lm_head = torch.randn(2, VOCAB, SIZE, generator=torch.Generator().manual_seed(5))
    config = replace(CONFIG, loss=loss)
    made = DrafterTrainer(EagleHead(SHAPE, seed=1), embedding=embedding, lm_head=lm_head, config=config)
    made._graphs = made._graphed() if graphs else None
    return made


def gradients(trained: DrafterTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in trained.head.named_parameters() if parameter.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=atol, msg=f"{name} differs")


@pytest.mark.parametrize("rejections", [False, True])
@pytest.mark.parametrize("lengths", [(9,), (3, 9, 1, 8), (1,) * 20, (8, 8, 8, 8, 8), (2, 1)])
def test_a_fixed_shape_changes_neither_loss_nor_gradients(lengths: Sequence[int], rejections: bool) -> None:
    batch = batch_of(lengths, rejections=rejections)
    fixed = FixedBatch(batch, num_tokens=TOKENS, device=CPU)
    fixed.fill(batch_of([7, 9, 5], seed=3))
    fixed.fill(batch)  # nothing is left of the batch before
    plain, padded = trainer(graphs=False), trainer(graphs=False)
    expected = plain._gradients(batch, longest=max(lengths), rejected=rejections)
    found = padded._gradients(fixed.batch, longest=LONGEST, rejected=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_close(gradients(padded), gradients(plain))


def test_graphs_train_as_eager_steps_do(captures: Captures) -> None:
    eager, replayed = trainer(graphs=False), trainer(graphs=True)
    for step, lengths in enumerate([(9, 9), (3, 2, 8), (9, 9, 9, 9, 4), (1,) * 30, (6,)]):
        batch = batch_of(lengths, seed=step, rejections=step != 2)
        expected, found = eager.step(batch), replayed.step(batch)
        assert found.applied
        assert found.num_tokens == sum(lengths)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert found.acceptance == pytest.approx(expected.acceptance, rel=1e-4)
    assert captures.replays == [5, 4], "all measured by one graph; the first update warms up"
    # Adam turns a gradient of 1e-9 into a step as long as any: what differs is where gradients are all rounding
    assert_close(replayed.head.state_dict(), eager.head.state_dict(), atol=1e-4)
    assert replayed.steps == eager.steps == 5


def test_a_batch_that_is_not_finite_is_measured_and_changes_nothing(captures: Captures) -> None:
    trained = trainer(graphs=True)
    bad = batch_of([9, 5])
    bad.hidden[6] = torch.nan
    for batch in (batch_of([9, 5]), batch_of([4, 4])):
        assert trained.step(batch).applied
        before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        assert not trained.step(bad).applied
        assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert captures.replays == [4, 1]
    assert trained.step(batch_of([9, 5])).applied


def test_a_saved_state_is_taken_up_where_the_graphs_read_it(captures: Captures) -> None:
    source, trained, fresh = trainer(graphs=False), trainer(graphs=True), trainer(graphs=True)
    nothing = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    for seed in range(3):
        source.step(batch_of([9, 5], seed=seed))
        trained.step(batch_of([8, 8], seed=seed))
    held = [own[moment] for own in trained.adam.state.values() for moment in ("step", "exp_avg", "exp_avg_sq")]
    places = [tensor.data_ptr() for tensor in held]
    for state, other in ((source.state_dict(), source), (nothing, fresh)):
        trained.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        trained.step(batch_of([6, 7], seed=9))
        other.step(batch_of([6, 7], seed=9))
        assert_close(trained.state_dict(), other.state_dict(), atol=1e-4)
    assert [tensor.data_ptr() for tensor in held] == places
    assert captures.replays == [5, 4, 1, 0], "fresh, and fresh alone, has made its own"


class NothingWaits(TorchDispatchMode):
    """Raises where the host would wait for the device, or what is launched would depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITS), f"{name} waits"
        if name in ("index", "index_put_"):
            assert all(index is None or index.dtype is not torch.bool for index in args[1]), (
                "a mask's length is waited for"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["lk", "kl", "ce", "tv"])
def test_what_is_captured_asks_the_host_nothing(loss: Any) -> None:
    batch = batch_of([7, 9, 5])
    fixed = FixedBatch(batch, num_tokens=TOKENS, device=CPU)
    fixed.fill(batch)
    trained = trainer(graphs=False, loss=loss)
    with NothingWaits():
        trained._gradients(fixed.batch, longest=LONGEST, rejected=True)
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        trained._gradients(batch, **trainer_module._shape(batch))


def test_graphs_are_made_anew_where_gradients_were_dropped(captures: Captures) -> None:
    trained = trainer(graphs=True)
    trained.step(batch_of([9, 5]))
    trained.step(batch_of([9, 5]))
    trained.head.zero_grad(set_to_none=True)
    assert trained.step(batch_of([9, 5])).applied
    assert captures.replays == [2, 1, 1, 0]


def test_graphs_are_made_anew_where_the_policy_has_moved(captures: Captures) -> None:
    eager, trained = trainer(graphs=False), trainer(graphs=True)
    batches = [batch_of([9, 5], seed=seed) for seed in range(3)]
    trained.step(batches[0])
    trained.step(batches[1])
    for each in (eager, trained):
        each.lm_head = each.lm_head * 2
    eager.step(batches[0])
    eager.load_state_dict(trained.state_dict())
    found, expected = trained.step(batches[2]), eager.step(batches[2])
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert captures.replays == [2, 1, 1, 0]


def test_what_does_not_fit_is_stepped_eagerly_and_spoils_no_graph(captures: Captures) -> None:
    trained = trainer(graphs=True)
    assert trained.step(batch_of([9, 9])).applied
    assert trained.step(batch_of([LONGEST + 1])).applied
    assert trained.step(batch_of([9] * 5)).applied  # more than batch_tokens
    assert captures.replays == [1, 0]
    eager = trainer(graphs=False)
    eager.load_state_dict(trained.state_dict())
    assert trained.step(batch_of([4])).loss == pytest.approx(eager.step(batch_of([4])).loss, rel=1e-4)
    assert captures.replays == [2, 1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_capture_that_fails_is_said_once_and_steps_go_on_eagerly(
    captures: Captures, which: int, caplog: pytest.LogCaptureFixture
) -> None:
    captures.fails_at = which
    eager, trained = trainer(graphs=False), trainer(graphs=True)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            batch = batch_of([9, 5], seed=seed)
            assert trained.step(batch).loss == pytest.approx(eager.step(batch).loss, rel=1e-4)
    (record,) = caplog.records
    assert "(operation not permitted when stream is capturing)" in record.getMessage()
    assert captures.replays == [1][:which]

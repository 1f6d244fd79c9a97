"""Weights arrive whole, in place and unaltered, or nothing is served."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from configs import faults
from configs.schema import RolloutConfig
from drafter.types import OFF
from rollout.engine import NativeEngine
from rollout.model import load_policy
from rollout.strategy import FixedChooser
from rollout.transfer import (
    Checksum,
    CopiedWeights,
    Link,
    ReceivedWeights,
    StaleWeightsError,
    as_bytes,
    layout,
    send,
    trainable,
)
from rollout.types import Prompt, Rollout, Sampling

BUCKET = 1000  # bytes: no parameter ends where a bucket does


class Tape:
    """A channel that keeps what is sent, for one receiver to read. cut: the bucket at which the sender is gone."""

    def __init__(self, cut: int | None = None) -> None:
        self.sent: list[torch.Tensor] = []
        self.position = 0
        self.cut = cut
        self.recording = True

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.recording:
            self.sent.append(tensor.clone())
            return
        if self.position == self.cut:
            raise RuntimeError("Connection closed by peer")
        tensor.copy_(self.sent[self.position])
        self.position += 1

    def rewound(self, cut: int | None = None) -> "Tape":
        tape = Tape(cut)
        tape.sent, tape.recording = self.sent, False
        return tape


class Policy(nn.Module):
    """Parameters of several dtypes and odd sizes; two of them are one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(37, 11, generator=generator))
        self.narrow = nn.Parameter(torch.randn(5, 3, generator=generator).bfloat16())
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(1, generator=generator))
        self.wide = nn.Parameter(torch.randn(64, 64, generator=generator).bfloat16())
        self.head = self.embed


def tape_of(policy: nn.Module, version: int) -> Tape:
    tape = Tape()
    send(trainable(policy).items(), tape, version, bucket_bytes=BUCKET)
    return tape


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(trainable(one).values(), trainable(other).values(), strict=True)
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in pairs)


@pytest.mark.parametrize("bucket_bytes", [1, 64, BUCKET, 1 << 20])
def test_parameters_arrive_in_place_whatever_the_buckets(bucket_bytes: int) -> None:
    sender, receiver = Policy(1), Policy(2)
    places = [parameter.data_ptr() for parameter in receiver.parameters()]
    weights, tape = ReceivedWeights(receiver), Tape()
    sent = send(trainable(sender).items(), tape, 3, bucket_bytes=bucket_bytes)
    arrived = weights.receive(tape.rewound(), 3, bucket_bytes=bucket_bytes)
    assert same(sender, receiver)
    assert [parameter.data_ptr() for parameter in receiver.parameters()] == places
    assert (arrived.version, arrived.num_bytes, arrived.checksum) == (3, sent.num_bytes, sent.checksum)
    assert sent.num_bytes == 37 * 11 * 4 + 5 * 3 * 2 + 4 + 64 * 64 * 2
    weights.require(3)
    assert all(len(bucket) <= bucket_bytes for bucket in tape.sent[:-1])


def test_only_the_version_that_was_received_is_served() -> None:
    weights = ReceivedWeights(Policy(2))
    assert weights.take(0) == 0  # as it was loaded
    weights.receive(tape_of(Policy(1), 3).rewound(), 3, bucket_bytes=BUCKET)
    with pytest.raises(StaleWeightsError, match="to serve version 4 of the policy and holds 3"):
        weights.take(4)
    with pytest.raises(StaleWeightsError, match="to serve version 0"):
        weights.require(0)


@pytest.mark.parametrize("cut", [0, 1, 5, 10])
def test_a_transfer_cut_short_leaves_nothing_to_serve_until_one_is_complete(cut: int) -> None:
    sender, receiver = Policy(1), Policy(2)
    weights, tape = ReceivedWeights(receiver), tape_of(sender, 3)
    assert len(tape.sent) > cut
    with pytest.raises(StaleWeightsError, match=r"transfer of version 3 failed \(Connection closed"):
        weights.receive(tape.rewound(cut), 3, bucket_bytes=BUCKET)
    for version in (0, 3):
        with pytest.raises(StaleWeightsError, match="no whole version"):
            weights.require(version)
    weights.receive(tape.rewound(), 3, bucket_bytes=BUCKET)
    weights.require(3)
    assert same(sender, receiver)


@pytest.mark.parametrize("bucket", range(11))
def test_one_altered_bit_is_found_out(bucket: int) -> None:
    weights, tape = ReceivedWeights(Policy(2)), tape_of(Policy(1), 3)
    as_bytes(tape.sent[bucket])[-1] ^= 64
    with pytest.raises(StaleWeightsError, match="checksum"):
        weights.receive(tape.rewound(), 3, bucket_bytes=BUCKET)
    assert weights.version is None


def test_another_version_than_was_told_is_refused() -> None:
    weights = ReceivedWeights(Policy(2))
    with pytest.raises(StaleWeightsError, match="version, bytes and checksum"):
        weights.receive(tape_of(Policy(1), 3).rewound(), 4, bucket_bytes=BUCKET)


def test_checksums_tell_words_and_parameters_apart() -> None:
    def of(*parameters: torch.Tensor) -> int:
        checksum = Checksum(torch.device("cpu"))
        for parameter in parameters:
            checksum.add(parameter)
        return checksum.value()

    one, two = torch.randn(100_003), torch.randn(7).bfloat16()
    swapped = one.clone()
    swapped[[3, 99_000]] = one[[99_000, 3]]
    found = {of(one), of(one, two), of(two, one), of(swapped), of(-one), of(one[:-1])}
    assert len(found) == 6
    assert of(one, two) == of(one.clone(), two.clone())


def test_layouts_differ_by_name_shape_dtype_and_order() -> None:
    f32, one, two = torch.float32, torch.Size([2, 3]), torch.Size([3, 2])
    layouts = [
        [("a", one, f32), ("b", one, f32)],
        [("b", one, f32), ("a", one, f32)],
        [("a", two, f32), ("b", one, f32)],
        [("a", one, torch.bfloat16), ("b", one, f32)],
        [("a", one, f32), ("c", one, f32)],
        [("a", one, f32)],
    ]
    assert len({layout(each) for each in layouts}) == len(layouts)
    assert ReceivedWeights(Policy(1)).layout == ReceivedWeights(Policy(2)).layout


def test_a_copy_follows_changes_and_is_whole_or_not_served() -> None:
    trained, copy = Policy(1), Policy(1)
    changes, cut = [0], [False]

    def source() -> Any:
        for name, parameter in trainable(trained).items():
            if cut[0] and name == "wide":
                raise RuntimeError("a rank is gone")
            yield name, parameter

    weights = CopiedWeights(copy, source, lambda: changes[0])
    assert weights.take(0) == 0  # nothing has changed
    trained.load_state_dict(Policy(5).state_dict())
    changes[0] += 1
    assert weights.take(1) == sum(parameter.nbytes for parameter in trainable(trained).values())
    weights.require(1)
    assert same(trained, copy)
    assert weights.take(1) == 0
    changes[0] += 1
    cut[0] = True
    with pytest.raises(RuntimeError, match="a rank is gone"):
        weights.take(2)
    with pytest.raises(StaleWeightsError, match="cut short"):
        weights.require(1)
    cut[0] = False
    weights.take(2)
    weights.require(2)


def test_an_engine_refuses_to_sample_from_mixed_weights(tiny_model_dir: Path) -> None:
    sender, policy = (load_policy(tiny_model_dir, device="cpu", dtype="float32") for _ in range(2))
    with torch.no_grad():
        for parameter in sender.parameters():
            parameter.mul_(1.1)
    weights = ReceivedWeights(policy)
    config = RolloutConfig(block_size=4, kv_tokens=256)
    engine = NativeEngine(policy, drafter=None, chooser=FixedChooser(OFF), rollout=config, weights=weights)
    alone = NativeEngine(sender, drafter=None, chooser=FixedChooser(OFF), rollout=config)
    before = roll_out(engine)
    tape = tape_of(sender, 1)
    with pytest.raises(StaleWeightsError):
        weights.receive(tape.rewound(cut=3), 1, bucket_bytes=BUCKET)
    with pytest.raises(StaleWeightsError):
        roll_out(engine)
    with pytest.raises(StaleWeightsError):
        engine.update(1)
    weights.receive(tape.rewound(), 1, bucket_bytes=BUCKET)
    with pytest.raises(StaleWeightsError, match="is to serve version 0 of the policy and holds 1"):
        roll_out(engine)  # nobody told it of the new version
    engine.update(1)
    after = roll_out(engine)
    assert [each.token_ids for each in after] == [each.token_ids for each in roll_out(alone)]
    assert [each.token_ids for each in after] != [each.token_ids for each in before]
    assert after[0].version_spans == [(1, 12)]


def roll_out(engine: NativeEngine) -> list[Rollout]:
    prompts = [Prompt(id=f"p{index}", token_ids=[5, 7 + index, 9], answer="") for index in range(3)]
    sampling = Sampling(num_samples=1, max_new_tokens=12, stop_token_ids=(), seed=1, step=0)

    async def collected() -> list[Rollout]:
        return [rollout async for rollout in engine.generate(prompts, sampling)]

    return sorted(asyncio.run(collected()), key=lambda rollout: rollout.prompt_id)


def test_processes_receive_alike_and_notice_a_sender_that_dies() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(store.port), str(rank)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    sent, *told = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [faults.EXIT, 0, 0]
    expected = [as_bytes(each).tolist() for each in trainable(Policy(1)).values()]
    for answer in map(json.loads, told):
        assert answer["checksum"] == json.loads(sent)["checksum"]
        assert "transfer of version 2 failed" in answer["error"]
        # what was overwritten before the sender died is of version 2, the rest of version 1
        assert answer["parameters"][0] != expected[0] and answer["parameters"][-1][-1] == expected[-1][-1]


def run_process(port: int, rank: int) -> None:
    """The sender, which dies on its way through the second version, or a receiver."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    link = Link(store, rank=rank, world=3, device="cpu", timeout_s=300)
    policy = Policy(10 * rank + 1)
    if rank == 0:
        sent = send(trainable(policy).items(), link, 1, bucket_bytes=BUCKET)
        print(json.dumps({"checksum": sent.checksum}), flush=True)
        with torch.no_grad():
            policy.embed.add_(1)
        faults.arm("transfer.bucket:4:exit")
        send(trainable(policy).items(), link, 2, bucket_bytes=BUCKET)
    weights = ReceivedWeights(policy)
    first = weights.receive(link, 1, bucket_bytes=BUCKET)
    try:
        weights.receive(link, 2, bucket_bytes=BUCKET)
    except StaleWeightsError as error:
        parameters = [as_bytes(each).tolist() for each in trainable(policy).values()]
        print(json.dumps({"checksum": first.checksum, "error": str(error), "parameters": parameters}))


if __name__ == "__main__":
    run_process(int(sys.argv[1]), int(sys.argv[2]))
